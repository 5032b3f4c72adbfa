"""One shard of the work: written whole, and then what it alone copied from is removed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from precompute.copies import Copies
from precompute.encoders import Encoders
from precompute.planning.held import remove_shard
from precompute.planning.work import ShardWork
from precompute.samples import Notes, make_samples
from precompute.text import text_shape
from sdxl.latent_rgb import LatentSums
from shards.format import Layout, Sample
from shards.manifest import REPLACED
from shards.writer import write_shard


def write_work_shard(
    work: ShardWork,
    folder: Path,
    encoders: Encoders,
    recipe: dict[str, Any],
    tick: Callable[[bool], None],
) -> None:
    """Encode and copy, write and mark; see ``make_samples`` for ``tick``.

    Raises:
        OSError: a file could not be read or written; the shard is not there then.
    """
    text = text_shape(folder)
    layout = Layout(
        dtype=recipe["storage"]["dtype"],
        latent=(encoders.channels, work.bucket[1] // 8, work.bucket[0] // 8),
        prompt=(text["tokens"], text["depth"]),
        pooled=text["pooled"],
    )
    notes = Notes(LatentSums.empty(encoders.channels))
    about: dict[str, Any] = {"bucket": work.bucket, "repeats": work.repeats, "recipe": recipe}
    copies = Copies(folder)

    def samples() -> Iterator[Sample]:
        yield from make_samples(work.tasks, encoders, copies, notes, tick)
        about.update(notes.to_json())

    write_shard(folder, work.name, samples(), layout, about)
    for name in work.frees:
        remove_shard(folder / REPLACED, name)
