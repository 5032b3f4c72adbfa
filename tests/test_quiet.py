"""``--quiet``: warnings and errors alone."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import commands


def quietly(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(commands, [*map(str, words), "--quiet"])
    return result.exit_code, result.output


@pytest.mark.slow
def test_the_stages_print_nothing(images: Path, base: Path, tmp_path: Path) -> None:
    cache, run, out = (tmp_path / name for name in ("cache", "run", "out"))
    given = ["--base", base, "--device", "cpu", "--out"]
    size = ["--resolution", 64, "--bucket-step", 16]
    assert quietly("encode", images, *given, cache, *size) == (0, "")
    train = ["train", cache, *given, run, "--steps", 2]
    assert quietly(*train) == (0, "")
    draw = ["--num-steps", 1, "--size", 64, "--prompt", "a red circle"]
    assert quietly("generate", *given, out, "--lora", run, *draw) == (0, "")
    assert sorted(path.name for path in out.glob("0*.png")) == ["000000.png"]
    assert quietly("export", run, "--out", tmp_path / "x.safetensors", "--base", base) == (0, "")
    bad = ["--steps", 9, "--lr", 1e6, "--max-skipped", 3, "--max-grad-norm", 0]
    code, output = quietly("train", cache, *given, tmp_path / "bad", *bad)
    assert code == 1 and "left out, its" in output, "warnings are printed"
    code, output = quietly(*train)
    assert code == 2 and output.startswith("Error: ") and "--overwrite" in output


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    code, output = quietly(
        "train", tmp_path / "no", "--base", "miniature", "--out", "x", "--steps", 2
    )
    assert code == 2 and "no such folder" in output
