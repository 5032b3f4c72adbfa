"""A path that is misspelled, or of another thing, is refused in a line that says what it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from runs import run

from cli import commands
from infer.settings import GenerateSettings, LoraUse
from runtime.path_kinds import BASE, CACHE, IMAGES, RUN, WEIGHTS, kind_of

ROOT = Path(__file__).parent.parent
# Runs a command that is refused, and prints which heavy modules were imported for it.
REFUSED = """
import json, runpy, sys
try:
    runpy.run_path("cli.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 2, end.code
heavy = ("torch", "diffusers", "transformers", "numpy", "PIL")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """One of each, as small as its kind can be recognized."""
    for name in (
        *("images/a.jpg", "images/a.txt"),
        *("cache/train/64x64-000000.index", "cache/train/manifest.json"),
        *("run/metrics.jsonl", "run/config.json", "run/checkpoints/x"),
        *("base/model_index.json", "lora.safetensors", "prompts.txt"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def test_each_thing_is_recognized_by_its_names(things: Path) -> None:
    kinds = {
        "images": IMAGES,
        "cache": CACHE,
        "run": RUN,
        "base": BASE,
        "lora.safetensors": WEIGHTS,
    }
    assert {name: kind_of(things / name) for name in kinds} == kinds
    assert kind_of(things / "prompts.txt") is None and kind_of(things / "none") is None
    # A LoRA's folder may have images that it drew; a checkpoint of --full looks like a base.
    (things / "lora").mkdir()
    for name in ("pytorch_lora_weights.safetensors", "image_0.png"):
        (things / "lora" / name).write_text("")
    settings = {"base": "miniature", "out": things, "prompt": "a"}
    GenerateSettings(lora=(LoraUse(things / "lora"),), **settings).check_inputs()
    (things / "run/checkpoints/checkpoint-1/unet").mkdir(parents=True)
    (things / "run/checkpoints/checkpoint-1/unet/config.json").write_text("{}")
    GenerateSettings(unet=things / "run/checkpoints/checkpoint-1", **settings).check_inputs()
    # A dataset may have a manifest, tars or a list of its own.
    for name in ("manifest.json", "train/manifest.json", "config.json", "a.tar", "a.index"):
        path = things / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert kind_of(things / "images") == IMAGES


def test_what_encode_and_train_write_is_recognized(
    cache: Path, split_cache: Path, base: Path, tmp_path: Path
) -> None:
    run(cache, base, tmp_path / "run", steps=1)
    kinds = {cache: CACHE, split_cache: CACHE, base: BASE, tmp_path / "run": RUN}
    assert {path: kind_of(path) for path in kinds} == kinds


CASES = {
    "encode {0}/cache --base miniature --out x": "a cache of shards, as encode makes it; it is "
    "encoded already",
    "encode {0}/run --base miniature --out x": "a run of train; give the folder with the images",
    "encode {0}/base --base miniature --out x": "an SDXL base; give it as --base",
    "encode {0}/image --base miniature --out x": "no such folder; did you mean {0}/images?",
    "encode {0}/images --base minature --out x": "no such folder; did you mean miniature?",
    "encode {0}/images --base {0}/run --out x": "a run of train; give it as --lora or --unet",
    "train {0}/images --base miniature --out x --steps 1": "a folder of images; encode them first",
    "train {0}/run --base miniature --out x --steps 1": "--resume --out {0}/run goes on with it",
    "train {0}/cache --val {0}/images --base miniature --out x --steps 1": "a folder of images",
    "train {0}/cache --base {0}/cache --out x --steps 1": "give as --base the SDXL model that",
    "train {0}/lora.safetensors --base miniature --out x --steps 1": "--init-lora starts from",
    "generate --base miniature --lora {0}/cache --prompt a --out x": "give the run that was",
    "generate --base miniature --lora {0}/lora.safetensor --prompt a --out x": "did you mean "
    "{0}/lora.safetensors?",
    "generate --base miniature --lora {0}/base --prompt a --out x": "give it as --base, or "
    "as --unet",
    "generate --base miniature --prompts {0}/prompt.txt --out x": "no such file; did you mean "
    "{0}/prompts.txt?",
    "tune {0}/cache --base miniature --out x": "a cache of shards",
    "verify {0}/images": "a folder of images; give the cache that encode made",
    "inspect {0}/run": "a run of train; give the cache that encode made",
    "prompts {0}/cache {0}/prompt.txt --base miniature": "did you mean {0}/prompts.txt?",
    "encode {0}/prompts.txt --base miniature --out x": "a file; give its folder",
    "generate --base miniature --prompts a_cat --out x": "no such folder; --prompt TEXT is a",
    "export {0}/cache --out x.safetensors": "a cache of shards, as encode makes it; give the run",
    "export {0}/lora.safetensor --out x.safetensors": "did you mean {0}/lora.safetensors?",
    "convert kohya {0}/prompts.tx --out x": "no such file; did you mean {0}/prompts.txt?",
}


@pytest.mark.parametrize("command", CASES)
def test_what_is_in_anothers_place_is_named(things: Path, command: str) -> None:
    result = CliRunner().invoke(commands, command.format(things).split())
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ") and CASES[command].format(things) in line


def test_nothing_heavy_is_imported_to_refuse_a_path(things: Path) -> None:
    for command in [*CASES][:1] + [*CASES][8:9] + [*CASES][11:12]:
        arguments = command.format(things).split()
        done = subprocess.run(
            [sys.executable, "-c", REFUSED, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == []


TYPED_WRONGLY = {
    "train {0}/cache --base b --out x --resolution 512": "It is an option of tune and encode.",
    "generate --base b --out x --prompt a --flip": "It is an option of encode.",
    "train {0}/cache --base b --out x --text-encoder-lr 1e-5": "Of kohya's options: the text "
    "encoders are not trained: their outputs are cached.",
    "train {0}/cache --base b --out x --train-data-dir d": "here it is encode DATASET",
    "train {0}/cache --base b --out x -lr 1e-4": "Options begin with two dashes, as --lr.",
    "train {0}/cache --base b --out x --stepz 1": "'--steps'",
    "train {0}/cache --base b --out x --lr 1,5e-4": "A decimal is written with a point.",
    "train {0}/cache --out x": "Missing option '--base'. SDXL base: a diffusers",
    "encode --base b --out x": "Missing argument 'DATASET'. Encode a folder of captioned",
    "help train": "type --help, alone or after a command",
}


@pytest.mark.parametrize("command", TYPED_WRONGLY)
def test_what_is_typed_wrongly_is_answered_with_what_to_type(things: Path, command: str) -> None:
    result = CliRunner().invoke(commands, command.format(things).split())
    assert result.exit_code == 2, result.output
    assert TYPED_WRONGLY[command] in result.output.splitlines()[-1], result.output


def test_a_folder_without_captions_is_told_what_takes_it(base: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images/a.png")
    command = f"encode {tmp_path}/images --base {base} --out {tmp_path}/c --resolution 64"
    result = CliRunner().invoke(commands, [*command.split(), "--bucket-step", "16"])
    assert result.exit_code == 2
    assert "1 rejected: no caption: X.txt is missing: a.png" in result.output
    assert "--missing-caption takes images without" in result.output.splitlines()[-1]
