"""The manifest: what a cache is, derived from its indexes, written last, checked when read."""

import hashlib
from pathlib import Path
from typing import Any

from runtime import schema
from runtime.files import canonical_json, content_digest, file_sha256, write_changed
from runtime.schema import misfit, read_json
from shards.format import FORMAT, VERSION, CacheError, OtherFormat
from shards.index import IMPORTED, Index

MANIFEST = "manifest.json"
PROMPTS = "prompts.safetensors"
UNCONDITIONAL = "unconditional.safetensors"
SCAN = "scan.json"  # this and the next ones are files of a running encode, no part of the cache
PLAN = "plan.jsonl"
LOCK = "encode.lock"
REPLACED = "replaced"  # a folder: shards that are being written anew
ENCODE_FILES = (SCAN, PLAN, LOCK)
SIDE_FILES = (UNCONDITIONAL, PROMPTS, "rejected.jsonl")

_ENCODER = schema.fields({"digest": schema.text, "of_base": schema.flag})
_TEXT_ENCODER = schema.fields({"digest": schema.text})
FIELDS = {
    "shards": schema.each(
        schema.fields(
            {
                "name": schema.SHARD,
                "bucket": schema.BUCKET,
                "repeats": schema.REPEATS,
                "count": schema.integer(0, 2**40),
                "bytes": schema.integer(),
                "index_sha256": schema.DIGEST,
            }
        )
    ),
    "side_files": schema.table(lambda name: name in SIDE_FILES, schema.DIGEST),
    "num_samples": schema.integer(),
    "recipe": schema.fields(
        {"vae": _ENCODER, "text_encoder": _TEXT_ENCODER, "text_encoder_2": _TEXT_ENCODER},
        {
            "long_captions": schema.integer(1, 1000),
            "storage": schema.fields({"dtype": schema.text}),
            "preprocessing": schema.fields({"mode": schema.text}),
        },
    ),
    "text": schema.fields(dict.fromkeys(("tokens", "depth", "pooled"), schema.SIDE)),
}
MORE_FIELDS = {  # a cache without images has none of the latents
    "dataset_revision": schema.text,  # the commit of a dataset of the hub
    "latents": schema.fields(
        {"channels": schema.SIDE},
        {name: schema.each(schema.number) for name in ("mean", "std")},
    ),
    "latent_rgb": schema.fields(
        {
            "weight": schema.each(schema.each(schema.number, 3)),
            "bias": schema.each(schema.number, 3),
        },
        {  # caches of earlier versions have the linear map alone
            "quadratic": schema.fields(
                {
                    "products": schema.each(schema.each(schema.number, 3)),
                    "weight": schema.each(schema.each(schema.number, 3)),
                    "bias": schema.each(schema.number, 3),
                }
            )
        },
    ),
    "imported": IMPORTED,
    "sanity": schema.fields(
        {
            "drawings": schema.fields({"psnr": schema.number}),
            "pictures": schema.each(schema.fields({"psnr": schema.number})),
        }
    ),
}


UNLEARNED = ("digest", "dataset_revision")


def write_manifest(
    folder: Path, encode_fields: dict[str, Any], indexes: list[Index]
) -> dict[str, Any]:
    """Write ``manifest.json`` from the indexes and the folder's side files; return it.

    ``encode_fields`` is the encode stage's part: recipe, statistics, latent-to-RGB map.
    """
    shards = [
        {
            "name": index.header["shard"],
            "bucket": index.header["bucket"],
            "repeats": index.header["repeats"],
            "count": len(index),
            "bytes": index.header["tar_bytes"],
            "index_sha256": index.sha256,
        }
        for index in sorted(indexes, key=lambda index: str(index.header["shard"]))
    ]
    present = [name for name in SIDE_FILES if (folder / name).exists()]
    side_files = {name: file_sha256(folder / name) for name in present}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **encode_fields,
        "shards": shards,
        "side_files": side_files,
        "num_samples": sum(shard["count"] for shard in shards),
    }
    return _sign_manifest(folder, manifest)


def update_side_file_digest(folder: Path, name: str) -> dict[str, Any]:
    """Update the manifest's digest of one side file, and keep all others; return the manifest.

    Raises:
        CacheError: as ``read_manifest``.
    """
    manifest = read_manifest(folder)
    manifest["side_files"][name] = file_sha256(folder / name)
    del manifest["digest"]
    return _sign_manifest(folder, manifest)


def _sign_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    manifest["digest"] = content_digest(manifest)
    write_changed(folder / MANIFEST, canonical_json(manifest).encode())
    return manifest


def data_digest(manifest: dict[str, Any]) -> str:
    """sha256 of everything that a run learns from: the manifest without the preview prompts, and
    without the commit of its dataset, which may move while the images stay.

    In a cache without them it is the manifest's own ``digest``.
    """
    fields = {name: value for name, value in manifest.items() if name not in UNLEARNED}
    fields["side_files"] = {n: sha for n, sha in fields["side_files"].items() if n != PROMPTS}
    return content_digest(fields)


def read_side_file(folder: Path, manifest: dict[str, Any], name: str, remedy: str) -> bytes:
    """The bytes of a side file, checked against the digest in the manifest.

    Raises:
        CacheError: missing or damaged; ends with ``remedy``.
    """
    path = folder / name
    if name not in manifest["side_files"]:
        raise CacheError(f"{path}: the manifest names no such file; {remedy}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    if hashlib.sha256(data).hexdigest() != manifest["side_files"][name]:
        raise CacheError(f"{path}: damaged, or not the one the manifest names; {remedy}")
    return data


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        CacheError: no cache, an unfinished one, another version, or a damaged manifest.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError:
        raise CacheError(_why_no_manifest(folder)) from None
    try:
        manifest = read_json(data)
        digest = manifest.pop("digest")
        is_intact = content_digest(manifest) == digest
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CacheError(f"{path}: the manifest is damaged (not what encode wrote)") from None
    if manifest.get("format") == FORMAT and manifest.get("version") != VERSION and is_intact:
        raise OtherFormat.version(path, manifest.get("version"))
    manifest["digest"] = digest
    if not is_intact or canonical_json(manifest).encode() != data:
        raise CacheError(f"{path}: the manifest is damaged (its digest differs)")
    if manifest.get("format") != FORMAT:
        raise OtherFormat(f"{path}: not a shardtune cache (format {manifest.get('format')!r})")
    if problem := misfit(manifest, FIELDS, MORE_FIELDS) or _misfit_of_shards(manifest):
        raise CacheError(f"{path}: not a manifest that shardtune writes: {problem}")
    return dict(manifest)


def _misfit_of_shards(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the list of shards; None if nothing is."""
    shards = manifest["shards"]
    if len({shard["name"] for shard in shards}) < len(shards):
        return "it names a shard twice"
    if manifest["num_samples"] != sum(shard["count"] for shard in shards):
        return "its num_samples is not that of its shards"
    latents = manifest.get("latents", {})
    if manifest["num_samples"] and "channels" not in latents:
        return "its latents are not what encode writes"
    linear = manifest.get("latent_rgb", {})
    quadratic, channels = linear.get("quadratic", {}), latents.get("channels", 0)
    for fitted, name, num in (
        (linear, "weight", channels),
        (quadratic, "weight", channels),
        (quadratic, "products", channels * (channels + 1) // 2),
    ):
        if (rows := len(fitted.get(name, ()))) and rows != num:
            return "its latent_rgb is of other channels"
    return None


def _why_no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such cache folder"
    if any(folder.glob("*.index")) or any(folder.glob("*.partial")):
        return f"{folder}: the cache is unfinished; run the same encode again, it goes on there"
    return f"{folder}: not a cache (no {MANIFEST}); make one with `python cli.py encode`"
