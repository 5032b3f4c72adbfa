"""Each option of the sources through the command line, as a user types it."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from PIL import Image

import cli
from shards.reader import Cache
from tests.folders import image_bytes, put
from tests.test_fidelity import samples_of
from tests.test_tars import as_downloaded, put_tar

SMALL = ["--base", "miniature", "--resolution", 64, "--bucket-step", 16, "--threads", 1]
OPTIONS: list[Any] = [
    *("--missing-caption", "a thing", "--caption-prefix", "sks,", "--caption-lines"),
    *("--shuffle-tags", 2, "--keep-tokens", 1, "--min-size", 32, "--repeat-folders"),
    *("--mask-from-alpha", "--flip", "--crops", 2, "--long-captions", 2, "--dtype", "fp32"),
]


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def lay_out(folder: Path) -> None:
    put(folder / "3_cat" / "a.png", "k, a, b, c\nplain", image_bytes(side=80))
    put(folder / "tiny.png", "tiny", image_bytes(side=31))
    put(folder / "none.png", None, image_bytes(side=64))
    Image.new("L", (64, 64), 99).save(folder / "none.mask.png")
    image = Image.new("RGB", (64, 80), "red")
    image.putalpha(Image.linear_gradient("L").resize((64, 80)))
    image.save(folder / "clear.png")
    (folder / "clear.caption").write_text("clear")
    members = as_downloaded(0, None) | as_downloaded(70, "of a tar")
    members["000000070.json"] = json.dumps({"weight": 0.25, "repeats": 2}).encode()
    put_tar(folder / "2_more" / "p.tar", members)


def test_all_options_at_once(tmp_path: Path) -> None:
    lay_out(tmp_path / "set")
    out = tmp_path / "out"
    code, output = run("encode", tmp_path / "set", "--out", out, *SMALL, *OPTIONS)
    assert code == 0, output
    samples = samples_of(out)
    captions = {path: sample.captions for path, sample in samples.items()}
    first, second, plain = captions.pop("3_cat/a.png")
    assert {len(first), len(second)} == {len("sks, k, a, b, c")} and first != second
    assert first.startswith("sks, k, ") and plain == "sks, plain"
    assert captions == {
        "none.png": ("sks, a thing",),
        "clear.png": ("sks, clear",),
        "2_more/p.tar/000000070.jpg": ("sks, of a tar",),
    }
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {row["path"] for row in rejected} == {"tiny.png", "2_more/p.tar/000000000.jpg"}
    assert all("fewer than --min-size 32" in row["reason"] for row in rejected)
    assert {path for path, sample in samples.items() if "mask" in sample.tensors} == {
        "none.png",
        "clear.png",
    }
    assert (samples["none.png"].tensors["mask"] * 255).round().unique().tolist() == [99]
    assert samples["2_more/p.tar/000000070.jpg"].weight == 0.25
    repeats = {group.repeats for group in Cache(out).groups()}
    assert repeats == {1, 3, 4}, "of the tar's folder, and of its own row, 2 each"
    for words in ("images an epoch, with repeats", "with a mask", "variants of them"):
        assert words in output


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.png", "a", image_bytes())
    for options, words in (
        (["--long-captions", 0], "--long-captions must be from 1 to 32, not 0"),
        (["--crops", -1], "--crops must be at least 0, not -1"),
        (["--keep-tokens", 1], "--keep-tokens goes with --shuffle-tags"),
    ):
        code, output = run("encode", tmp_path / "set", "--out", tmp_path / "out", *SMALL, *options)
        assert code == 2
        assert [line for line in output.splitlines() if line.startswith("Error:")] == [
            f"Error: {words}"
        ]
