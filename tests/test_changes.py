"""A rerun encodes what is new or changed, and nothing else; it says what, and why."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from encodes import (
    LONG_AGO,
    again,
    assert_as_fresh,
    copy_old,
    counted,
    encode,
    make_old,
    samples_of,
    shards_of,
    stamps,
)
from PIL import Image

import precompute.encode_samples
import precompute.encoders
from precompute.dataset.records import Blob
from precompute.plan.reuse import PREPROCESSING
from precompute.report import summarize
from shards.index import Index
from shards.reader import Shard

pytestmark = pytest.mark.filterwarnings("ignore:.*settings changed")


def test_a_policy_of_captions_encodes_texts_alone_and_each_as_if_written(
    work: Path, base: Path
) -> None:
    for path in (work / "data").glob("*.txt"):
        path.write_text(f"{{a|an old}} thing ||| {', '.join(path.stem)}, b, c, d")
    make_old(work / "data")
    again(work, base)
    for policy in ({"shuffle_tags": 2}, {"shuffle_tags": 2, "tag_dropout": 0.4, "wildcards": 2}):
        with counted() as count:
            report = again(work, base, **policy)
        assert count == (0, report.num_captions), "no image is encoded"
    samples = samples_of(work / "cache")
    texts = {path: captions for path, captions in captions_of(work / "cache").items()}
    assert all(len(set(captions)) == 4 for captions in texts.values())
    for path in (work / "data").glob("*.txt"):
        path.unlink()
    lines = [json.dumps({"file_name": path, "text": [*text]}) for path, text in texts.items()]
    (work / "data" / "captions.jsonl").write_text("\n".join(lines))
    encode(work / "data", base, work / "written")
    assert samples_of(work / "written") == samples
    with counted() as count:
        again(work, base)
    assert count == (0, 0), "the same texts, wherever they come from"


def captions_of(folder: Path) -> dict[str, list[str]]:
    results = {}
    for path in sorted(folder.glob("*.index")):
        shard = Shard(folder, path.stem, Index(path).sha256)
        for row in range(len(shard.index)):
            metadata = shard.metadata(row)
            results[metadata["path"]] = [*metadata["captions"]]
    return results


def test_nothing_changed_nothing_is_touched(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again(work, base)  # the copy's own stamps are remembered
    before = stamps(work)

    def refuse(*_: Any) -> None:
        raise AssertionError("a model is loaded, or a file opened")

    for owner, name in (
        (precompute.encoders, "LatentEncoder"),
        (precompute.encoders, "load_text"),
        (Blob, "read"),
        (Path, "read_text"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    report = again(work, base)
    assert stamps(work) == before
    assert summarize(report.changes) == "14 unchanged"


def test_another_dataset_is_read_though_its_files_look_alike(work: Path, base: Path) -> None:
    """Files that were unpacked have times that tell nothing."""
    again(work, base)
    other = copy_old(work / "data", work / "other")
    text = other / "000.txt"
    text.write_text(text.read_text()[::-1])
    os.utime(text, (LONG_AGO, LONG_AGO))
    report = encode(other, base, work / "cache")
    assert summarize(report.changes) == "1 caption changed, 13 unchanged"


def test_rehash_sees_what_size_and_time_hide(work: Path, base: Path) -> None:
    again(work, base)
    text = work / "data" / "000.txt"
    text.write_text(text.read_text()[::-1])
    os.utime(text, (LONG_AGO, LONG_AGO))
    assert summarize(again(work, base).changes) == "14 unchanged"
    assert summarize(again(work, base, rehash=True).changes) == "1 caption changed, 13 unchanged"
    assert_as_fresh(work, base)


def test_a_new_time_alone_changes_no_shard(work: Path, base: Path) -> None:
    before = stamps(work / "cache")
    make_old(work / "data", LONG_AGO + 1)
    assert summarize(again(work, base).changes) == "14 unchanged"
    after = stamps(work / "cache")
    assert before == after


def change_caption(work: Path, name: str = "003") -> dict[str, Any]:
    (work / "data" / f"{name}.txt").write_text("an edited caption")
    return {}


def change_image(work: Path) -> dict[str, Any]:
    path = work / "data" / "003.png"
    with Image.open(path) as image:
        size = image.size
    Image.effect_noise(size, 80).convert("RGB").save(path)
    return {}


def change_both(work: Path) -> dict[str, Any]:
    return change_caption(work) | change_image(work)


def change_weights(work: Path, base: Path, part: str) -> Path:
    """A copy of the base with another tensor in one of its models."""
    other = work / "base"
    shutil.copytree(base, other)
    (file,) = (other / part).glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name] = weights[name] * 1.01
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    return other


def assert_encodes(
    work: Path, base: Path, expected: tuple[int, int], message: str, **more: Any
) -> None:
    """A rerun encodes so many images and captions, says why, and ends as it should."""
    with counted() as count:
        report = again(work, base, **more)
    assert count == expected
    assert summarize(report.changes) == message
    assert_as_fresh(work, base, **more)


@pytest.mark.parametrize(
    ("change", "expected", "message"),
    [
        (change_caption, (0, 1), "1 caption changed, 13 unchanged"),
        (change_image, (1, 0), "1 image changed, 13 unchanged"),
        (change_both, (1, 1), "1 caption changed, 1 image changed, 13 unchanged"),
    ],
)
def test_a_changed_file_is_encoded_alone(
    work: Path, base: Path, change: Any, expected: tuple[int, int], message: str
) -> None:
    before = stamps(work / "cache")
    change(work)
    assert_encodes(work, base, expected, message)
    after = stamps(work / "cache")
    assert sum(before[n] == after[n] for n in before if n.endswith((".tar", ".index"))) == 2 * 5


@pytest.mark.parametrize(
    ("settings", "expected", "message"),
    [
        ({"resolution": 80}, (14, 0), f"{PREPROCESSING} changed for 14"),
        ({"squash": True}, (9, 0), f"{PREPROCESSING} changed for 9, 5 unchanged"),
        ({"dtype": "fp32"}, (14, 14), "dtype changed for 14"),
        ({"mean_only": True}, (14, 0), "mean-only changed for 14"),
    ],
)
def test_a_changed_setting_encodes_what_it_touches(
    work: Path, base: Path, settings: dict[str, Any], expected: tuple[int, int], message: str
) -> None:
    with pytest.warns(UserWarning, match="settings changed, so what they touch"):
        assert_encodes(work, base, expected, message, **settings)


def test_other_batches_and_threads_leave_what_is_there(work: Path, base: Path) -> None:
    """They change last bits alone: it is said, and noted in the index; unasked they are as ever."""

    def made_with() -> list[list[dict[str, Any]]]:
        indexes = map(Index, sorted((work / "cache").glob("*.index")))
        return [index.header["made_with"] for index in indexes]

    change_both(work)
    with pytest.warns(UserWarning, match="--batch-size 1: the cache was encoded with 4"):
        assert summarize(again(work, base, batch_size=1).changes).endswith("13 unchanged")
    four, first = ({"batch_size": size, "device": "cpu", "threads": 1} for size in (4, 1))
    assert sorted(map(len, made_with())) == [1, 1, 1, 1, 1, 2]
    assert [first, four] in made_with() and [four] in made_with()
    change_caption(work, "001")
    again(work, base, batch_size=None, threads=None)
    assert all(result in ([four], [first, four]) for result in made_with())


def test_another_vae_leaves_the_text(work: Path, base: Path) -> None:
    other = change_weights(work, base, "vae")
    assert_encodes(work, base, (14, 0), "VAE changed for 14", vae=str(other))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_another_text_encoder_leaves_the_latents(work: Path, base: Path, part: str) -> None:
    other = change_weights(work, base, part)
    assert_encodes(work, other, (0, 14), "text encoder changed for 14")


def test_the_same_weights_elsewhere_are_the_same(work: Path, base: Path) -> None:
    """Only the manifest tells that the VAE was named; nothing is encoded."""
    shutil.copytree(base / "vae", work / "vae")
    assert_encodes(work, base, (0, 0), "14 unchanged", vae=str(work / "vae"))


# Who joins and who leaves.


def test_who_joins_fills_the_last_shard_and_who_leaves_moves_nobody(work: Path, base: Path) -> None:
    data, cache = work / "data", work / "cache"
    before, files = shards_of(cache), stamps(cache)
    for end in ("png", "txt"):
        (data / f"000.{end}").rename(data / f"renamed.{end}")  # 64 x 64 pixels
        (data / f"001.{end}").unlink()
        (data / f"004.{end}").unlink()
    left = {"000.png", "001.png", "004.png"}
    stay = {name: paths - left for name, paths in before.items()}
    with counted() as count:
        report = again(work, base)
    assert count == (0, 0)
    assert summarize(report.changes) == "1 renamed, 2 removed, 11 unchanged"
    last = max(name for name, paths in stay.items() if name.startswith("64x64") and paths)
    if len(stay[last]) < 3:  # --shard-size
        stay[last] = stay[last] | {"renamed.png"}
    else:
        stay["64x64-000002"] = {"renamed.png"}
    assert shards_of(cache) == {name: paths for name, paths in stay.items() if paths}
    changed = {name for name in before if before[name] != stay[name]}
    for name in before.keys() - changed:
        assert stamps(cache)[f"{name}.tar"] == files[f"{name}.tar"]
    assert_as_fresh(work, base)


def test_an_image_of_other_bytes_but_the_same_time_is_told_how_to_be_read(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of images with several variants fewer are decoded ahead: each takes as much."""
    again(work, base)
    image = work / "data" / "000.png"
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    os.utime(image, (LONG_AGO, LONG_AGO))
    ahead, real = [], precompute.encode_samples.read_ahead

    def read_ahead(function: Any, items: Any, threads: int, most: int) -> Any:
        ahead.append(most)
        return real(function, items, threads, most)

    monkeypatch.setattr(precompute.encode_samples, "read_ahead", read_ahead)
    monkeypatch.setattr(precompute.encode_samples, "num_cores", lambda: 16)
    (rejected,) = again(work, base, flip=True, resolution=80).rejected
    assert (rejected.path, "encode again with --rehash" in rejected.reason) == ("000.png", True)
    assert set(ahead) == {(2 * 4 + 16) // 2}  # batches of 4, 16 threads, 2 variants
