"""W&B and TensorBoard as RunLog uses them: what they are given, and that they cost no run."""

import importlib.machinery
import importlib.util
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made import CPU
from PIL import Image
from runs import Died, at_step, config_of, die, rows, run

import train.config
import train.trackers
from pages.run_files import read_run
from precompute.prompts import change_prompts
from runtime.path_kinds import RUN, kind_of
from train.distributed import DistContext
from train.evaluation import Evaluation
from train.log import RunLog
from train.option_values import Every
from train.run_folder import run_entries
from train.trackers import check_trackers

PREVIEWS = [(Image.new("RGB", (8, 4), color), f"a {color} one") for color in ("red", "blue")]


class Recorder:
    """A run of W&B that keeps what it is given."""

    id, step = "abc", 0

    def __init__(self, fail: str = "") -> None:
        self.rows: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        self.fail = fail

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.fail == "log":
            raise ConnectionError("the service is gone\nand more")
        self.rows.append(row | {"step": step})

    def log_artifact(self, artifact: Any) -> None:
        if self.fail == "log_artifact":
            raise ConnectionError("the service is gone\nand more")
        self.artifacts.append(artifact)

    def finish(self, exit_code: int) -> None:
        self.rows.append({"exit_code": exit_code})


Start = Callable[..., tuple[RunLog, Recorder]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    def begin(fail: str = "", **settings: Any) -> tuple[RunLog, Recorder]:
        recorder = Recorder(fail)
        monkeypatch.setattr(train.trackers, "_start_wandb", lambda *_: recorder)
        config = config_of(
            tmp_path, tmp_path, tmp_path, steps=1, targets=None, wandb="offline", **settings
        )
        return RunLog(config, DistContext(CPU), 0, 1, {}), recorder

    return begin


def test_previews_go_to_wandb_one_by_one(start: Start, tmp_path: Path) -> None:
    log, recorder = start()
    log.preview(7, tmp_path / "sheet.png", PREVIEWS)
    log.close(failed=True)
    row, end = recorder.rows
    assert row["trainer/step"] == row["step"] == 7
    assert [image._caption for image in row["previews"]] == ["a red one", "a blue one"]
    assert [image.image.size for image in row["previews"]] == [(8, 4)] * 2
    assert end == {"exit_code": 1}


@pytest.mark.parametrize("fail", ["log", "log_artifact"])
def test_a_tracker_that_fails_costs_itself_alone(start: Start, tmp_path: Path, fail: str) -> None:
    log, recorder = start(fail)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"1")
    with pytest.warns(UserWarning, match="--wandb failed, and the run goes on .*gone$") as warned:
        log.eval(1, Evaluation(0.5, {}, ""))
        log.preview(1, tmp_path, PREVIEWS)
        log.weights(weights)
        log.eval(2, Evaluation(0.25, {}, ""))
    log.close(failed=False)
    assert len(warned) == 1
    assert [row["eval/loss"] for row in rows(tmp_path)] == [0.5, 0.25]
    assert len(recorder.rows) == (0 if fail == "log" else 2), "it is asked no more"


@pytest.mark.parametrize(
    ("choice", "small", "large", "unet"),
    [
        (None, True, False, False),
        ("none", False, False, False),
        ("lora", True, True, False),
        ("full", True, True, True),
    ],
)
def test_which_weights_are_uploaded(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choice: str | None,
    small: bool,
    large: bool,
    unet: bool,
) -> None:
    monkeypatch.setattr(train.trackers, "SMALL_BYTES", 10)
    (tmp_path / "unet").mkdir()
    for name, size in (("small", 9), ("large", 10), ("unet/1", 9), ("unet/2", 9)):
        (tmp_path / name).write_bytes(b"x" * size)
    log, recorder = start(wandb_artifact=choice)
    for name, expected in (("small", small), ("large", large), ("unet", unet)):
        log.weights(tmp_path / name)
        assert len(recorder.artifacts) == expected, name
        recorder.artifacts.clear()
    log.close(failed=False)


def test_tags_and_what_needs_wandb(tmp_path: Path) -> None:
    def config(**settings: Any) -> Any:
        return config_of(tmp_path, tmp_path, tmp_path, steps=1, **settings)

    assert config(wandb="offline", wandb_tags=" a b,c,, ").tags == ("a b", "c")
    assert config().tags == ()
    with pytest.raises(ValueError, match="--wandb-tags does nothing without --wandb"):
        config(wandb_tags="a")


def test_a_missing_tensorboard_is_refused_first(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        train.config, "find_spec", lambda name: None if name == "tensorboard" else real(name)
    )
    monkeypatch.setattr(train.loop, "open_base", lambda *_: pytest.fail("asked too late"))
    with pytest.raises(ValueError, match=r"--tensorboard needs .* pip install '\.\[tensorboard\]'"):
        run(cache, base, tmp_path / "run", steps=1, tensorboard=True)
    assert not (tmp_path / "run").exists()
    check_trackers(config_of(cache, base, tmp_path, steps=1))  # unless it is asked for


def read_events(run: Path) -> Any:
    """What TensorBoard shows of a run, by its own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    every = {"scalars": 0, "images": 0, "tensors": 0}
    events = reader.EventAccumulator(str(run / "tensorboard"), size_guidance=every)
    return events.Reload()


def scalars_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = read_events(run)
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_has_what_metrics_jsonl_has(cache: Path, base: Path, tmp_path: Path) -> None:
    """Also after a run died beyond its newest checkpoint, and trained those steps again at another
    rate; in files that do not tell where it ran."""
    pytest.importorskip("tensorboard")
    cache = Path(shutil.copytree(cache, tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --s 2\na blue | square --s 2\n")
    change_prompts(cache, prompts, str(base), "cpu")
    out = tmp_path / "run"
    settings: dict[str, Any] = {
        "steps": 5,
        "log_every": 1,
        "checkpoint_every": Every(2),
        "preview_every": Every(3),
        "tensorboard": True,
    }
    with at_step(5, die), pytest.raises(Died):
        run(cache, base, out, **settings)
    first = scalars_of(out)
    assert [step for step, _ in first["train/loss"]] == [1, 2, 3, 4]
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")  # so that steps 3 and 4 come again
    with pytest.warns(UserWarning, match="goes on with --lr"):
        run(cache, base, out, resume=True, **settings | {"lr": 1e-2})

    expected: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows(out):
        for name, value in row.items():
            if name != "step":
                expected[name].append((row["step"], pytest.approx(value, rel=1e-6)))
    logged = scalars_of(out)
    assert logged == dict(expected)
    assert [step for step, _ in logged["train/loss"]] == [1, 2, 3, 4, 5]
    assert logged["train/lr"][2] != first["train/lr"][2]

    events = read_events(out)
    assert [image.step for image in events.Images("previews/2")] == [0, 3]
    texts = {
        name: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(name)]
        for name in events.Tags()["tensors"]
    }
    assert set(texts["previews/1/text_summary"]) == {"a red circle"}
    assert "| steps | 5 |" in texts["settings/text_summary"][0]
    assert "| lr | 0.01 |" in texts["settings/text_summary"][1]
    files = sorted((out / "tensorboard").iterdir())
    assert len(files) == 2
    for path in files:
        assert ".localhost." in path.name
        assert str(tmp_path).encode() not in path.read_bytes()
    # The folder is the run's own, and to all others no more than a folder.
    assert out / "tensorboard" in run_entries(out)
    assert kind_of(out) == RUN and kind_of(out / "tensorboard") is None
    assert read_run(out).notes == []
    run(cache, base, out, overwrite=True, **settings)
    assert len(list((out / "tensorboard").iterdir())) == 1
    (out / "tensorboard" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt: --overwrite would delete it"):
        run(cache, base, out, overwrite=True, **settings)
