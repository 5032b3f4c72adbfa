"""Equal images: counted, dropped by a plain rule, and never more removed than was asked for."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import precompute.encode
from cli import commands
from precompute.plan.dry_run import dry_run
from precompute.report import describe, summarize, warn_of_rejected
from shards.format import sample_key
from shards.manifest import read_manifest
from tests.encodes import contents, counted, encode, settings_of


@pytest.fixture
def dataset(images: Path, tmp_path: Path) -> Path:
    """Six images, of which 001 is there three times and 002 twice; one copy has another caption."""
    folder = tmp_path / "set"
    for number in range(6):
        put(folder, f"{number:03}", images / f"{number:03}.png", f"number {number}")
    put(folder, "copies/a", images / "001.png", "number 1")
    put(folder, "copies/b", images / "001.png", "another caption")
    put(folder, "other", images / "002.png", "number 2")
    return folder


def put(folder: Path, name: str, image: Path, caption: str) -> None:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, path)
    path.with_suffix(".txt").write_text(caption)


def rejections(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {row["path"]: row["reason"] for row in map(json.loads, lines)}


def first_of(*paths: str) -> str:
    return min(paths, key=sample_key)


ONES, TWOS = ("001.png", "copies/a.png", "copies/b.png"), ("002.png", "other.png")


def test_equal_images_are_kept_and_counted(dataset: Path, base: Path, tmp_path: Path) -> None:
    settings = settings_of(dataset, base, tmp_path / "cache")
    lines = "\n".join(dry_run(settings))
    assert "equal: 3 images equal another one byte for byte: kept; --dedupe drop drops" in lines
    report = encode(dataset, base, tmp_path / "cache")
    words = "3 equal another one byte for byte; --dedupe drop drops them"
    assert words in "\n".join(describe(report, settings)) and report.num_samples == 9
    before = contents(tmp_path / "cache")
    report = encode(dataset, base, tmp_path / "cache")
    assert words in "\n".join(describe(report, settings)) and report.changes.are_none
    assert contents(tmp_path / "cache") == before
    result = CliRunner().invoke(commands, ["inspect", str(tmp_path / "cache")])
    assert "equal images: 3 equal another one byte for byte" in result.output


def test_all_but_the_first_by_key_are_dropped(dataset: Path, base: Path, tmp_path: Path) -> None:
    """The cache is as one of a dataset without them, and a rerun changes nothing."""
    out = tmp_path / "cache"
    settings = settings_of(dataset, base, out, dedupe="drop", max_rejected=0.0)
    lines = "\n".join(dry_run(settings))
    assert "6 images, 3 rejected" in lines and "byte for byte: dropped" in lines
    with counted() as count:
        report = encode(dataset, base, out, dedupe="drop", max_rejected=0.0)
    assert count == (6, 6) and report.num_samples == 6 and report.num_equal == 0
    assert "3 equal to others and dropped" in "\n".join(describe(report, settings))
    assert warn_of_rejected(report) == "" and report.rejected_share == 0
    first, second = first_of(*ONES), first_of(*TWOS)
    expected = {path: first for path in ONES if path != first} | {
        path: second for path in TWOS if path != second
    }
    for path, reason in rejections(out).items():
        other = " (with other captions)" if "copies/b.png" in (path, first) and path in ONES else ""
        assert reason == f"equal image; kept is {expected.pop(path)}{other}"
    assert not expected
    before = contents(out)
    assert encode(dataset, base, out, dedupe="drop", max_rejected=0.0).changes.are_none
    assert contents(out) == before
    alone = shutil.copytree(dataset, tmp_path / "alone")
    for path in rejections(out):
        (alone / path).unlink()
        (alone / path).with_suffix(".txt").unlink()
    encode(alone, base, tmp_path / "other")
    others = contents(tmp_path / "other")
    assert {
        n: data for n, data in before.items() if n not in ("manifest.json", "rejected.jsonl")
    } == {n: data for n, data in others.items() if n not in ("manifest.json", "rejected.jsonl")}
    result = CliRunner().invoke(commands, ["inspect", str(out)])
    assert "equal image" in result.output and "byte for byte" not in result.output


def test_a_cache_loses_no_more_than_it_may(dataset: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    encode(dataset, base, out)
    before = contents(out)
    with pytest.raises(ValueError, match=r"3 of its 9 .*would be rejected .*--max-removed 0.34;"):
        encode(dataset, base, out, dedupe="drop", max_removed=0.1)
    assert contents(out) == before
    with counted() as count:
        report = encode(dataset, base, out, dedupe="drop", max_removed=0.34)
    assert summarize(report.changes) == "3 removed, 6 unchanged" and count == (0, 0)
    report = encode(dataset, base, out)
    assert summarize(report.changes) == "3 new, 6 unchanged" and report.num_equal == 3


@pytest.mark.parametrize("dedupe", ["keep", "drop"])
def test_what_is_validated_on_is_not_trained_on(
    dedupe: str, dataset: Path, base: Path, tmp_path: Path
) -> None:
    """The copies in val stay, and those in train go, whatever their keys."""
    root, out = tmp_path / "split", tmp_path / "cache"
    shutil.copytree(dataset, root / "train")
    put(root / "val", "held out", dataset / "001.png", "number 1")
    put(root / "val", "again", dataset / "001.png", "number 1")
    put(root / "val", "alone", dataset / "003.png", "number 3")
    (root / "train" / "003.png").unlink()
    settings = settings_of(root, base, out, dedupe=dedupe)
    lines = "\n".join(dry_run(settings))
    assert "equal: 4 images equal another one byte for byte, 3 of them one of val" in lines
    train, val = precompute.encode.encode(settings)
    shown = CliRunner().invoke(commands, ["inspect", str(out)]).output
    if dedupe == "keep":
        assert train.num_across == 3 and train.num_equal == 3 and val.num_equal == 1
        assert "3 equal an image of val; --dedupe drop" in "\n".join(describe(train, settings))
        assert "3 images of train equal one of val byte for byte" in shown
        return
    assert train.num_across == 0 and train.num_samples == 4 and val.num_samples == 2
    kept = first_of("held out.png", "again.png")
    assert {rejections(out / "train")[path].partition(" (")[0] for path in ONES} == {
        f"equal image; kept is val: {kept}"
    }
    assert "of val byte for byte" not in shown
    assert read_manifest(out / "train")["num_samples"] == 4


def test_a_mask_that_differs_is_named(images: Path, base: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a", "b"):
        put(root, name, images / "000.png", "one")
    with Image.open(images / "000.png") as image:
        Image.new("L", image.size, 255).save(root / "b.mask.png")
    encode(root, base, tmp_path / "cache", dedupe="drop")
    ((path, reason),) = rejections(tmp_path / "cache").items()
    assert {path, first_of("a.png", "b.png")} == {"a.png", "b.png"}
    assert reason.endswith("(with other mask)")
