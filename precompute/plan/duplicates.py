"""Equal images: those whose files have the same bytes, whatever their names, captions and masks.

Only files of one size can be equal, so no others are read for it. Which one of them is kept depends
on the dataset alone: not on the cache, the number of processes or the order of files on the disk.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from precompute.dataset.file_roles import VAL
from precompute.dataset.records import Rejected
from precompute.plan.placement import PlannedSample

EQUAL = "equal image"  # how the reasons begin


@dataclass(frozen=True)
class Kept:
    """The first of some equal images, and the part of the cache that it is in: "", train or val."""

    part: str
    sample: PlannedSample


def shared_sizes(planned: Iterable[PlannedSample]) -> set[int]:
    """The sizes in bytes that more than one image has."""
    sizes = Counter(sample.record.image.size for sample in planned)
    return {size for size, number in sizes.items() if number > 1}


def find_equal(parts: Mapping[str, Collection[PlannedSample]]) -> dict[str, dict[str, Kept]]:
    """For each part the images that equal an earlier one, by key, with the one that is kept.

    The images of val come first, for what is validated on should not be trained on; those of a part
    are in the order of their keys. All that may be equal must have their digest.
    """
    first: dict[str, Kept] = {}
    equal: dict[str, dict[str, Kept]] = {}
    for part in sorted(parts, key=lambda part: part != VAL):
        equal[part] = {}
        for sample in sorted(parts[part], key=lambda sample: sample.record.key):
            if sample.image_digest:
                kept = first.setdefault(sample.image_digest, Kept(part, sample))
                if kept.sample is not sample:
                    equal[part][sample.record.key] = kept
    return equal


def num_across(part: str, equal: Mapping[str, Kept]) -> int:
    """How many of the images of a part equal one of another part."""
    return sum(kept.part != part for kept in equal.values())


def reject_equal(
    planned: Iterable[PlannedSample], part: str, equal: Mapping[str, Kept]
) -> tuple[list[PlannedSample], list[Rejected]]:
    """The images of a part without those that equal an earlier one, and why each of these is not
    encoded."""
    stay, dropped = list[PlannedSample](), list[Rejected]()
    for sample in planned:
        kept = equal.get(sample.record.key)
        if kept is None:
            stay.append(sample)
            continue
        other = f"{kept.part}: " if kept.part != part else ""
        reason = f"{EQUAL}; kept is {other}{kept.sample.record.path}"
        differs = {
            "captions": kept.sample.record.captions != sample.record.captions,
            "mask": kept.sample.mask_digest != sample.mask_digest,
        }
        if differing := " and ".join(name for name in differs if differs[name]):
            reason += f" (with other {differing})"
        dropped.append(Rejected(sample.record.path, reason, is_duplicate=True))
    return stay, dropped
