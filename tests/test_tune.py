"""``tune``: the three commands that it stands for, chosen by data and base, and going on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import cli
import cli_tune
from cli import commands
from cli_tune import RECIPES, TuneSettings, check_command, tune
from sdxl.lora.names import KOHYA
from tools.miniature.data import write_sample_set

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_sample_set(folder, num=12)
    return folder


def plan(dataset: Path, out: Path, **more: Any) -> list[list[str]]:
    """The commands that a tune would run."""
    typed: list[list[str]] = []
    settings = TuneSettings(dataset=dataset, base="miniature", out=out, **more)
    tune(settings, typed.append, partial(check_command, cli.commands))
    return typed


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_it_runs_three_commands_that_can_be_typed(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    encode, train, generate = plan(dataset, out, train_options=("--seed", "7"))
    printed = capsys.readouterr().out
    for arguments in (encode, train, generate):
        assert f"$ python cli.py {' '.join(arguments)}" in printed
        command = commands.commands[arguments[0]]
        command.make_context(arguments[0], list(arguments[1:]))  # it takes these options
    assert value(encode, "--resolution") == "64"  # the miniature's own
    assert "--val-share" not in encode  # of twelve images each is worth more as one to learn from
    assert value(train, "--steps") == str(RECIPES["style"].least_steps)
    assert value(train, "--lr") == f"{1e-4 * 320 / 48:.2g}"
    assert value(train, "--seed") == "7" and "--resume" not in train
    rows = [json.loads(line) for line in (out / "previews.jsonl").read_text().splitlines()]
    lines = (dataset / "captions.jsonl").read_text().splitlines()
    captions = {json.loads(line)["text"] for line in lines}
    assert len(rows) == 3 and {row["prompt"] for row in rows} <= captions
    assert value(encode, "--preview-prompts") == value(generate, "--prompts")


def test_more_images_are_more_steps_and_some_are_held_out(dataset: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    write_sample_set(many, num=300)
    encode, train, _ = plan(many, tmp_path / "out", dry_run=False)
    assert float(value(encode, "--val-share")) == cli_tune.VAL_SHARE
    num = 290  # of 300, ten by their keys are held out
    assert int(value(train, "--steps")) == num * RECIPES["style"].passes // 4
    for goal, recipe in RECIPES.items():
        _, train, generate = plan(many, tmp_path / goal, goal=goal)
        assert int(value(train, "--steps")) == recipe.steps(num)
        assert ("--full" in train, "--unet" in generate) == (goal == "full",) * 2


def test_what_cannot_be_is_refused_in_a_line(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies in the dataset"):
        plan(dataset, dataset / "out")
    with pytest.raises(ValueError, match="one folder of images; 'more' is a second one"):
        plan(dataset, tmp_path / "out", train_options=("more",))
    bare = tmp_path / "bare"
    shutil.copytree(dataset, bare, ignore=shutil.ignore_patterns("*.txt", "*.jsonl"))
    with pytest.raises(ValueError, match=r"no image has a caption.* --caption TEXT"):
        plan(bare, tmp_path / "out")
    encode, *_ = plan(bare, tmp_path / "out", caption="photo of ohwx")
    assert value(encode, "--missing-caption") == "photo of ohwx"
    missing = CliRunner().invoke(
        commands, ["tune", str(tmp_path / "none"), "--base", "miniature", "--out", str(tmp_path)]
    )
    assert missing.exit_code == 2 and "no such folder" in missing.output


def test_the_options_of_all_commands_are_checked_before_the_first(
    dataset: Path, tmp_path: Path
) -> None:
    for given, message in (
        (("--optimizer", "adamx"), "adamx"),
        (("--rnak", "8"), "--rnak"),
        (("--full",), "is of a LoRA"),
        (("--huber-delta", "0.2"), "--huber-delta does nothing without"),
    ):
        for dry_run in (False, True):
            with pytest.raises((ValueError, click.UsageError), match=message):
                plan(dataset, tmp_path / "out", train_options=given, dry_run=dry_run)
    with pytest.raises(ValueError, match="--fit takes a size"):
        plan(dataset, tmp_path / "out", fit="12")
    assert not (tmp_path / "out").exists()


def test_what_the_user_gives_takes_the_place_of_what_excludes_it(
    dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, train, _ = plan(dataset, out, train_options=("--epochs", "5"))
    assert "--steps" not in train and value(train, "--batch-size") == "4"
    _, train, _ = plan(dataset, out, train_options=("--init-lora", "x"))
    assert not {"--rank", "--alpha", "--targets"} & set(train)
    (out / "run").mkdir(parents=True)
    assert "--resume" in plan(dataset, out)[1]
    assert "--resume" not in plan(dataset, out, train_options=("--overwrite",))[1]


def test_a_cache_stays_split_or_whole_whatever_joins_and_leaves(
    dataset: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    write_sample_set(many, num=300)
    for name, images, is_split in (("one", many, False), ("split", dataset, True)):
        cache = tmp_path / name / "cache"
        (cache / "train" if is_split else cache).mkdir(parents=True)
        encode, train, _ = plan(images, tmp_path / name)
        held_out = is_split and "--val-share" in encode  # of twelve images chance decides
        assert ("--val-share" in encode, "--eval-every" in train) == (held_out,) * 2
        assert is_split or not held_out


def test_images_are_counted_without_their_repeats(tmp_path: Path) -> None:
    few = tmp_path / "few"
    write_sample_set(few, num=10)
    rows = [json.loads(line) for line in (few / "captions.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "repeats": 30}) + "\n" for row in rows)
    (few / "captions.jsonl").write_text(text)
    encode, train, _ = plan(few, tmp_path / "out")
    assert "--val-share" not in encode
    assert int(value(train, "--steps")) == RECIPES["style"].steps(300)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_what_ends_it_ends_its_command(number: int) -> None:
    """The command ends by itself as it was told; a handler of before is put back."""
    before = signal.getsignal(number)
    code = "import signal, time; signal.signal(2, lambda *_: exit(7)); print(flush=True); "
    code += "time.sleep(60)"
    with cli_tune._Relay() as relay:
        relay.child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert relay.child.stdout is not None
        relay.child.stdout.readline()
        os.kill(os.getpid(), number)
        assert relay.wait() == (7 if number == signal.SIGINT else -signal.SIGTERM)
        relay.child.stdout.close()
    assert signal.getsignal(number) == before


def test_a_run_that_cannot_go_on_says_how(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "run").mkdir(parents=True)

    def run(arguments: list[str]) -> None:
        if arguments[0] == "train":
            raise SystemExit(2)

    settings = TuneSettings(dataset=dataset, base="miniature", out=tmp_path / "out")
    with pytest.raises(SystemExit):
        tune(settings, run, partial(check_command, cli.commands))
    assert "-- --allow-changed-data" in capsys.readouterr().err


def test_a_dry_run_prints_and_does_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(dataset, tmp_path / "out", dry_run=True) == []
    assert capsys.readouterr().out.count("$ python cli.py") == 3
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_ends_it_with_its_exit_code() -> None:
    with pytest.raises(SystemExit) as end:
        cli_tune.run_as_process(["encode", "nowhere", "--base", "none", "--out", "x"])
    assert end.value.code == 2


@pytest.mark.slow
def test_one_command_and_once_more(dataset: Path, tmp_path: Path) -> None:
    """Stopped by a signal in its training, it goes on; then nothing is left to do."""
    out = tmp_path / "out"
    command = [sys.executable, "cli.py", "tune", str(dataset), "--base", "miniature"]
    command += ["--out", str(out), "--steps", "300", "--device", "cpu", "--", "--eval-every", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    rows = out / "run" / "metrics.jsonl"
    end = time.monotonic() + 200
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 143
    assert not (out / "images").exists()
    stopped = max(json.loads(line)["step"] for line in rows.read_text().splitlines())
    assert 0 < stopped < 300
    command[command.index("300")] = str(stopped + 5)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    steps = [json.loads(line)["step"] for line in rows.read_text().splitlines()]
    assert [step for step in dict.fromkeys(steps) if step] == list(range(1, stopped + 6))
    images = sorted((out / "images").glob("0*.png"))
    assert len(images) == 3 and (out / "run" / "pytorch_lora_weights.safetensors").exists()
    before = {path: path.stat().st_mtime_ns for path in images}
    again = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True, text=True
    )
    assert {path: path.stat().st_mtime_ns for path in images} == before
    assert "it is finished" in again.stdout and "0 images drawn" in again.stdout


def test_the_end_says_where_the_files_go(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> None:
        if arguments[0] == "train":
            (tmp_path / "out" / "run").mkdir(parents=True)
            (tmp_path / "out" / "run" / KOHYA).touch()

    tune(TuneSettings(dataset=dataset, base="miniature", out=tmp_path / "out"), run, lambda _: None)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"{tmp_path / 'out' / 'run' / KOHYA}: the same LoRA, for ComfyUI")
    assert "ComfyUI/models/loras" in last
