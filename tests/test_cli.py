"""Bad input on the command line: one clear line, exit code 2, no traceback."""

import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made import config_of

import cli
from runtime.options import read_recipe
from sdxl.lora.names import KOHYA, LORA
from train.report import describe_result


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def refused(*arguments: Any) -> str:
    """The one line of an error; usage hints of click's own stand before it."""
    code, output = run(*arguments)
    assert code == 2, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, output
    return lines[0]


def test_datasets(base: Path, tmp_path: Path) -> None:
    out = ["--base", base, "--out", tmp_path / "out"]
    assert "nowhere: no such folder" in refused("encode", tmp_path / "nowhere", *out)
    (tmp_path / "empty").mkdir()
    assert "empty: no images in it" in refused("encode", tmp_path / "empty", *out)
    assert "Missing argument" in refused("encode", *out)


def test_encode_settings(base: Path, images: Path, tmp_path: Path) -> None:
    common = ["encode", images, "--base", base, "--out", tmp_path / "out"]
    assert "--square and --squash exclude" in refused(*common, "--square", "--squash")
    assert "--batch-size must be at least 1, not 0" in refused(*common, "--batch-size", 0)
    assert "--val-share must be in 0..1" in refused(*common, "--val-share", "1.5")
    assert "multiple of bucket-step 64, not 104" in refused(*common, "--resolution", 104)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    common[-1] = tmp_path / "full"
    assert "not empty and no cache (holds thesis.txt)" in refused(*common, "--resolution", 64)


def test_bases(base: Path, images: Path, tmp_path: Path) -> None:
    def encode(folder: Path) -> str:
        return refused("encode", images, "--base", folder, "--out", tmp_path / "out")

    assert "nowhere: no such folder" in encode(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no SDXL base: it has no vae/ (found: nothing)" in encode(tmp_path / "empty")
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    config = copy / "text_encoder" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("CLIPTextModel", "T5EncoderModel"))
    assert "no SDXL: a T5EncoderModel, where SDXL has CLIPTextModel" in encode(copy)
    config.write_text(text[:20])
    assert "config.json: not valid JSON" in encode(copy)
    config.write_text(text)
    (copy / "tokenizer" / "vocab.json").unlink()
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer: no tokenizer can be read from it" in encode(copy)
    tokens = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(tokens))
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert "tokenizer: 2 tokens, where text_encoder has 519" in encode(copy)


def test_a_unet_of_stable_diffusion_1(cache: Path, base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text().replace('"text_time"', "null"))
    line = refused("train", cache, "--base", copy, "--out", tmp_path / "run", "--steps", 1)
    assert "no SDXL: its addition_embed_type is None (SDXL: text_time)" in line


def test_caches(cache: Path, base: Path, tmp_path: Path) -> None:
    def train(folder: Path) -> str:
        return refused("train", folder, "--base", base, "--out", tmp_path / "run", "--steps", 2)

    assert "nowhere: no such folder" in train(tmp_path / "nowhere")
    assert "an SDXL base; give it as --base, and here a cache" in train(base)
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    for tar in copy.glob("*.tar"):
        with open(tar, "r+b") as file:
            file.truncate(tar.stat().st_size // 2)
    line = train(copy)
    assert ".tar: truncated or replaced: " in line and "bytes where" in line
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_train_settings(cache: Path, base: Path, tmp_path: Path) -> None:
    common = ["train", cache, "--base", base, "--out", tmp_path / "run"]
    assert "either --steps or --epochs" in refused(*common)
    assert "--steps must be at least 1, not 0" in refused(*common, "--steps", 0)
    assert "--lr must be above 0" in refused(*common, "--steps", 1, "--lr", 0)
    assert "whole numbers with commas" in refused(*common, "--checkpoint-at", "6,x")
    assert "--device tpu: torch finds no such device" in refused(
        *common, "--steps", 1, "--device", "tpu"
    )


def test_recipes(cache: Path, base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    common = ["train", cache, "--base", base, "--out", tmp_path / "run", "--config", recipe]
    assert "recipe.toml: cannot be read" in refused(*common)
    recipe.write_text("steps = 1\nlearning_rate = 1.0\n")
    line = refused(*common)
    assert "unknown option learning-rate (known: " in line and "weight-decay" in line
    recipe.write_text("steps = 1.5\n")
    assert "recipe.toml: steps: '1.5' is not a valid integer" in refused(*common)
    recipe.write_text('full = "yes"\n')
    assert "full cannot be 'yes'" in refused(*common)
    recipe.write_text("steps = [")
    assert "recipe.toml: not valid TOML" in refused(*common)


def test_recipes_that_editors_and_accidents_leave(cache: Path, base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    common = ["train", cache, "--base", base, "--out", tmp_path / "run", "--config", recipe]
    recipe.write_bytes(b"\xef\xbb\xbfsteps = 2\n")  # a byte order mark
    assert read_recipe(recipe, ["steps"]) == {"steps": 2}
    for bad, words in {
        "batch-size = 1\nbatch_size = 2": "batch-size is there twice",
        "batchsize = 1": "unknown option batchsize (did you mean batch-size",
        "a = " + "[" * 100_000: "nested too deep",
        "steps" + ".a" * 100_000 + " = 1": "has more than 1000 dots",
        "steps = " + "9" * 400: "steps: the number is out of range",
        "steps = 0x" + "f" * 5000: "steps: the number is out of range",
        "steps = " + "9" * 5000: "not valid TOML",
        "lr = " + "9" * 400: "lr: the number is out of range",
        "lr = nan": "lr: 'nan' is out of range",
        "lr = inf": "lr: 'inf' is out of range",
        "lr = 1979-05-27": "lr cannot be",
        "lr = [1.0]": "lr: takes one value",
        "full = [true]": "full: takes one value",
        "checkpoint-at = [600, '']": "checkpoint_at: '' is not whole numbers",
        "checkpoint-at = [[600]]": "checkpoint_at cannot be this list",
        'out = "a\\u0000b"': "out: 'a\\x00b' is not a path",
        'out = ""': "out: '' is not a path",
        "[train]\nlr = 1.0": "unknown option train",
        f"caches = ['a,weight=0.{'9' * 9000}x']": "recipe.toml: caches: a,weight=0.999",
        "x" * 9000 + " = 1": f"unknown option {'x' * 60}... (9,000 characters)",
    }.items():
        recipe.write_text(f"{bad}\n" if "steps" in bad else f"steps = 1\n{bad}\n")
        line = refused(*common)
        assert "recipe.toml: " in line and words in line and len(line) < 2500, (bad[:80], line)
    recipe.write_bytes(b"steps = 1\n#" + b" " * 1_000_000)
    assert "larger than 1,000,000 bytes" in refused(*common)
    recipe.write_bytes("steps = 1\n".encode("utf-16"))
    assert "recipe.toml: not UTF-8" in refused(*common)


def settings_of(command: str, *arguments: Any, recipe: Path | None = None) -> Any:
    kind = cli.commands.commands[command]
    assert isinstance(kind, cli.StageCommand)
    with kind.make_context(command, [str(argument) for argument in arguments]) as context:
        return kind.make_settings(context, context.params, recipe)


def test_home_is_known_where_no_shell_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a recipe, behind ``--out=`` and before ``,weight=``; and only in paths."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'caches = ["~/a", "~/b,weight=2"]\nout = "~/runs/one"\nbase = "~/base"\nval = "~/val"\n'
        'init-lora = "~/lora"\nsteps = 1\nwandb-project = "~/x"\n'
    )
    config = settings_of("train", recipe=recipe)
    home = tmp_path
    assert [str(use) for use in config.caches] == [f"{home}/a", f"{home}/b,weight=2"]
    assert (config.out, config.val, config.init_lora) == (
        home / "runs/one",
        home / "val",
        home / "lora",
    )
    assert (config.base, config.wandb_project) == (f"{home}/base", "~/x")
    more = ["--prompt=~", "--lora=~/x,0.5", "--unet=~/u", "--vae=~/v", "--tokenizers=~/t"]
    drawn = settings_of("generate", "--base=~/base", "--out=~/drawn", *more)
    assert (drawn.prompt, str(drawn.lora[0]), drawn.vae) == ("~", f"{home}/x,0.5", f"{home}/v")
    assert (drawn.out, drawn.unet, drawn.tokenizers) == (home / "drawn", home / "u", home / "t")
    encoded = settings_of("encode", "~/data", "--base=~/base", "--out=~/cache")
    assert (encoded.dataset, encoded.base) == (home / "data", f"{home}/base")
    assert f"{home}/nowhere: no such" in refused("inspect", "~/nowhere")


def numeric_fields(settings: Any) -> list[str]:
    hints = typing.get_type_hints(settings)
    is_numeric = {n: {int, float} & {h, *typing.get_args(h)} for n, h in hints.items()}
    return [name for name in hints if is_numeric[name]]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("encode", ["data", "--base", "b", "--out", "o"]),
        ("train", ["cache", "--base", "b", "--out", "o"]),
        ("generate", ["--base", "b", "--out", "o", "--prompt", "p"]),
        ("export", ["weights", "--out", "o.safetensors"]),
    ],
)
def test_no_option_takes_a_number_that_is_none(command: str, arguments: list[str]) -> None:
    stage: Any = cli.commands.commands[command]
    names = numeric_fields(stage.settings)
    assert len(names) > (0 if command == "export" else 5)
    for name in names:
        flag = "--" + name.replace("_", "-")
        for value in ("nan", "inf", "-inf", "1e400", "9" * 400, "-" + "9" * 5000, "", "1,,2"):
            line = refused(command, *arguments, flag, value)
            assert f"'{flag}'" in line and len(line) < 300, (flag, value, line)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["c,weight=nan"], "weight must be a finite number"),
        (["c,weight=" + "9" * 400], "weight must be a finite number"),
        (["c,repeats=" + "9" * 400], "repeats must be from 1 to 1000000"),
        (["c,repeats=" + "9" * 5000], "is no number"),
        (["c", "--eval-every", "9" * 400], "--eval-every"),
        (["c", "--eval-every", "9" * 400 + "ep"], "--eval-every"),
        (["c", "--eval-every", "." + "0" * 300 + "1ep"], "--eval-every"),
        (["c", "--checkpoint-at", "600,,680"], "--checkpoint-at"),
        (["c", "--gpus", "9" * 5000], "--gpus"),
        (["c", "--steps", 2**40], "--steps must be at most"),
    ],
)
def test_numbers_inside_other_options(arguments: list[Any], words: str) -> None:
    assert words in refused("train", *arguments, "--base", "b", "--out", "o")


def test_flags_win_over_the_recipe(cache: Path, base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'base = "{base}"\nsteps = 3\nrank = 2\nlr = 2e-4\ncheckpoint-at = [1]\ntargets = "all"\n'
        'precision = "fp32"\ngradient_checkpointing = true\n'
    )
    out = tmp_path / "run"
    code, output = run("train", cache, "--out", out, "--config", recipe, "--steps", 2)
    assert code == 0, output
    config = json.loads((out / "config.json").read_text())
    names = ("steps", "rank", "lr", "checkpoint_at", "targets", "gradient_checkpointing", "alpha")
    assert [config[name] for name in names] == [2, 2, 2e-4, [1], "all", True, 8.0]
    assert (out / "checkpoints" / "checkpoint-1").is_dir()
    assert f"next: python cli.py generate --base {base} --lora {out}" in output
    assert f"{out / LORA}: the LoRA, for generate and diffusers" in output
    assert f"{out / 'report.html'}: curves, previews, settings and checkpoints" in output
    page = (out / "report.html").read_text()
    assert "finished: all of its 2 steps" in page and str(tmp_path) not in page
    assert f"{out / KOHYA}: the same LoRA, for ComfyUI, A1111, InvokeAI and sd-scripts" in output
    assert "(ComfyUI: ComfyUI/models/loras; A1111, Forge: models/Lora; InvokeAI: its " in output


def test_what_train_says_of_a_dora_and_of_a_unet(tmp_path: Path) -> None:
    config = config_of("base", out=tmp_path, adapter="dora")
    message = "\n".join(describe_result(config, tmp_path / LORA))
    assert KOHYA not in message and f"export {tmp_path} --base base --merge --out" in message
    config = config_of("base", out=tmp_path, full=True)
    message = "\n".join(describe_result(config, tmp_path / "unet"))
    assert (
        "generate --base base --unet" in message
        and f"export {tmp_path} --base base --out" in message
    )


def test_prompts(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na cat --w 64\na dog --x 3\n")
    common = ["generate", "--base", base, "--out", tmp_path / "out"]
    line = refused(*common, "--prompts", file)
    assert "prompts.txt, line 3: unknown option --x (known: --n --w --h --d --s --l --ss" in line
    assert "either --prompts FILE or --prompt TEXT" in refused(*common)
    assert "--size must be N or WxH" in refused(*common, "--prompt", "a cat", "--size", "65")
    assert "no such folder" in refused(*common, "--prompt", "a cat", "--lora", tmp_path / "x")


def test_generate_counts_and_takes_several_loras(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other GPUs would be sent this very command line, which is not generate's.
    monkeypatch.setattr("runtime.workers.num_processes", lambda *_: 8)
    common = ["generate", "--base", base, "--out", tmp_path / "out", "--size", 64]
    common += ["--prompt", "a cat", "--num-steps", 1]
    code, output = run(*common)
    assert code == 0, output
    assert "1 image drawn (" in output and "0 kept, in" in output and "images/s" in output
    code, output = run(*common)
    assert code == 0 and "0 images drawn, 1 kept, in" in output
    two = ["--lora", f"{tmp_path}/a,0.5", "--lora", f"{tmp_path}/b,x"]
    assert "b,x: the weight after the comma, 'x', is no number" in refused(*common, *two)
    assert "--gpus takes a number from 1 on, or auto" in refused(*common, "--gpus", 0)
    assert "--crop must be LEFT,TOP in pixels" in refused(*common, "--crop", "8")


def test_debug_shows_the_traceback(tmp_path: Path, base: Path) -> None:
    arguments = ["encode", tmp_path / "no", "--base", base, "--out", tmp_path / "out", "--debug"]
    result = CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])
    assert isinstance(result.exception, ValueError)


def test_one_bad_image_never_costs_the_rest(images: Path, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "bad.png").write_bytes((data / "000.png").read_bytes()[:60])
    (data / "bad.txt").write_text("half an image")
    (data / "000.txt").unlink()
    settings = ["--out", tmp_path / "out", "--resolution", 64, "--bucket-step", 16]
    code, output = run("encode", data, "--base", base, *settings)
    assert code == 0, output
    assert "13 images in" in output and "2 rejected, see" in output
    code, output = run("verify", tmp_path / "out")
    assert code == 0 and "13 samples in" in output
