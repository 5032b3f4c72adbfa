"""What an encode came to, for whoever tells it."""

from dataclasses import dataclass, field
from pathlib import Path

from precompute.changes import Changes
from precompute.records import Rejected
from shards.buckets import bucket_name
from shards.index import Index
from shards.sample import TENSORS

NOUNS = {  # of one sample, and of several
    "picture": ("picture", "pictures"),
    "mask": ("mask", "masks"),
    "captions": ("caption", "captions"),
    "weight": ("weight", "weights"),
}


@dataclass
class Report:
    """What one cache came to."""

    folder: Path
    changes: Changes = field(default_factory=Changes)
    buckets: dict[str, int] = field(default_factory=dict)  # pictures by bucket
    num_samples: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    num_upscaled: int = 0
    num_cut_captions: int = 0
    num_variants: int = 0  # crops and mirrored pictures among them
    num_captions: int = 0
    num_masks: int = 0
    num_taken: int = 0  # pictures an epoch, with repeats
    num_prompts: int = 0  # to draw previews from
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def is_as_it_was(self) -> bool:
        """Whether the cache held all that it should before this run."""
        changes = self.changes
        return not (changes.num_new or changes.num_removed or changes.causes)

    @property
    def rejected_share(self) -> float:
        """Of all that the data set named."""
        return len(self.rejected) / max(1, len(self.rejected) + self.num_samples)

    def add(self, index: Index) -> None:
        """Count a shard of the finished cache."""
        header, bucket = index.header, bucket_name(index.header["bucket"])
        self.buckets[bucket] = self.buckets.get(bucket, 0) + len(index)
        self.num_samples += len(index)
        self.num_shards += 1
        self.num_bytes += header["tar_bytes"]
        self.num_cut_captions += header["num_cut_captions"]
        records = index.records
        self.num_variants += int(records["num_variants"].sum())
        self.num_captions += int(records["num_captions"].sum())
        self.num_masks += int((records["tensors"][:, TENSORS.index("mask")] > 0).sum())
        self.num_taken += len(index) * int(header["repeats"])


def summarise(report: Report) -> str:
    """``12 new, 3 captions changed, 1 removed, 9,984 unchanged``."""
    changes, causes = report.changes, report.changes.causes
    parts = [f"{changes.num_new:,} new"] if changes.num_new else []
    for cause, number in sorted(causes.items()):
        if cause in NOUNS:
            parts.append(f"{number:,} {NOUNS[cause][number > 1]} changed")
        else:
            parts.append(f"{cause} changed for {number:,}")
    if changes.num_removed:
        parts.append(f"{changes.num_removed:,} removed")
    if changes.num_unchanged or not parts:
        parts.append(f"{changes.num_unchanged:,} unchanged")
    return ", ".join(parts)
