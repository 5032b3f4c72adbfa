"""Refuses plans that would lose too many samples, before anything is touched.

A sample is lost where its key is planned no more and its image is nowhere in the dataset: one
that was renamed, or moved between train and val, is not. One that is dropped because it equals
another is.
"""

import re
import warnings
from collections import defaultdict

from precompute.dataset.records import Rejected
from precompute.plan.cache_plan import CachePlan
from precompute.plan.scan import Notes
from precompute.settings import EncodeSettings
from shards.format import CacheError
from shards.index import Index
from shards.reader import Shard

MAX_REMOVED = 0.1
MAX_REMOVED_OF_FEW, FEW = 0.5, 100  # of fewer samples, one or two are more than a tenth
MAX_NAMED = 8


def refuse_losses(plans: list[CachePlan], settings: EncodeSettings, notes: Notes) -> None:
    """
    Raises:
        ValueError: too many images are rejected, or samples removed, or the cache was made from
            another dataset; says how many, and the option that allows it.
    """
    images = {
        planned.image_digest for plan in plans for planned in plan.planned if planned.image_digest
    }
    for plan in plans:
        lost = _lost(plan, images)
        if not settings.allow_other_dataset:
            _refuse_other_dataset(plan, lost, settings, notes)
            _refuse_removal(plan, lost, settings)
    for plan in plans:
        num = sum(not rejection.is_duplicate for rejection in plan.rejected)
        share = num / max(1, num + len(plan.planned))
        if share > settings.max_rejected:
            warn_of_reasons(plan.rejected)
            no_caption = any(file.reason.startswith("no caption") for file in plan.rejected)
            hint = "; --missing-caption takes images without a caption" if no_caption else ""
            raise ValueError(
                f"{plan.folder}: {share:.0%} of the images were rejected ({num:,} of "
                f"{num + len(plan.planned):,}; --max-rejected {settings.max_rejected}). Nothing "
                f"was written; --dry-run lists them{hint}"
            )


def warn_of_reasons(rejected: list[Rejected]) -> None:
    """Name rejected files, by their reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for rejection in sorted(rejected, key=lambda rejection: rejection.path):
        name = rejection.path.rpartition("/")[2].rpartition(".")[0]
        reason = (
            re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "X", rejection.reason)
            if name
            else rejection.reason
        )
        by_reason[reason].append(rejection.path)
    for reason, paths in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:MAX_NAMED]:
        more = f" and {len(paths) - MAX_NAMED:,} more" if len(paths) > MAX_NAMED else ""
        names = ", ".join(paths[:MAX_NAMED])
        warnings.warn(f"{len(paths):,} rejected: {reason}: {names}{more}", stacklevel=2)


def num_existing(plan: CachePlan) -> int:
    """The number of existing samples, current and retired."""
    return len({key for existing in plan.comparison.existing_shards for key in existing.rows})


def _lost(plan: CachePlan, images: set[str]) -> dict[str, tuple[str, int, bool]]:
    """The shard, row and whether the shard is retired of each sample that would be lost, by key."""
    retired = plan.comparison.retired
    duplicates = {rejection.key for rejection in plan.rejected if rejection.is_duplicate}
    return {
        key: (existing.name, existing.rows[key], existing is retired.get(existing.name))
        for existing, key in plan.comparison.orphans()
        if key in existing.rows
        and (existing.fingerprints[key][0] not in images or key in duplicates)
    }


def _refuse_removal(
    plan: CachePlan, lost: dict[str, tuple[str, int, bool]], settings: EncodeSettings
) -> None:
    num = num_existing(plan)
    max_share = settings.max_removed
    if max_share is None:
        max_share = MAX_REMOVED if num >= FEW else MAX_REMOVED_OF_FEW
    if len(lost) <= max_share * num + 1e-6:  # 0.29 * 100 is less than 29
        return
    rejected = [rejection for rejection in plan.rejected if rejection.key in lost]
    why = []
    if rejected:
        why.append(
            f"{len(rejected):,} would be rejected ({rejected[0].path}: {rejected[0].reason})"
        )
    if len(rejected) < len(lost):
        missing = next(key for key in lost if key not in {rejection.key for rejection in rejected})
        why.append(
            f"{len(lost) - len(rejected):,} are not in {settings.dataset}, or held out by the name "
            f"of a split ({_path(plan, *lost[missing])})"
        )
    raise ValueError(
        f"{plan.folder}: {len(lost):,} of its {num:,} samples would be removed: "
        f"{'; '.join(why)}. Nothing was touched. If that is meant, give --max-removed "
        f"{_round_up(len(lost) / num)}; else mend the dataset, or give another --out"
    )


def _round_up(share: float) -> float:
    """To a hundredth."""
    return min(1.0, -(-share * 100 // 1) / 100)


def _refuse_other_dataset(
    plan: CachePlan,
    lost: dict[str, tuple[str, int, bool]],
    settings: EncodeSettings,
    notes: Notes,
) -> None:
    """By what this machine remembers, and where it remembers nothing by the images: samples whose
    image is still there, or whose name is that of one that is rejected now, are common."""
    num = num_existing(plan)
    if notes.is_same_dataset or not num:
        return
    images = {planned.image_digest for planned in plan.planned if planned.image_digest}
    names = {rejection.key for rejection in plan.rejected}
    common = {
        key
        for existing in plan.comparison.existing_shards
        for key in existing.rows
        if key in names or existing.fingerprints[key][0] in images
    }
    if common and (notes.other_dataset is None or len(common) >= num / 2):
        return
    dataset_before = notes.other_dataset or "another dataset"
    has = f"{len(common):,} of its {num:,} images are" if common else "none of its images is"
    raise ValueError(
        f"{plan.folder}: this cache was made from {dataset_before}; {has} in {settings.dataset}. "
        "Nothing was touched. Give another --out, or --allow-other-dataset to replace what is there"
    )


def _path(plan: CachePlan, name: str, row: int, is_retired: bool) -> str:
    """The path in the dataset that a sample was made from."""
    existing = (plan.comparison.retired if is_retired else plan.comparison.current)[name]
    try:
        shard = Shard(existing.folder, name, Index(existing.folder / f"{name}.index").sha256)
        return str(shard.metadata(row)["path"])
    except (CacheError, OSError):
        return f"a sample of {name}"
