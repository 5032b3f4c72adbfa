"""Each recipe in ``examples/`` is whole: a dry run takes it, and one of them trains."""

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import commands
from runtime.options import read_recipe
from train.config import TrainConfig

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))


OPTIONS = [field.name for field in fields(TrainConfig)]
QUICK = ("lora-12gb",)  # the rest is marked slow


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in QUICK))
        for p in EXAMPLES
    ],
)
def test_a_dry_run_takes_it(recipe: Path, cache: Path, base: Path, tmp_path: Path) -> None:
    caches = [str(cache)]
    if recipe.stem == "prior-preservation":
        caches = [f"{cache},repeats=10", f"{cache},weight=0.5"]
    flags = ["--base", str(base), "--out", str(tmp_path / "run"), "--config", str(recipe)]
    run = CliRunner().invoke(commands, ["train", *caches, *flags, "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "estimated peak memory" in run.output
    assert "python cli.py train" in recipe.read_text(), "it says how it is used"


def test_they_are_those_that_were_promised() -> None:
    assert [path.stem for path in EXAMPLES] == [
        "full-24gb",
        "full-80gb",
        "lora-12gb",
        "lora-24gb",
        "prior-preservation",
        "several-gpus",
        "v-prediction",
    ]


def test_a_recipe_with_a_key_that_is_no_option_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("learning-rate = 1e-4\n")
    with pytest.raises(ValueError, match=r"unknown option learning-rate \(known: .*, lr, "):
        read_recipe(recipe, OPTIONS)
    assert set(read_recipe(EXAMPLES[0], OPTIONS)) <= set(OPTIONS)


@pytest.mark.slow
def test_prior_preservation_trains(cache: Path, base: Path, tmp_path: Path) -> None:
    (recipe,) = (path for path in EXAMPLES if path.stem == "prior-preservation")
    caches = [f"{cache},repeats=2", f"{cache},weight=0.5"]
    flags = ["--base", str(base), "--out", str(tmp_path / "run"), "--config", str(recipe)]
    more = ["--steps", "4", "--device", "cpu"]
    run = CliRunner().invoke(commands, ["train", *caches, *flags, *more])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
