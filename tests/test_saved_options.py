"""``train --resume RUN`` alone goes on: the run has its options, this machine its paths."""

import json
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from runs import assert_same_run, at_step, rows, stop_by

from cli import commands
from runtime.files import user_cache
from train.config import TrainConfig
from train.option_values import DEPENDENTS, CacheUse, flag
from train.saved_options import remember_private, saved_options

OPTIONS = (
    "--steps 6 --rank 4 --lr 2e-3 --targets all --batch-size 2 --checkpoint-every 2ep --seed 7 "
    "--device cpu --ema 0.9 --lr-schedule cosine --log-every 1 --timestep-range 0,900"
)


def command(*arguments: Any, code: int = 0) -> str:
    """The output of ``train`` with these arguments, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = CliRunner().invoke(commands, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output + "".join(str(warning.message) for warning in caught)


def refused(*arguments: Any) -> str:
    return command(*arguments, code=2).strip().splitlines()[-1]


def settings_of(out: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((out / "config.json").read_bytes())
    del settings["digest"]
    return settings


@pytest.fixture(scope="module")
def runs(cache: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``, and the same run as ``stopped`` after its third step."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("whole", "stopped"):
        given = [f"{cache},repeats=2", "--base", base, "--out", folder / name, *OPTIONS.split()]
        if name == "whole":
            command(*given)
        else:
            with at_step(3, stop_by(signal.SIGTERM)):
                output = command(*given, code=143)
            assert f"python cli.py train --resume {folder / name} goes on from there" in output
    return folder


def test_the_run_alone_is_enough(runs: Path, cache: Path, base: Path) -> None:
    out = runs / "stopped"
    before = settings_of(out)
    copy = runs / "copied"
    shutil.copytree(out, copy)
    words = refused("--resume", copy)
    assert "where the run's data and base are is not known on this machine" in words
    assert "give CACHE and --base BASE, beside --out" in words
    assert "not a run of train" in refused("--resume", cache)
    assert "no such folder" in refused("--resume", runs / "none")

    output = command("--resume", out)
    assert "goes on from" in output and "the run goes on with" not in output
    assert_same_run(out, runs / "whole")
    assert settings_of(out) == before | {"resume": True}
    assert str(cache.parent) not in (out / "config.json").read_text()
    assert "it is finished" in command("--resume", out)
    assert len(rows(out)) == 6

    given = [f"{cache},repeats=2", "--base", base, "--out", copy]
    command(*given, "--resume")  # a copy elsewhere: the paths are given, the options its own
    assert_same_run(copy, runs / "whole")


def test_what_is_typed_is_compared(runs: Path) -> None:
    out = runs / "whole"
    assert "cannot resume with --rank 8: the run has 4" in refused("--resume", out, "--rank", 8)
    assert "cannot resume with --full True" in refused("--resume", out, "--full")
    output = command("--resume", out, "--lr", 1e-3, "--epochs", 1)  # replaces the run's --steps
    assert "the run goes on with --lr 0.001; it was 0.002" in output
    assert len(rows(out)) > 6


def test_another_run_in_the_same_place_is_not_taken_for_it(
    runs: Path, split_cache: Path, base: Path, tmp_path: Path
) -> None:
    """The folder is replaced by one from elsewhere: what is remembered is of the old one."""
    out = tmp_path / "run"
    command(split_cache, "--base", base, "--out", out, "--steps", 1, "--device", "cpu")
    (memory,) = [
        path
        for path in (user_cache() / "runs").glob("*.json")
        if str(split_cache).encode() in path.read_bytes()
    ]
    shutil.rmtree(out)
    shutil.copytree(runs / "whole", out)
    assert "is not known on this machine" in refused("--resume", out)
    memory.write_bytes(memory.read_bytes()[:-3] + b"???")
    assert "is not known on this machine" in refused("--resume", out)
    (out / "config.json").write_text("{")
    words = refused("--resume", out)
    assert "config.json: cannot be read; give the run's options again" in words


def test_resume_auto_is_resume_beside_out(tmp_path: Path) -> None:
    """The word is no cache, unless there is a folder of that name."""
    auto, cache = CacheUse(Path("auto")), CacheUse(tmp_path / "cache")
    given: dict[str, Any] = {"out": tmp_path / "new", "base": "owner/name", "resume": True}
    for caches, expected in (((cache, auto), (cache,)), ((auto,), None), ((cache,), (cache,))):
        named = {**given, "caches": caches}
        assert saved_options(named) == {}, "there is no run: it begins"
        assert named.get("caches") == expected
    assert "caches" not in given and saved_options(given) == {} and "caches" not in given


def test_whose_wandb_it_is_stays_on_this_machine(tmp_path: Path) -> None:
    """The folder of a run does not name its user."""
    use = CacheUse(tmp_path / "cache", repeats=2)
    settings: dict[str, Any] = {"steps": 4, "wandb": "offline", "wandb_entity": "our-team"}
    config = TrainConfig(caches=(use,), base="owner/name", out=tmp_path / "run", **settings)
    paths = {"caches": ["cache,repeats=2"], "base": "owner/name", "val": None}
    config_json(tmp_path / "run", **paths, wandb="offline")
    remember_private(config, paths)
    given = {"out": tmp_path / "run", "base": "owner/name"}
    expected = {"wandb": "offline", "steps_per_epoch": 2, "wandb_entity": "our-team"}
    assert saved_options(given) == expected | {"caches": [f"{tmp_path / 'cache'},repeats=2"]}
    config_json(tmp_path / "run", **paths | {"base": "other"})
    assert "wandb_entity" not in saved_options({**given, "caches": (use,)})


def config_json(out: Path, **settings: Any) -> Path:
    """A folder with a run's settings and a checkpoint's name."""
    saved = {"steps_per_epoch": 2, "caches": ["cache"], "base": "owner/name", "val": None}
    (out / "checkpoints" / "checkpoint-4").mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(saved | settings))
    return out


def saved(out: Path, **given: Any) -> dict[str, Any]:
    typed: dict[str, Any] = {"out": out, "base": "b", "caches": (CacheUse(Path("c")),)}
    options = saved_options(typed | given)
    return {name: value for name, value in options.items() if name != "steps_per_epoch"}


def test_what_is_typed_takes_its_dependents_along(tmp_path: Path) -> None:
    """--caption-dropout 0 of a run with --unconditional zeros, and so on: not refused for an option
    that nobody has typed."""
    wandb = {"wandb_name": "a", "wandb_project": "p"}
    out = config_json(tmp_path, caption_dropout=0.1, unconditional="zeros", wandb="online", **wandb)
    assert saved(out, caption_dropout=0.0) == {"wandb": "online", **wandb}
    assert "unconditional" in saved(out, caption_dropout=0.1)
    kept = {"caption_dropout", "unconditional", "wandb_project"}
    assert saved(out, wandb="disabled").keys() == kept
    for controller, names in DEPENDENTS.items():
        for name in names:
            config: Any = {"caches": (CacheUse(Path("c")),), "base": "b", "out": out, "steps": 1}
            default = TrainConfig.__dataclass_fields__[name].default
            value = {bool: True, int: 3, float: 0.3, tuple: ("x",)}.get(type(default), "zeros")
            with pytest.raises(ValueError, match="does nothing without --" + flag(controller)[2:]):
                TrainConfig(**config, **{name: value})


def test_a_batch_is_not_multiplied_by_what_was_chosen_for_another(tmp_path: Path) -> None:
    out = config_json(tmp_path, batch_size=1, accumulate=4, fit="12GB", ema_on_cpu=True)
    assert saved(out, batch_size=4) == {"ema_on_cpu": True}
    assert saved(out, fit="8GB") == {"batch_size": 4}
    assert saved(out) == {"batch_size": 1, "accumulate": 4, "ema_on_cpu": True}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"gradient_checkpointing": True, "decided_checkpointing": False}, True),
        ({"gradient_checkpointing": True, "decided_checkpointing": True}, False),
        ({"gradient_checkpointing": True}, False),  # of an earlier version
        ({"gradient_checkpointing": True, "fit": "12GB"}, True),
    ],
)
def test_checkpointing_is_kept_where_it_was_typed(
    tmp_path: Path, settings: dict[str, Any], kept: bool
) -> None:
    assert ("gradient_checkpointing" in saved(config_json(tmp_path, **settings))) == kept


def test_without_a_checkpoint_the_run_begins_with_what_is_typed(tmp_path: Path) -> None:
    out = config_json(tmp_path, rank=8)
    with pytest.raises(ValueError, match="cannot resume with --rank 4: the run has 8"):
        saved(out, rank=4)
    shutil.rmtree(out / "checkpoints")
    assert saved(out, rank=4) == {}


def test_a_moved_base_is_given_beside_the_run(tmp_path: Path) -> None:
    out = config_json(tmp_path / "run", rank=8)
    (out / "metrics.jsonl").write_text("")
    config = TrainConfig(caches=(CacheUse(tmp_path / "c"),), base="b", out=out, steps=1)
    remember_private(config, json.loads((out / "config.json").read_text()))
    given: dict[str, Any] = {"caches": (CacheUse(out),), "base": "elsewhere"}
    assert saved_options(given)["caches"] == [str(tmp_path / "c")]
    assert given == {"out": out, "base": "elsewhere"}


def test_a_path_that_is_no_unicode_ends_no_run(tmp_path: Path) -> None:
    out = Path(f"{tmp_path}/caf\udce9")
    config = TrainConfig(caches=(CacheUse(tmp_path / "c"),), base="b", out=out, steps=1)
    before = set((user_cache() / "runs").glob("*"))
    remember_private(config, {})
    assert set((user_cache() / "runs").glob("*")) == before, "nothing is remembered of it"
