"""The stage: plan the shards, adopt what is whole, encode what is missing, mark it."""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from precompute.placement import PlannedShard, place, plan_pictures
from precompute.prompts import settle_prompts
from precompute.recipe import read_recipe
from precompute.records import Rejected, Source
from precompute.samples import Encoders, Notes, encode_members
from precompute.settings import EncodeSettings
from precompute.sources import read_data_set
from precompute.text import text_shape, unconditional_is_whole, write_unconditional
from sdxl.device import exact_fp32
from sdxl.latent_rgb import LatentSums
from sdxl.prompts import Prompt, read_prompts
from shards import CacheError
from shards.buckets import bucket_name
from shards.durable import PARTIAL, write_durable
from shards.index import Index
from shards.manifest import MANIFEST, UNCONDITIONAL, write_manifest
from shards.sample import Layout, Sample
from shards.writer import write_shard

REJECTED = "rejected.jsonl"
SHARD_NAME = re.compile(r"\d+x\d+-\d{6}")


@dataclass
class Report:
    """What one cache came to."""

    folder: Path
    buckets: dict[str, int] = field(default_factory=dict)  # pictures by bucket
    num_shards: int = 0
    num_bytes: int = 0
    num_encoded: int = 0  # in this run
    num_adopted: int = 0  # from an earlier run
    num_upscaled: int = 0
    num_cut_captions: int = 0
    num_prompts: int = 0  # to draw previews from
    rejected: list[Rejected] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)  # why earlier shards were encoded again

    @property
    def num_samples(self) -> int:
        return self.num_encoded + self.num_adopted


def encode(settings: EncodeSettings) -> list[Report]:
    """Encode a data set into ``settings.out``, or its ``train`` and ``val``; a report for each.

    Raises:
        ValueError: the data set, the base, the prompts or the settings cannot be used.
    """
    prompts = None if settings.preview_prompts is None else read_prompts(settings.preview_prompts)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    sources = read_data_set(settings)
    recipe = read_recipe(settings)
    encoders = Encoders(settings)
    for name in sources:
        _check_out(settings.out / name, settings.dataset / name)
    if "" not in sources and (settings.out / MANIFEST).exists():
        raise ValueError(f"{settings.out}: is one cache, not train/ and val/; give another --out")
    exact_fp32()
    return [  # previews are of training: none in val
        encode_source(
            source, settings.out / name, encoders, recipe, None if name == "val" else prompts
        )
        for name, source in sources.items()
    ]


def encode_source(
    source: Source,
    folder: Path,
    encoders: Encoders,
    recipe: dict[str, Any],
    prompts: list[Prompt] | None,
) -> Report:
    """One cache, from nothing or from what an earlier run left; None keeps the prompts it has."""
    settings, report = encoders.settings, Report(folder)
    planned, unreadable = plan_pictures(source.records, settings)
    shards = place(planned, settings.shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    text_is_whole = unconditional_is_whole(folder, recipe)
    indexes, stale = _adopt(folder, shards, recipe)
    report.causes = sorted(set(stale.values()))
    report.num_adopted = sum(len(index) for index in indexes.values())
    if stale or len(indexes) < len(shards):
        encoders.load()  # what cannot be encoded is refused before anything is removed
        (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("*" + PARTIAL):
        path.unlink()
    if not text_is_whole:
        write_unconditional(folder, encoders.text, settings.batch_size, recipe)
    report.num_prompts = settle_prompts(folder, prompts, encoders, recipe)
    with tqdm(
        total=len(planned), initial=report.num_adopted, unit="img", desc=f"encode {folder.name}"
    ) as bar:
        for shard in shards:
            if shard.name not in indexes:
                indexes[shard.name] = _write_shard(shard, folder, encoders, recipe, bar)
                report.num_encoded += len(indexes[shard.name])
    for name in stale.keys() - indexes.keys():
        _remove_shard(folder, name)
    failed = [Rejected(*row) for index in indexes.values() for row in index.header["rejected"]]
    report.rejected = sorted([*source.rejected, *unreadable, *failed], key=lambda one: one.key)
    if not report.num_samples:
        warnings.warn(f"{folder}: no picture could be encoded; {REJECTED} says why", stacklevel=2)
    _write_rejected(folder, report.rejected)
    _write_manifest(folder, recipe, [indexes[shard.name] for shard in shards])
    report.num_upscaled = sum(p.geometry.is_upscaled for p in planned)
    return _count(report, indexes)


def _count(report: Report, indexes: dict[str, Index]) -> Report:
    for name in sorted(indexes):
        index = indexes[name]
        bucket = bucket_name(index.header["bucket"])
        report.buckets[bucket] = report.buckets.get(bucket, 0) + len(index)
        report.num_cut_captions += index.header["num_cut_captions"]
        report.num_bytes += index.header["tar_bytes"]
    report.num_shards = len(indexes)
    return report


def _check_out(folder: Path, source: Path) -> None:
    """Refuse to mix a cache with anything else."""
    if folder.resolve() == source.resolve():
        raise ValueError(f"{folder}: is the data set; give another --out")
    if any(part.exists() and not part.is_dir() for part in (folder, *folder.parents)):
        raise ValueError(f"{folder}: not a folder")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    foreign = [name for name in names if not name.endswith(PARTIAL)]
    if foreign and UNCONDITIONAL not in names and MANIFEST not in names:
        raise ValueError(
            f"{folder}: not empty and no cache (holds {min(foreign)}); give another --out"
        )


def _adopt(
    folder: Path, shards: list[PlannedShard], recipe: dict[str, Any]
) -> tuple[dict[str, Index], dict[str, str]]:
    """The whole shards of an earlier run that this one would write alike; the others, and why."""
    wanted = {shard.name: shard for shard in shards}
    adopted: dict[str, Index] = {}
    stale: dict[str, str] = {}
    files = (path for path in folder.iterdir() if path.suffix in (".tar", ".index"))
    for name in sorted({path.stem for path in files if SHARD_NAME.fullmatch(path.stem)}):
        cause = _stale_because(folder, wanted[name], recipe) if name in wanted else "pictures"
        if cause:
            stale[name] = cause
        else:
            adopted[name] = Index(folder / f"{name}.index")
    return adopted, stale


def _remove_shard(folder: Path, name: str) -> None:
    """The mark goes first: a tar without an index is nothing."""
    (folder / f"{name}.index").unlink(missing_ok=True)
    (folder / f"{name}.tar").unlink(missing_ok=True)


def _stale_because(folder: Path, shard: PlannedShard, recipe: dict[str, Any]) -> str:
    """Why a shard of an earlier run cannot stay; empty if it can."""
    try:
        index = Index(folder / f"{shard.name}.index")
        size = (folder / f"{shard.name}.tar").stat().st_size
    except (CacheError, FileNotFoundError):
        return "unfinished or damaged shards"
    if size != index.header["tar_bytes"]:
        return "unfinished or damaged shards"
    for cause, value in recipe.items():
        if index.header["recipe"].get(cause) != value:
            return cause
    return "" if index.header["members"] == shard.digest else "pictures"


def _write_shard(
    shard: PlannedShard, folder: Path, encoders: Encoders, recipe: dict[str, Any], bar: Any
) -> Index:
    settings = encoders.settings
    text = text_shape(folder)
    layout = Layout(
        dtype=settings.dtype,
        latent=(encoders.latents.channels, shard.bucket[1] // 8, shard.bucket[0] // 8),
        prompt=(text["tokens"], text["depth"]),
        pooled=text["pooled"],
    )
    notes = Notes(LatentSums.empty(encoders.latents.channels))
    about: dict[str, Any] = {
        "bucket": shard.bucket,
        "repeats": 1,
        "recipe": recipe,
        "members": shard.digest,
        "made_with": {"batch_size": settings.batch_size, "threads": torch.get_num_threads()},
    }

    def samples() -> Iterator[Sample]:
        yield from encode_members(shard.members, encoders, notes, bar)
        about.update(notes.to_json())

    _remove_shard(folder, shard.name)
    write_shard(folder, shard.name, samples(), layout, about)
    return Index(folder / f"{shard.name}.index")


def _write_rejected(folder: Path, rejected: list[Rejected]) -> None:
    rows = [{"key": one.key, "path": one.path, "reason": one.reason} for one in rejected]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_durable(folder / REJECTED, "".join(lines).encode())


def _write_manifest(folder: Path, recipe: dict[str, Any], indexes: list[Index]) -> None:
    about: dict[str, Any] = {"recipe": recipe, "text": text_shape(folder)}
    sums = [LatentSums.from_json(index.header["sums"]) for index in indexes if len(index)]
    if sums:
        total = sum(sums[1:], start=sums[0])
        about["latents"] = {"channels": len(total.gram) - 1, **total.statistics()}
        about["latent_rgb"] = total.fit()
    write_manifest(folder, about, indexes)
