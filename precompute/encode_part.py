"""``encode --part``: shards of a plan, written by processes that know nothing of each other.

``plan`` writes the plan file of a run and ends; any scheduler runs the parts; ``finish`` goes on as
a run does when its shards are written. Plain encode is the three in a row.
"""

from contextlib import ExitStack
from pathlib import Path

from precompute.dataset.file_roles import TRAIN, VAL
from precompute.encode_shard import encode_shard
from precompute.encoders import Encoders
from precompute.plan.cache_plan import CachePlan
from precompute.plan.plan_file import PlanFile
from precompute.plan.reuse import is_whole
from precompute.recipe import read_recipe
from precompute.report import Progress
from precompute.settings import EncodeSettings
from runtime.devices import num_cores, num_threads
from runtime.errors import echo
from runtime.messages import pluralize
from runtime.work_queue import WorkQueue
from sdxl.base import open_base
from shards.manifest import MANIFEST, PLAN


def write_part(settings: EncodeSettings, number: int, num_parts: int) -> None:
    """Write each ``num_parts``-th shard of the plan from the ``number``-th on, but for whole ones.

    It needs the plan, the dataset's files and the base, and neither a lock nor any other process.
    Whatever part dies, is repeated or runs twice at once, the shards have the same bytes: what is
    whole is never replaced, what is copied from stays until ``finish``, and a part that outlives
    its plan writes nothing more.

    Raises:
        ValueError: there is no plan, or it is not of these settings and this base.
    """
    planned = [folder for folder in _folders(settings.out) if (folder / PLAN).exists()]
    if not planned:
        check_planned(settings.out)
        echo(f"{settings.out}: is finished, nothing is left to write")
        return
    base = open_base(settings.base, vae=settings.vae, tokenizers=settings.tokenizers)
    files = {folder: PlanFile(folder) for folder in planned}
    header = next(iter(files.values())).header
    recipe = read_recipe(settings, base)
    if others := sorted(cause for cause in recipe if recipe[cause] != header["recipe"].get(cause)):
        raise ValueError(
            f"{settings.out}: the plan was made with other settings or another base (differing: "
            f"{', '.join(others)}); give those of --part plan, or plan again"
        )
    todo = [(folder, shard) for folder in planned for shard in range(len(files[folder]))]
    todo = todo[number - 1 :: num_parts]
    tasks = [(folder, files[folder].shard(shard)) for folder, shard in todo]
    left = [(folder, task) for folder, task in tasks if not is_whole(folder, task.name)]
    made_with = header["made_with"]
    for name, given in (("batch_size", settings.batch_size), ("threads", settings.threads)):
        if given is not None and given != made_with.get(name, given):
            raise ValueError(
                f"--{name.replace('_', '-')} {given}: the plan has {made_with[name]}; give it with "
                "--part plan"
            )
    with ExitStack() as stack:
        stack.enter_context(num_threads(made_with.get("threads", num_cores())))
        encoders = Encoders(settings, base, made_with["batch_size"])
        progress = Progress(WorkQueue(), sum(task.num_encodes for _, task in left))
        stack.enter_context(progress)
        for folder, task in left:
            if is_whole(folder, task.name):
                continue
            encode_shard(
                task,
                folder,
                encoders,
                header["recipe"],
                progress.tick,
                check=files[folder].check_current,
                keeps_sources=True,
            )
    echo(f"part {number}/{num_parts}: its {pluralize(len(tasks), 'shard')} are written")


def _folders(out: Path) -> list[Path]:
    """Where the caches of a run may be."""
    return [out, out / TRAIN, out / VAL]


def check_planned(out: Path) -> None:
    """
    Raises:
        ValueError: there is neither a plan nor a finished cache.
    """
    files = (folder / name for folder in _folders(out) for name in (PLAN, MANIFEST))
    if not any(file.exists() for file in files):
        raise ValueError(f"{out}: has no plan; run the same with --part plan first")


def refuse_missing(plans: list[CachePlan]) -> None:
    """
    Raises:
        FileNotFoundError: shards are still to be written; it names some.
    """
    missing = [f"{plan.folder / task.name}" for plan in plans for task in plan.shard_tasks]
    if missing:
        num = sum(len(plan.names) for plan in plans)
        listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise FileNotFoundError(f"{len(missing):,} of {num:,} shards are not written: {listed}")
