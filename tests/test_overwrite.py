"""``train --overwrite``: the old run is there until the new one has a checkpoint, whatever dies."""

import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from disk import fork_for_each_operation
from runs import config_of, losses, run

import train.loop
import train.run_folder
from runtime.files import PARTIAL, fsync_folder, replace_path, write_durable
from runtime.locks import locked
from train.distributed import DistContext
from train.option_values import CacheUse
from train.run_folder import (
    ENTRIES,
    REPLACED_RUN,
    check_input,
    discard_replaced_run,
    has_replaced_run,
    lock_folder,
    recover,
    replacing_run,
)

RUN = Path("run")
NOTES = "notes/thoughts.txt"  # nothing that a run makes


def make_run(out: Path, text: str) -> None:
    for name in ("config.json", "unet/config.json", "checkpoints/checkpoint-9/state.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"{text} {name}")


def contents(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_text() for path in files}


def replace_by_new(out: Path) -> None:
    """What a run writes up to its first checkpoint."""
    with replacing_run(out):
        write_durable(out / "config.json", b"new")
        final = out / "checkpoints" / "checkpoint-1"
        partial = final.with_name(final.name + PARTIAL)
        partial.mkdir(parents=True)
        write_durable(partial / "state.json", b"new")
        fsync_folder(partial)
        replace_path(partial, final)
        fsync_folder(out)
        discard_replaced_run(out)


@pytest.mark.slow
def test_a_kill_in_any_file_operation_loses_neither_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a power cut; and again where ``recover`` is what dies."""
    monkeypatch.chdir(tmp_path)
    make_run(RUN, "old")
    (RUN / NOTES).parent.mkdir()
    (RUN / NOTES).write_text("mine")
    old, parent = contents(RUN), os.getpid()
    new = {"config.json": "new", "checkpoints/checkpoint-1/state.json": "new", NOTES: "mine"}
    outcomes = []

    def crash(act: Any, out: Path, where: Path) -> list[Path]:
        is_child = fork_for_each_operation(out, where)
        try:
            act(out)
        finally:
            if os.getpid() != parent:
                traceback.print_exc()
                os._exit(0 if is_child else 1)
        return sorted(where.iterdir())

    seen: set[Any] = set()
    for number, folder in enumerate(crash(replace_by_new, RUN, tmp_path / "crashed")):
        monkeypatch.chdir(folder)
        if (left := frozenset(contents(RUN).items())) not in seen:
            seen.add(left)
            for again in crash(recover, RUN, tmp_path / "again" / str(number)):
                recover(again / RUN)
                outcomes.append(contents(again / RUN))
        recover(RUN)
        outcomes.append(contents(RUN))
        assert not has_replaced_run(RUN)
    assert len(outcomes) > 100
    assert all(outcome in (old, new) for outcome in outcomes)
    assert old in outcomes and new in outcomes


def test_a_run_that_fails_before_its_first_checkpoint_gives_the_old_one_its_place_back(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(cache, base, out, steps=1)
    assert {path.name for path in out.iterdir()} <= ENTRIES
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_: Any) -> Any:
        assert (out / REPLACED_RUN / "config.json").exists()
        raise OSError("the card fell off the bus")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="fell off") as caught:
        patch.setattr(train.loop, "train_step", fail)
        run(cache, base, out, steps=2, overwrite=True)
    assert caught.value.__notes__ == [
        "The run has no checkpoint yet.",
        f"The run that was in {out} before is back in its place.",
    ]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    with replacing_run(out):  # as a kill leaves it
        shutil.copytree(out, tmp_path / "killed")
        (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    killed = tmp_path / "killed"
    with pytest.raises(ValueError, match="not empty"):
        run(cache, base, killed, steps=2)
    with pytest.warns(UserWarning, match="before is back in its place"):
        run(cache, base, killed, steps=2, resume=True)
    assert len(losses(killed)) == 2 and not has_replaced_run(killed)


@pytest.mark.parametrize("name", ["checkpoints/best-so-far", "previews/a.png"])
def test_what_no_run_wrote_is_not_deleted(
    cache: Path, base: Path, tmp_path: Path, name: str
) -> None:
    run(cache, base, tmp_path / "run", steps=1)
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=rf"{name}: --overwrite would delete it, and no run wrote"):
        run(cache, base, tmp_path / "run", steps=1, overwrite=True)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("folder", ["checkpoints/checkpoint-9", "unet", REPLACED_RUN, "."])
def test_an_input_inside_the_old_run_is_refused_by_name(tmp_path: Path, folder: str) -> None:
    out = tmp_path / "run"
    make_run(out, "old")
    make_run(out / REPLACED_RUN, "older")
    before = contents(out)
    link, holder = tmp_path / "link", tmp_path / "holder" / "unet"
    link.symlink_to(out / folder)
    holder.mkdir(parents=True)
    (holder / "weights").symlink_to(out / folder / "config.json")
    for path in (out / folder, link, tmp_path / "holder"):
        if path.name != "holder" or folder == "unet":
            with pytest.raises(ValueError, match=f"{path}: --overwrite would delete it"):
                check_input(path, out)
    assert contents(out) == before


def test_inputs_that_stay_are_no_reason_to_refuse(cache: Path, base: Path, tmp_path: Path) -> None:
    """A cache and a base in the run's folder, or above it, are no part of the run."""
    out = tmp_path / "run"
    make_run(out, "old")
    for path in (out / "cache", out / "notes.toml", tmp_path, tmp_path / "none"):
        check_input(path, out)
    shutil.copytree(cache, out / "cache")
    (out / "config.json").write_text('{"steps_per_epoch": 1}')
    run((CacheUse(out / "cache"),), base, out, steps=1, overwrite=True)
    assert len(losses(out)) == 1 and (out / "cache" / "manifest.json").exists()
    shutil.move(out / "cache", out / "unet")
    with pytest.raises(ValueError, match="unet: --overwrite would delete it"):
        run((CacheUse(out / "unet"),), base, out, steps=1, overwrite=True)
    assert len(losses(out)) == 1


def test_wandb_is_asked_before_the_old_run_is_touched(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    make_run(out, "old")
    before = contents(out)

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "setup", lambda **_: None)
    monkeypatch.setattr(wandb, "login", refuse)
    monkeypatch.setattr(train.loop, "open_data", lambda *_: pytest.fail("asked too late"))
    with (
        pytest.warns(UserWarning, match="config.json"),
        pytest.raises(ValueError, match=r"--wandb online: No API key .*--wandb offline"),
    ):
        run(cache, base, out, steps=1, overwrite=True, wandb="online")
    assert contents(out) == before


def test_the_folder_is_looked_at_again_under_the_lock(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may have begun and ended in between; a folder made for nothing is gone again."""
    out, alone = tmp_path / "run", DistContext(torch.device("cpu"))
    config = config_of(cache, base, out, steps=1)
    with lock_folder(config, alone):
        assert out.is_dir()
    assert not out.exists()

    @contextmanager
    def late(file: Path) -> Iterator[None]:
        make_run(out, "another's")
        with locked(file):
            yield

    monkeypatch.setattr(train.run_folder, "locked", late)
    with (
        pytest.warns(UserWarning, match="config.json"),
        pytest.raises(ValueError, match="not empty"),
        lock_folder(config, alone),
    ):
        pytest.fail("it would overwrite a run")
    assert contents(out)["unet/config.json"] == "another's unet/config.json"
