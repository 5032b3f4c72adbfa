"""Prints the progress of an encode, and a report on each cache."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from tqdm import tqdm
from xxhash import xxh3_64_intdigest

from precompute.dataset.records import Rejected
from precompute.imports.kohya import Imports
from precompute.plan.reuse import Changes
from precompute.settings import EncodeSettings
from runtime.errors import is_quiet
from runtime.messages import pluralize
from runtime.signals import StopSignals
from runtime.work_queue import WorkQueue
from shards.buckets import bucket_name
from shards.format import TENSORS
from shards.index import Index

IDLE_SECONDS = 300  # without a sample of any process; a batch takes seconds, on a CPU a minute


class Progress:
    """Samples done and rejected, and shards written; counted over all processes."""

    def __init__(self, queue: WorkQueue, num_samples: int) -> None:
        self._queue, self._stops = queue, StopSignals(at_once=True)
        self._bar = tqdm(
            total=num_samples, unit="img", desc="encode", disable=is_quiet() or not queue.is_main
        )

    def __enter__(self) -> "Progress":
        self._stops.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stops.__exit__(kind, error, trace)
        self._bar.close()

    def tick(self, failed: bool) -> None:
        """Count one more sample, encoded or failed.

        Raises:
            KeyboardInterrupt: the run is to stop.
        """
        self._stops.check()
        self._count("rejected", int(failed))
        self._show(self._count("samples", 1))

    def shard_done(self) -> None:
        self._count("shards", 1)

    def wait_for(self, num_shards: int) -> bool:
        """Wait until all shards are written, by whichever process; False where some are claimed and
        nobody writes them any more."""

        def are_written() -> bool:
            self._stops.check()
            self._show(self._count("samples", 0))
            return self._count("shards", 0) >= num_shards

        return self._queue.wait_until(are_written, IDLE_SECONDS)

    def _count(self, counter: str, number: int) -> int:
        return self._queue.add(f"encode {counter}", number)

    def _show(self, done: int) -> None:
        if self._queue.is_main and done > self._bar.n:
            self._bar.set_postfix(rejected=self._count("rejected", 0), refresh=False)
            self._bar.update(done - self._bar.n)


NOUNS = {  # of one sample, and of several
    "picture": ("image", "images"),
    "mask": ("mask", "masks"),
    "captions": ("caption", "captions"),
    "weight": ("weight", "weights"),
}


@dataclass
class Report:
    """Counts of one finished cache, and what changed in it."""

    folder: Path
    changes: Changes = field(default_factory=Changes)
    buckets: dict[str, int] = field(default_factory=dict)  # images by bucket
    num_samples: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    num_upscaled: int = 0
    num_cut_captions: int = 0
    num_variants: int = 0  # crops and mirrored images among them
    num_captions: int = 0
    num_masks: int = 0
    num_taken: int = 0  # images an epoch, with repeats
    num_prompts: int = 0  # to draw previews from
    dropped_variants: list[tuple[str, int]] = field(default_factory=list)  # by image: how many
    rejected: list[Rejected] = field(default_factory=list)
    imports: Imports | None = None
    images: "array[int]" = field(default_factory=lambda: array("Q"))  # hashes of their digests
    num_across: int = 0  # images that equal one of val

    @property
    def num_equal(self) -> int:
        """Images that equal another one of this cache, the first of each not counted."""
        return len(self.images) - len(np.unique(np.frombuffer(self.images, np.uint64)))

    @property
    def bad(self) -> list[Rejected]:
        """The rejected images without those that were dropped as equal to others."""
        return [rejection for rejection in self.rejected if not rejection.is_duplicate]

    @property
    def num_dropped(self) -> int:
        """Images that were dropped as equal to others."""
        return len(self.rejected) - len(self.bad)

    @property
    def rejected_share(self) -> float:
        """The share of the dataset's images that were rejected."""
        return len(self.bad) / max(1, len(self.bad) + self.num_samples)

    def add_images(self, index: Index, failed: set[str]) -> None:
        """Note the image digests of a shard's samples, without those that ``failed``, by key."""
        self.images.extend(
            xxh3_64_intdigest(str(digest).encode())
            for key, digest, *_ in index.header["members"]
            if digest and key not in failed
        )

    def add(self, index: Index) -> None:
        """Count a shard of the finished cache."""
        header, bucket = index.header, bucket_name(index.header["bucket"])
        self.buckets[bucket] = self.buckets.get(bucket, 0) + len(index)
        self.num_samples += len(index)
        self.num_shards += 1
        self.num_bytes += header["tar_bytes"]
        self.num_cut_captions += header["num_cut_captions"]
        self.dropped_variants += [(path, num) for path, num in header.get("dropped_variants", [])]
        records = index.records
        self.num_variants += int(records["num_variants"].sum())
        self.num_captions += int(records["num_captions"].sum())
        self.num_masks += int((records["tensors"][:, TENSORS.index("mask")] > 0).sum())
        self.num_taken += len(index) * int(header["repeats"])


def count_across(reports: list[Report]) -> None:
    """Count the images of train that equal one of val."""
    if len(reports) == 2:
        train, val = sorted(reports, key=lambda report: report.folder.name)
        of_val = np.unique(np.frombuffer(val.images, np.uint64))
        train.num_across = int(np.isin(np.frombuffer(train.images, np.uint64), of_val).sum())


def summarize(changes: Changes) -> str:
    """``12 new, 3 captions changed, 1 removed, 9,984 unchanged``."""
    parts = [f"{changes.num_new:,} new"] if changes.num_new else []
    if changes.num_renamed:
        parts.append(f"{changes.num_renamed:,} renamed")
    for cause, number in sorted(changes.causes.items()):
        if cause in NOUNS:
            parts.append(f"{number:,} {NOUNS[cause][number > 1]} changed")
        else:
            parts.append(f"{cause} changed for {number:,}")
    if changes.num_removed:
        parts.append(f"{changes.num_removed:,} removed")
    if changes.num_unchanged or not parts:
        parts.append(f"{changes.num_unchanged:,} unchanged")
    return ", ".join(parts)


def variants_label(num: int, num_samples: int, settings: EncodeSettings) -> str:
    """What ``num`` variants are, and why they are fewer than ``--crops`` and ``--flip`` ask for."""
    kinds = [f"{settings.crops} random crops"] if settings.crops else []
    label = (
        f"variants of them ({', '.join([*kinds, *(['mirrored too'] if settings.flip else [])])})"
    )
    wanted = num_samples * max(1, settings.crops) * (2 if settings.flip else 1)
    if settings.crops and num < wanted:
        label += f"; not {wanted:,}, as not every image has room for {settings.crops} crops"
    return label


def describe(report: Report, settings: EncodeSettings) -> Iterator[str]:
    """The lines that describe a report."""
    yield (
        f"\n{report.folder}: {pluralize(report.num_samples, 'image')} in "
        f"{pluralize(report.num_shards, 'shard')}, "
        f"{report.num_bytes / 1e6:.1f} MB: {summarize(report.changes)}"
        + (", so nothing was encoded" if report.changes.are_none and not settings.part else "")
    )
    for bucket, count in report.buckets.items():
        yield f"  {bucket:>9}  {count:6d}  {'#' * round(40 * count / max(1, report.num_samples))}"
    for number, usual, label in (
        (
            report.num_variants,
            -1 if settings.crops else report.num_samples,
            variants_label(report.num_variants, report.num_samples, settings),
        ),
        (report.num_captions, report.num_samples, "captions"),
        (report.num_taken, report.num_samples, "images an epoch, with repeats"),
        (report.num_masks, 0, "with a mask; train --masked-loss obeys it"),
        (report.num_equal, 0, "equal another one byte for byte; --dedupe drop drops them"),
        (report.num_across, 0, "equal an image of val; --dedupe drop drops them"),
        (report.num_dropped, 0, "equal to others and dropped; see rejected.jsonl"),
        (report.num_upscaled, 0, "smaller than their bucket, so enlarged"),
        (report.num_cut_captions, 0, f"captions cut at {77 * settings.long_captions} tokens"),
    ):
        if number != usual:
            yield f"  {number:,} {label}"
    if report.imports is not None:
        yield from report.imports.describe()
    if report.num_prompts:
        yield f"  {report.num_prompts} preview prompts"


def warn_of_rejected(report: Report) -> str:
    """A line where images were rejected, and one where some of their variants were."""
    lines = []
    if report.bad:
        first = report.bad[0]
        lines.append(
            f"Warning: {len(report.bad):,} rejected, see {report.folder / 'rejected.jsonl'}; "
            f"e.g. {first.path}: {first.reason}"
        )
    if dropped := sorted(report.dropped_variants):
        number = sum(num for _, num in dropped)
        variants, images = pluralize(number, "variant"), pluralize(len(dropped), "image")
        lines.append(
            f"Warning: {variants} of {images} dropped: "
            f"the mask is black all over in that crop; e.g. {dropped[0][0]}"
        )
    return "\n".join(lines)
