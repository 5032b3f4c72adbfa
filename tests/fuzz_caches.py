"""Caches that someone forged, with every digest right."""

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash

from precompute.plan.reuse import read_existing
from runtime.files import canonical_json, content_digest
from shards.format import CacheError
from shards.index import MAGIC, RECORD_DTYPE, Index
from shards.inspect import describe_contents, read_contents
from shards.manifest import MANIFEST, PROMPTS, UNCONDITIONAL, read_manifest
from shards.previews import PreviewFile
from shards.reader import Cache
from shards.verify import drop_damaged, verify
from tests.made import POOLED, TOKENS, WIDTH, epoch_of, made_sample, reader_of, write_cache
from tests.mutations import Try, ending, forge, json_text, with_written


def fuzz_cache(work: Path, base: Path) -> Try:
    """Manifests, indexes, samples and side files; then all that reads a cache."""
    complete, folder = make_cache(work / "whole"), work / "cache"

    def try_one(rng: random.Random) -> str:
        shutil.copytree(complete, folder)
        try:
            forge_cache(folder, rng)
            return use(folder)
        finally:
            shutil.rmtree(folder)

    return try_one


def make_cache(folder: Path) -> Path:
    """Two shards; every kind of side file; all fields that encode writes."""
    torch.manual_seed(0)
    samples = [made_sample(f"{n}.png", mask=n == 1, captions=1 + n % 2) for n in range(3)]
    write_cache(folder, [*samples, made_sample("9.png", bucket=(48, 80), variants=2)])
    rows = [{"key": "0" * 20, "path": "x.png", "reason": "the file is empty"}]
    (folder / "rejected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tensors = {
        f"{kind}{name}": torch.zeros(1, *shape)
        for kind in ("", "negative.")
        for name, shape in (("prompt_embeds", (TOKENS, WIDTH)), ("pooled_prompt_embeds", (POOLED,)))
    }
    stored = PreviewFile(prompts=[{"text": "a"}], made_with={}, tensors=tensors)
    (folder / PROMPTS).write_bytes(stored.to_bytes())
    metadata = {
        "latent_rgb": {"weight": [[0.1] * 3] * 4, "bias": [0.0] * 3},
        "latents": {"channels": 4, "mean": [0.0] * 4, "std": [1.0] * 4},
        "sanity": {"drawings": {"psnr": 30.0}, "pictures": [{"psnr": 30.0}]},
    }
    for path in sorted(folder.glob("*.index")):
        forge_index(path, _add_fields)
    sign_all(folder, lambda manifest: manifest.update(metadata))
    return folder


def _add_fields(header: dict[str, Any], records: Any) -> None:
    keys = [record["key"].decode() for record in records]
    header |= {
        "members": [[key, "a", "", "b", "c", 1.0] for key in keys]
        + [["f" * 20, "", "", "", "", 0]],
        "rejected": [["x.png", "the file is empty"]],
        "made_with": [{"batch_size": 4}],
        "sums": {"gram": [[1.0] * 5] * 5, "cross": [[1.0] * 3] * 5},
        "num_cut_captions": 0,
        "recipe": {
            **{name: {} for name in ("preprocessing", "vae", "text_encoder", "text_encoder_2")},
            "storage": {"dtype": "fp32", "mean_only": False},
        },
    }


def forge_index(path: Path, change: Callable[[dict[str, Any], Any], Any]) -> None:
    """Change header and records of an index, and sign it."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data, len(MAGIC))
    start = len(MAGIC) + 8
    header = json.loads(data[start : start + length])
    stop = start + length + header["count"] * RECORD_DTYPE.itemsize
    records = np.frombuffer(data[start + length : stop], RECORD_DTYPE).copy()
    header = change(header, records) or header
    text = json_text(header).encode()
    text += b" " * (-(start + len(text)) % 64)
    body = MAGIC + struct.pack("<Q", len(text)) + text + records.tobytes() + data[stop:-32]
    path.write_bytes(body + hashlib.sha256(body).digest())


def sign_all(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, after it names all files as they are now, and sign it."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["digest"]
    for shard in manifest["shards"]:
        data = (folder / f"{shard['name']}.index").read_bytes()
        shard["index_sha256"] = hashlib.sha256(data).hexdigest()
    names = ("rejected.jsonl", PROMPTS, UNCONDITIONAL)
    manifest["side_files"] = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names
    }
    manifest = change(manifest) or manifest
    try:
        if isinstance(manifest, dict):
            manifest["digest"] = content_digest(manifest)
        text = with_written(canonical_json(manifest))
        (folder / MANIFEST).write_bytes(text.encode())
    except UnicodeEncodeError:
        (folder / MANIFEST).write_text(json_text(manifest, indent=2))


def forge_cache(folder: Path, rng: random.Random) -> None:
    """One forgery of a random kind."""
    kind = rng.choice(["manifest", "manifest", "header", "header", "records", "sample", "side"])
    path = rng.choice(sorted(folder.glob("*.index")))
    if kind == "header":
        forge_index(path, lambda header, _: forge(rng, header))
    elif kind == "records":
        forge_index(path, lambda _, records: _forge_record(records, rng))
    elif kind == "sample":
        _forge_sample(folder, path, rng)
    elif kind == "side":
        _forge_side_file(folder, rng)
    sign_all(folder, lambda first: forge(rng, first) if kind == "manifest" else None)


def _forge_record(records: Any, rng: random.Random) -> None:
    row, name = rng.randrange(len(records)), rng.choice(RECORD_DTYPE.names or ())
    width = RECORD_DTYPE.fields[name][0].itemsize  # type: ignore[index]
    value = rng.choice(
        [rng.randbytes(width), bytes(width), b"\xff" * width, b"\1" + bytes(width - 1)]
    )
    raw = records.view(np.uint8).reshape(len(records), -1)
    start = RECORD_DTYPE.fields[name][1]  # type: ignore[index]
    raw[row, start : start + width] = np.frombuffer(value, np.uint8)


def _forge_sample(folder: Path, path: Path, rng: random.Random) -> None:
    """A sample's JSON becomes another of the same length, or garbage."""
    index, tar = Index(path), path.with_suffix(".tar")
    record, data = index.record(0), bytearray(tar.read_bytes())
    place = slice(record.json_offset, record.json_offset + record.json_size)
    metadata = forge(rng, json.loads(data[place]))
    text = json_text(metadata).encode() if rng.random() < 0.8 else rng.randbytes(40)
    text = text[: record.json_size].ljust(record.json_size)
    data[place] = text
    tar.write_bytes(data)
    raw = bytearray(path.read_bytes())
    at = index._first_digest + 8 * record.first_digest
    raw[at : at + 8] = struct.pack("<Q", xxhash.xxh3_64_intdigest(text))
    path.write_bytes(raw)
    digest = hashlib.sha256(data).hexdigest()
    forge_index(path, lambda header, _: header.update(tar_sha256=digest))


def _forge_side_file(folder: Path, rng: random.Random) -> None:
    name = rng.choice(["rejected.jsonl", PROMPTS, UNCONDITIONAL])
    path = folder / name
    data = path.read_bytes()
    if name == "rejected.jsonl":
        row = forge(rng, json.loads(data))
        path.write_text(json_text(row) + "\n")
        return
    tensors = safetensors.torch.load(data)
    victim = rng.choice(sorted(tensors))
    shapes = [(), (0,), (1,), (2, 3), (1, 2, 3), (1, TOKENS, WIDTH + 1), (1, POOLED, 1)]
    dtype = rng.choice([torch.float32, torch.int64, torch.bool, torch.float64])
    tensors[victim] = torch.zeros(rng.choice(shapes), dtype=dtype)
    if rng.random() < 0.2:
        tensors[rng.choice(["x", "../x"])] = tensors.pop(victim)
    path.write_bytes(rng.choice([safetensors.torch.save(tensors), data[:9], b"", data[:-1]]))


def use(folder: Path) -> str:
    """How all that reads a cache ends, one after the other."""
    readers = (_verify, _learn, _inspect, _previews, read_existing)
    endings = {ending(lambda read=read: read(folder), folder, CacheError) for read in readers}
    return "refused" if "refused" in endings else "read"


def _verify(folder: Path) -> None:
    manifest = read_manifest(folder)
    faults = [*chain.from_iterable(verify(folder, manifest))]
    if faults:
        work = folder.with_name("repair")
        shutil.copytree(folder, work)
        try:
            drop_damaged(work, manifest, faults)
        finally:
            shutil.rmtree(work)


def _learn(folder: Path) -> None:
    cache = Cache(folder)
    if cache.groups():
        reader = reader_of([cache], 1, masks=True, caption_dropout=0.5)
        for batch, _ in zip(epoch_of(reader), range(9), strict=False):
            assert batch.latents.shape[0] == 1


def _inspect(folder: Path) -> None:
    cache = Cache(folder)
    *_, contents = read_contents(cache)
    describe_contents(cache, contents)


def _previews(folder: Path) -> None:
    ending(lambda: PreviewFile.from_bytes((folder / PROMPTS).read_bytes()), None)
