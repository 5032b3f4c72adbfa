"""Where an export is written: the old stands until the new one does, and nothing read is lost."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from loras import made_lora

import infer.export_files
from infer.export import export
from infer.export_settings import ExportSettings
from runtime.files import aside_of
from runtime.locks import locked
from sdxl.lora.names import LORA

COMMON: dict[str, Any] = {"merge": True, "overwrite": True}


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    made_lora(base, tmp_path / "run", rank=4, alpha=16.0)
    return tmp_path / "run"


def do(weights: Path, out: Path, **settings: Any) -> Path:
    return export(ExportSettings(weights=weights, out=out, **settings)).path


def bytes_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_what_is_read_is_not_replaced(run: Path, base: Path, tmp_path: Path) -> None:
    """By any of the names that lead to it."""
    own = shutil.copytree(base, tmp_path / "own")
    single = do(run, tmp_path / "one.safetensors", base=str(base), merge=True)
    (tmp_path / "link.safetensors").symlink_to(single)
    (tmp_path / "hard.safetensors").hardlink_to(single)
    (tmp_path / "folder").symlink_to(own)
    before = bytes_of(tmp_path)
    merge = {"base": str(own), **COMMON}
    for weights, out, settings, option in (
        (run, own, merge, "--base"),
        (run, tmp_path / "folder", merge, "--base"),
        (run, own / "unet" / "x.safetensors", merge, "--base"),
        (run, own / "vae" / "diffusion_pytorch_model.safetensors", merge, "--base"),
        (run, single, {**COMMON, "base": str(single)}, "--base"),
        (run, tmp_path / "link.safetensors", {**COMMON, "base": str(single)}, "--base"),
        (run, tmp_path / "hard.safetensors", {**COMMON, "base": str(single)}, "--base"),
        (run, single, {**merge, "vae": str(single)}, "--vae"),
        (run, run / LORA, {"base": str(base), "overwrite": True}, "WEIGHTS"),
    ):
        with pytest.raises(ValueError, match=rf"would replace what {option} is read from"):
            do(weights, out, **settings)
    assert bytes_of(tmp_path) == before


@pytest.mark.slow
def test_the_old_stands_until_the_new_does(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "full", tmp_path / "one.safetensors"
    for out in (folder, file):
        do(run, out, base=str(base), merge=True)
    (folder / "notes.txt").write_text("mine")
    before = bytes_of(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infer.export_model._compare", fail)
    for out in (folder, file, tmp_path / "new"):
        with pytest.raises(OSError, match=r"the disk is full. What was there before is as it was"):
            do(run, out, base=str(base), weight=0.5, **COMMON)
    assert bytes_of(tmp_path) == before and not (tmp_path / "new").exists()
    monkeypatch.undo()
    for out in (folder, file):
        do(run, out, base=str(base), weight=0.5, **COMMON)
    after = bytes_of(tmp_path)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"one.safetensors", "full/unet/diffusion_pytorch_model.safetensors"}
    assert after.keys() == before.keys()


def test_a_folder_whose_replacement_was_cut_off_is_put_back(
    run: Path, base: Path, tmp_path: Path
) -> None:
    out = do(run, tmp_path / "full", base=str(base), merge=True)
    before = bytes_of(out)
    for name in ("unet", "scheduler"):
        (out / name).rename(aside_of(out / name))
    shutil.copytree(base / "scheduler", out / "scheduler")  # the new one, and then the kill
    with pytest.raises(ValueError, match=r"full/unet: is there already; --overwrite replaces it"):
        do(run, out, base=str(base), merge=True)
    assert bytes_of(out) == before


def test_one_export_at_a_time(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "one.safetensors"
    with (
        locked(tmp_path / ".one.safetensors.export.lock"),
        pytest.raises(ValueError, match=r"one.safetensors: another export is writing it"),
    ):
        do(run, out, base=str(base))
    real = infer.export_files.check_disk_space

    def other(path: Path, num_bytes: int) -> None:
        out.write_text("somebody else's, meanwhile")
        real(path, num_bytes)

    monkeypatch.setattr(infer.export_files, "check_disk_space", other)
    with pytest.raises(ValueError, match=r"one.safetensors: is there already"):
        do(run, out, base=str(base))
    assert out.read_text() == "somebody else's, meanwhile"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "run"]


def test_room_is_asked_for_before(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer.export_files, "free_bytes", lambda _: 100)
    for name in ("one.safetensors", "full"):
        with pytest.raises(OSError, match=rf"{name}: takes .* MB, and the disk has 0.00 MB free"):
            do(run, tmp_path / name, base=str(base), merge=True)
        assert not (tmp_path / name).exists()
