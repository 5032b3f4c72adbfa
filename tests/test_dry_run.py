"""What ``--dry-run`` says is what an encode then does; and too little disk is said at once."""

import re
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

import cli
import precompute.encoders
import runtime.files
from tests.folders import put, put_list

SETTINGS = ["--resolution", 64, "--bucket-step", 16, "--batch-size", 4, "--threads", 1]
Usage = namedtuple("Usage", ["total", "used", "free"])


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def dataset(images: Path, tmp_path: Path) -> Path:
    """14 good images, one of them with a long caption; a wide one, a small one, two bad ones."""
    folder = Path(shutil.copytree(images, tmp_path / "set"))
    (folder / "000.txt").write_text("a b c d e " * 40)
    for name, size in (("wide", (400, 80)), ("small", (40, 30))):
        Image.new("RGB", size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    put(folder / "broken.png", "broken", b"\x89PNG\r\n\x1a\n and no more")
    put(folder / "lonely.png")
    return folder


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(precompute.encoders.Encoders, "latents", property(refuse))
    monkeypatch.setattr(precompute.encoders.Encoders, "text", property(refuse))


def buckets(output: str) -> list[list[str]]:
    return [line.split()[:2] for line in output.splitlines() if re.match(r" +\d+x\d+ ", line)]


def printed_bytes(output: str) -> float:
    match = re.search(r"  about ([\d.]+) ([MG])B", output)
    assert match, output
    return float(match[1]) * {"M": 1e6, "G": 1e9}[match[2]]


def bytes_in(tar: Path) -> int:
    """The bytes of its members with their headers; a tar of any size ends in up to 10 kB of
    zeros."""
    with tarfile.open(tar) as archive:
        return sum(512 + -(-member.size // 512) * 512 for member in archive)


@pytest.mark.usefixtures("no_models")
def test_it_says_all_and_writes_nothing(dataset: Path, base: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, output = run(
        "encode", dataset, "--base", base, "--out", tmp_path / "out", *SETTINGS, "--dry-run"
    )
    assert code == 0, output
    assert sorted(tmp_path.rglob("*")) == before
    lines = output.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: 16 images, 2 rejected: 16 new"
    assert sum(int(count) for _, count in buckets(output)) == 16
    assert re.search(r"  cropped: [\d.]+% of the area on average; most: .*wide.png 20%", output)
    assert re.search(r"  upscaled: \d+ smaller than their bucket; most: small.png \d\.\d\d", output)
    assert "  cut: 1 captions longer than 77 tokens (75 of the text's); most: 000.png 200" in lines
    assert "  --long-captions 3 would hold them all" in lines
    assert "  rejected: lonely.png: no caption: lonely.txt is missing" in lines
    assert any(line.startswith("  rejected: broken.png: ") for line in lines)
    assert lines[-1] == "nothing was encoded or written (--dry-run)"


VARIED = ["--flip", "--crops", 2, "--long-captions", 2, "--shuffle-tags", 2, "--mean-only"]


@pytest.mark.parametrize("more", [[], VARIED, ["--dtype", "fp32", "--min-size", 50]])
def test_what_it_says_comes_true(
    dataset: Path, base: Path, tmp_path: Path, more: list[Any]
) -> None:
    (dataset / "broken.png").unlink()
    with Image.open(dataset / "001.png") as image:
        Image.new("L", image.size, 255).save(dataset / "001.mask.png")
    Image.new("L", (64, 20), 255).save(dataset / "002.mask.png")
    command = ["encode", dataset, "--base", base, "--out", tmp_path / "out", *SETTINGS, *more]
    code, output = run(*command, "--dry-run")
    assert code == 0, output
    assert "  rejected: 002.png: its mask: of 64 x 20 pixels, where its" in output
    code, done = run(*command)
    assert code == 0, done
    assert buckets(output) == buckets(done)
    num_bytes = sum(map(bytes_in, (tmp_path / "out").glob("*.tar")))
    assert printed_bytes(output) == pytest.approx(num_bytes, rel=0.05)
    for pattern in (r"^  ([\d,]+) variants of them", r"^  ([\d,]+) images an epoch"):
        both = [re.findall(pattern, text, re.MULTILINE) for text in (output, done)]
        assert both[0] == both[1], pattern
    cut = re.findall(r"  cut: (\d+) captions", output)
    assert cut == re.findall(r"  (\d+) captions cut at", done) and len(cut) == 1


def test_repeats_are_counted(dataset: Path, base: Path, tmp_path: Path) -> None:
    put_list(dataset, {"file_name": "000.png", "text": "x", "repeats": 7, "mask": "000.png"})
    code, output = run(
        *("encode", dataset, "--base", base, "--out", tmp_path / "out", *SETTINGS, "--dry-run"),
        *("--max-rejected", 1),
    )
    assert code == 0, output
    assert "  7 images an epoch, with repeats" in output.splitlines()
    assert "  1 mask images" in output.splitlines()


def test_small_images_are_refused_by_size(dataset: Path, base: Path, tmp_path: Path) -> None:
    code, output = run(
        *("encode", dataset, "--base", base, "--out", tmp_path / "out", *SETTINGS),
        *("--min-size", 31, "--dry-run"),
    )
    assert code == 0, output
    why = "40 x 30 pixels: its shorter side has fewer than --min-size 31"
    assert f"small.png: {why}" in output
    assert "15 images, 3 rejected" in output


@pytest.mark.usefixtures("no_models")
def test_too_little_disk_is_said_before_the_first_image(
    dataset: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(10**9, 10**9 - 10**5, 10**5)
    monkeypatch.setattr(runtime.files.shutil, "disk_usage", lambda _: usage)
    out = tmp_path / "out"
    code, output = run("encode", dataset, "--base", base, "--out", out, *SETTINGS)
    assert code == 1, output
    (line,) = (line for line in output.splitlines() if line.startswith("Error: "))
    assert re.search(
        r"out: needs about 0\.\d\d MB of disk, where 0\.10 MB are free: make room", line
    )
    assert not [*out.glob("*.tar")]
    code, reported = run("encode", dataset, "--base", base, "--out", out, *SETTINGS, "--dry-run")
    assert (
        code == 1
        and "0.10 MB are free on the disk of" in reported
        and line in reported.splitlines()
    )


def test_images_without_room_for_crops_or_much_too_small_are_told_of(
    base: Path, tmp_path: Path
) -> None:
    for name, size in (("room", (80, 64)), ("exact", (64, 64)), ("tiny", (20, 20))):
        put(tmp_path / "set" / f"{name}.png", name)
        Image.linear_gradient("L").resize(size).save(tmp_path / "set" / f"{name}.png")
    words = ["encode", tmp_path / "set", "--base", base, "--out", tmp_path / "out", *SETTINGS]
    words += ["--square", "--crops", 3, "--flip"]
    label = "10 variants of them (3 random crops, mirrored too); not 18, as not every image has "
    for more in (["--dry-run"], []):
        code, output = run(*words, *more)
        assert code == 0, output
        assert f"  {label}room for 3 crops\n" in output
        (text,) = [line for line in output.splitlines() if "enlarged" in line and "Warn" in line]
        assert "1 of 3 images are enlarged more than 2 times (most: tiny.png, 3.2 times)" in text
        assert text.endswith("--min-size 32 leaves them out")


def test_crops_of_which_none_has_room_are_told_of(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / "set" / f"{name}.png", name)
        Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "set" / f"{name}.png")
    words = ["encode", tmp_path / "set", "--base", base, "--out", tmp_path / "out", *SETTINGS]
    code, output = run(*words, "--crops", 4, "--dry-run")
    assert code == 0, output
    assert "  2 variants of them (4 random crops); not 8, as not every image has room" in output
