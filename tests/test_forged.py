"""Caches that someone forged, with every digest right: our own error, whatever is claimed.

``python -m tests.test_forged COUNT SEED`` tries more by hand.
"""

import copy
import hashlib
import json
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash

from precompute.planning.held import read_held
from runtime.files import canonical_json, content_digest
from shards import CacheError
from shards.index import MAGIC, RECORD_DTYPE, Index
from shards.inspect import describe_contents, read_contents
from shards.manifest import MANIFEST, PROMPTS, UNCONDITIONAL, read_manifest
from shards.previews import PreviewFile
from shards.reader import Cache
from shards.repair import drop_damaged
from shards.verify import verify
from tests.made import POOLED, TOKENS, WIDTH, epoch_of, made_sample, reader_of, write_cache

DEEP: Any = "deep"  # becomes an array in an array, 100,000 times
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**63, 10**400, 1.5, 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "9" * 5000, DEEP),
    *([], [1], [[1]], {}, {"a": 1}, [None] * 3, "fp16", [2**20, 2**20]),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make_cache(tmp_path_factory.mktemp("forged") / "whole")


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
    held = PreviewFile(prompts=[{"text": "a"}], made_with={}, tensors=tensors)
    (folder / PROMPTS).write_bytes(held.to_bytes())
    about = {
        "latent_rgb": {"weight": [[0.1] * 3] * 4, "bias": [0.0] * 3},
        "latents": {"channels": 4, "mean": [0.0] * 4, "std": [1.0] * 4},
        "sanity": {"drawings": {"psnr": 30.0}, "pictures": [{"psnr": 30.0}]},
    }
    for path in sorted(folder.glob("*.index")):
        forge_index(path, _add_about)
    sign_all(folder, lambda manifest: manifest.update(about))
    return folder


def _add_about(header: dict[str, Any], records: Any) -> None:
    keys = [one["key"].decode() for one in records]
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


def text_of(value: Any, **options: Any) -> str:
    """JSON, with what is deep; that of a manifest is canonical as far as it can be."""
    text = json.dumps(value, sort_keys=True, **options)
    return text.replace('"deep"', "[" * 100_000 + "]" * 100_000)


def forge_index(path: Path, change: Callable[[dict[str, Any], Any], Any]) -> None:
    """Change header and records of an index, and sign it."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data, len(MAGIC))
    start = len(MAGIC) + 8
    header = json.loads(data[start : start + length])
    stop = start + length + header["count"] * RECORD_DTYPE.itemsize
    records = np.frombuffer(data[start + length : stop], RECORD_DTYPE).copy()
    header = change(header, records) or header
    text = text_of(header).encode()
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
        text = canonical_json(manifest).replace('"deep"', "[" * 100_000 + "]" * 100_000)
        (folder / MANIFEST).write_bytes(text.encode())
    except UnicodeEncodeError:
        (folder / MANIFEST).write_text(text_of(manifest, indent=2))


def mutate(value: Any, choices: random.Random) -> Any:
    """One place in a JSON value becomes something else, or goes."""
    value = copy.deepcopy(value)
    holder, place = {"": value}, ""
    while choices.random() < 0.85 and isinstance(holder[place], dict | list) and holder[place]:
        holder = holder[place]
        places = [*holder] if isinstance(holder, dict) else [*range(len(holder))]
        place = choices.choice(places)
    kind = choices.random()
    if kind < 0.15 and holder is not value and isinstance(place, str):
        holder[choices.choice(["../x", "\0", "unknown"])] = holder.pop(place)
    elif kind < 0.3 and place != "":
        del holder[place]
    elif kind < 0.4 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[place]))
    else:
        holder[place] = copy.deepcopy(choices.choice(VALUES))
    return holder[""] if place == "" and "" in holder else value


def forge(folder: Path, choices: random.Random) -> str:
    """One forgery of a random kind; its name."""
    kind = choices.choice(["manifest", "manifest", "header", "header", "records", "sample", "side"])
    indexes = sorted(folder.glob("*.index"))
    path = choices.choice(indexes)
    if kind == "header":
        forge_index(path, lambda header, _: mutate(header, choices))
    elif kind == "records":
        forge_index(path, lambda _, records: _forge_record(records, choices))
    elif kind == "sample":
        _forge_sample(folder, path, choices)
    elif kind == "side":
        _forge_side_file(folder, choices)
    sign_all(folder, lambda one: mutate(one, choices) if kind == "manifest" else None)
    return kind


def _forge_record(records: Any, choices: random.Random) -> None:
    row, name = choices.randrange(len(records)), choices.choice(RECORD_DTYPE.names or ())
    width = RECORD_DTYPE.fields[name][0].itemsize  # type: ignore[index]
    value = choices.choice(
        [choices.randbytes(width), bytes(width), b"\xff" * width, b"\1" + bytes(width - 1)]
    )
    raw = records.view(np.uint8).reshape(len(records), -1)
    start = RECORD_DTYPE.fields[name][1]  # type: ignore[index]
    raw[row, start : start + width] = np.frombuffer(value, np.uint8)


def _forge_sample(folder: Path, path: Path, choices: random.Random) -> None:
    """A sample's JSON becomes another of the same length, or garbage."""
    index, tar = Index(path), path.with_suffix(".tar")
    record, data = index.record(0), bytearray(tar.read_bytes())
    place = slice(record.json_offset, record.json_offset + record.json_size)
    about = mutate(json.loads(data[place]), choices)
    text = text_of(about).encode() if choices.random() < 0.8 else choices.randbytes(40)
    text = text[: record.json_size].ljust(record.json_size)
    data[place] = text
    tar.write_bytes(data)
    raw = bytearray(path.read_bytes())
    at = index._first_digest + 8 * record.first_digest
    raw[at : at + 8] = struct.pack("<Q", xxhash.xxh3_64_intdigest(text))
    path.write_bytes(raw)
    digest = hashlib.sha256(data).hexdigest()
    forge_index(path, lambda header, _: header.update(tar_sha256=digest))


def _forge_side_file(folder: Path, choices: random.Random) -> None:
    name = choices.choice(["rejected.jsonl", PROMPTS, UNCONDITIONAL])
    path = folder / name
    data = path.read_bytes()
    if name == "rejected.jsonl":
        row = mutate(json.loads(data), choices)
        path.write_text(text_of(row) + "\n")
        return
    tensors = safetensors.torch.load(data)
    victim = choices.choice(sorted(tensors))
    shapes = [(), (0,), (1,), (2, 3), (1, 2, 3), (1, TOKENS, WIDTH + 1), (1, POOLED, 1)]
    dtype = choices.choice([torch.float32, torch.int64, torch.bool, torch.float64])
    tensors[victim] = torch.zeros(choices.choice(shapes), dtype=dtype)
    if choices.random() < 0.2:
        tensors[choices.choice(["x", "../x"])] = tensors.pop(victim)
    path.write_bytes(choices.choice([safetensors.torch.save(tensors), data[:9], b"", data[:-1]]))


def use(folder: Path) -> None:
    """All that reads a cache, one after the other."""
    for read in (_verify, _learn, _inspect, _previews, read_held):
        try:
            read(folder)
        except CacheError as error:
            assert "\n" not in str(error) and str(error).startswith(str(folder)), str(error)


def _verify(folder: Path) -> None:
    manifest = read_manifest(folder)
    found = [*verify(folder, manifest)]
    if any(found):
        work = folder.with_name("repair")
        shutil.copytree(folder, work)
        try:
            drop_damaged(work, manifest, found)
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
    try:
        PreviewFile.from_bytes((folder / PROMPTS).read_bytes())
    except ValueError as error:
        assert type(error) is ValueError


def fuzz(whole: Path, work: Path, count: int, seed: int) -> dict[str, int]:
    """Forge so many caches and use them; how many of each kind."""
    counts: dict[str, int] = {}
    for number in range(count):
        choices = random.Random(f"{seed} {number}")
        folder = shutil.copytree(whole, work / "cache")
        try:
            kind = forge(folder, choices)
            counts[kind] = counts.get(kind, 0) + 1
            use(folder)
        except BaseException:
            print(f"forgery {number} of seed {seed}", file=sys.stderr)
            raise
        shutil.rmtree(folder)
    return counts


def test_a_forged_cache_raises_our_error_or_none(whole: Path, tmp_path: Path) -> None:
    use(whole)
    assert sum(fuzz(whole, tmp_path, 50, 0).values()) == 50


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["shards"][0].update(name="../../x"),
        lambda one: one["shards"][0].update(count=10**400),
        lambda one: one["shards"][0].update(bucket=[64]),
        lambda one: one.update(side_files={"../x": "0" * 64}),
        lambda one: one["shards"].append(one["shards"][0]),
        lambda one: one.pop("text"),
        lambda one: one.pop("recipe"),
    ],
)
def test_a_forged_manifest_is_named(whole: Path, tmp_path: Path, change: Any) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    sign_all(folder, lambda manifest: change(manifest) and None)
    with pytest.raises(CacheError, match=r"manifest\.json: not a manifest that shardtune writes: "):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offset", 2**63),
        ("size", 2**40),
        ("json_size", 2**31),
        ("first_digest", 2**60),
        ("num_variants", 65535),
        ("num_captions", 0),
        ("weight", np.nan),
        ("tensors", 0),
        ("header_size", 2**31),
        ("key", b"../../x"),
    ],
)
def test_a_forged_record_does_not_lead_out_of_the_file(
    whole: Path, tmp_path: Path, name: str, value: Any
) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")

    def change(_: Any, records: Any) -> None:
        records[name][0] = value

    path = sorted(folder.glob("*.index"))[0]
    forge_index(path, change)
    sign_all(folder, lambda manifest: None)
    with pytest.raises(CacheError, match=r"\.index: not an index that shardtune writes: "):
        for shard in Cache(folder).shards():
            shard.members(0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        print(fuzz(make_cache(root / "whole"), root, int(sys.argv[1]), int(sys.argv[2])))
