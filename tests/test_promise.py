"""Training needs the UNet alone: no other model is built, nor a file of one opened."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from cli import commands
from sdxl.base import open_base
from shards.reader import Cache
from tests.singles import write_single
from train.caches import check_encoders

ROOT = Path(__file__).parent.parent
TOKENIZERS = ("tokenizer", "tokenizer_2")
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
REVISION = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Runs the commands of its JSON argument in one process, and tells of each how it ended, what it
# opened (by an audit hook) and which modules it built (every model is a torch module).
WATCHED = """
import contextlib, io, json, os, sys
opened, built = [], []
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.path.abspath(os.fsdecode(arguments[0])))
sys.addaudithook(note)
import torch
import cli
make = torch.nn.Module.__init__
def made(self, *args, **kwargs):
    built.append(f"{type(self).__module__}.{type(self).__qualname__}")
    make(self, *args, **kwargs)
torch.nn.Module.__init__ = made
told = []
for command in json.loads(sys.argv[1]):
    opened.clear(), built.clear()
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.commands(command)
        except SystemExit as stop:
            code = stop.code
    told.append(dict(code=code, errors=errors.getvalue(), opened=[*opened], built=[*built]))
print(json.dumps(told))
"""

Train = Callable[..., Result]


@pytest.fixture
def run_train(cache: Path, tmp_path: Path) -> Train:
    """``cli.py train`` in this process."""

    def run(base: Path | str, *more: str) -> Result:
        return CliRunner().invoke(commands, train_command(cache, base, tmp_path / "run", *more))

    return run


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may spoil."""
    return shutil.copytree(base, tmp_path / "base")


def train_command(cache: Path, base: Path | str, out: Path, *more: str) -> list[str]:
    arguments = ["train", str(cache), "--base", str(base), "--out", str(out)]
    return [*arguments, "--steps", "1", "--device", "cpu", *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", **more}


def watch(*commands: list[str], **more: str) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report: list[dict[str, Any]] = json.loads(run.stdout)
    return report


def assert_refused(run: Result, *words: str) -> None:
    """Exit code 2 and nothing but one line, with all of ``words``."""
    lines = [line for line in run.stderr.splitlines() if line]
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("Error: "), run.stderr
    for word in words:
        assert word in lines[0]
    assert run.stdout == ""
    assert run.exit_code == 2


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def weights_of(base: Path, component: str) -> Path:
    (path,) = (base / component).glob("*.safetensors")
    return path


def test_train_needs_no_encoder(own_base: Path, tmp_path: Path, run_train: Train) -> None:
    for name in (*ENCODERS, *TOKENIZERS):
        shutil.rmtree(own_base / name)
    out = tmp_path / "run"
    run = run_train(own_base, "--steps", "2")
    assert run.exit_code == 0, run.stderr
    (warning,) = (line for line in run.stderr.splitlines() if line.startswith("Warning: "))
    assert f"{own_base} has no vae, text_encoder, text_encoder_2: " in warning
    assert "cannot be checked" in warning
    assert safetensors.torch.load_file(out / "pytorch_lora_weights.safetensors")
    steps = [json.loads(row)["step"] for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.fixture(scope="module")
def watched(
    base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Five runs in one process, by name, each watched: see WATCHED."""
    folder = tmp_path_factory.mktemp("promise")
    hub = folder / "hf" / "hub" / "models--someone--small-xl"
    shutil.copytree(base, hub / "snapshots" / REVISION)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(REVISION)
    bases = {
        "empty store": str(base),
        "filled store": str(base),
        "hub": "someone/small-xl",
        "unknown": "someone/unknown-xl",
        "single file": str(write_single(base, folder / "small.safetensors")),
    }
    reports = watch(
        *(train_command(cache, name, folder / key) for key, name in bases.items()),
        HF_HOME=str(folder / "hf"),
        HF_HUB_CACHE=str(folder / "hf" / "hub"),
        XDG_CACHE_HOME=str(folder / "xdg"),
    )
    return dict(zip(bases, reports, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["empty store", "filled store", "hub"])
def test_train_opens_and_builds_the_unet_alone(
    watched: dict[str, dict[str, Any]], name: str
) -> None:
    report = watched[name]
    assert report["code"] == 0, report["errors"]
    assert "Warning: " not in report["errors"]
    opened = [Path(path) for path in report["opened"]]
    files = {f"{path.parent.name}/{path.name}" for path in opened}
    assert {"unet/config.json", "scheduler/scheduler_config.json"} <= files  # the hook sees
    assert not [path for path in opened if path.parent.name in (*ENCODERS, *TOKENIZERS)]
    assert any(module.endswith(".UNet2DConditionModel") for module in report["built"])
    others = ("autoencoder", "vae", "clip", "transformers.models")
    assert not [m for m in report["built"] if any(other in m.lower() for other in others)]


@pytest.mark.slow
def test_train_builds_the_unet_alone_from_a_single_file(
    watched: dict[str, dict[str, Any]],
) -> None:
    report = watched["single file"]
    assert report["code"] == 0, report["errors"]
    assert "Warning: " not in report["errors"]
    assert any(module.endswith(".UNet2DConditionModel") for module in report["built"])
    others = ("autoencoder", "vae", "clip", "transformers.models")
    assert not [m for m in report["built"] if any(other in m.lower() for other in others)]


@pytest.mark.slow
def test_an_unknown_hub_id_is_refused_without_a_network(
    watched: dict[str, dict[str, Any]],
) -> None:
    report = watched["unknown"]
    assert report["code"] == 2
    (error,) = (line for line in report["errors"].splitlines() if line.startswith("Error: "))
    assert "someone/unknown-xl: no such folder, and could not be downloaded from the hub" in error
    assert "Traceback" not in report["errors"]


@pytest.mark.slow
def test_an_unknown_hub_id_gets_one_line(watched: dict[str, dict[str, Any]]) -> None:
    assert len([line for line in watched["unknown"]["errors"].splitlines() if line]) == 1


def test_with_known_fingerprints_nobody_reads_the_encoders(
    own_base: Path, cache: Path, run_train: Train
) -> None:
    check_encoders(Cache(cache), open_base(own_base))  # fills the store
    for name in ENCODERS:
        path = weights_of(own_base, name)
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (own_base / name / "config.json").unlink()
    run = run_train(own_base)
    assert run.exit_code == 0, run.output
    assert "Warning: " not in run.stderr


@pytest.mark.parametrize("name", ENCODERS)
def test_a_cache_made_with_another_encoder_is_refused(
    own_base: Path, cache: Path, run_train: Train, name: str
) -> None:
    flip_last_byte(weights_of(own_base, name))
    assert_refused(run_train(own_base), f"{cache}: made with another {name} than {own_base} holds")


@pytest.mark.parametrize("name", ENCODERS)
def test_a_truncated_encoder_is_named(own_base: Path, run_train: Train, name: str) -> None:
    path = weights_of(own_base, name)
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(run_train(own_base), f"{path}: truncated")


def test_a_cache_made_with_a_vae_of_its_own_is_taken(
    own_base: Path,
    base: Path,
    images: Path,
    encode_to: Callable[..., Path],
    tmp_path: Path,
    run_train: Train,
) -> None:
    flip_last_byte(weights_of(own_base, "vae"))
    made = encode_to(images, tmp_path / "other-vae", vae=str(own_base / "vae"))
    check_encoders(Cache(made), open_base(base))
    plain = encode_to(images, tmp_path / "own-vae", base=str(own_base))
    with pytest.raises(ValueError, match="made with another vae than"):
        check_encoders(Cache(plain), open_base(base))


def test_a_unet_of_another_width_is_refused(own_base: Path, cache: Path, run_train: Train) -> None:
    edit_config(own_base / "unet", cross_attention_dim=96)
    assert_refused(
        run_train(own_base),
        f"{cache}: holds prompt embeddings of width 80",
        f"{own_base / 'unet'} takes 96",
    )


def test_a_unet_with_another_pooled_width_is_refused(own_base: Path, run_train: Train) -> None:
    edit_config(own_base / "unet", projection_class_embeddings_input_dim=160)
    assert_refused(run_train(own_base), "holds pooled embeddings of width 48", "takes 64")


def test_a_unet_without_sdxls_conditioning_is_refused(own_base: Path, run_train: Train) -> None:
    edit_config(own_base / "unet", addition_embed_type=None)
    assert_refused(run_train(own_base), f"{own_base / 'unet'}: no SDXL: ", "text_time")


def test_pickled_weights_are_refused(own_base: Path, run_train: Train) -> None:
    path = own_base / "unet" / WEIGHTS
    path.rename(path.with_suffix(".bin"))
    assert_refused(run_train(own_base), f"{own_base / 'unet'}: only {path.stem}.bin", "a pickle")


def test_a_unet_without_weights_is_refused(own_base: Path, run_train: Train) -> None:
    (own_base / "unet" / WEIGHTS).unlink()
    assert_refused(run_train(own_base), f"{own_base / 'unet'}: no .safetensors file")


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_a_unet_whose_tensors_are_not_its_own_is_refused(
    own_base: Path, run_train: Train, fault: str
) -> None:
    path = own_base / "unet" / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    if fault == "missing":
        del tensors["conv_in.weight"]
    elif fault == "mismatched":
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].contiguous()
    else:
        tensors["conv_in.surplus"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(run_train(own_base), f"{own_base / 'unet'}: ", "conv_in")


@pytest.mark.parametrize("left_bytes", [-1, 5000, 3, 0])
def test_truncated_unet_weights_are_refused(
    own_base: Path, run_train: Train, left_bytes: int
) -> None:
    path = own_base / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:left_bytes])
    assert_refused(run_train(own_base), f"{path}: ")


def test_a_refused_run_leaves_nothing_to_clear_away(
    own_base: Path, run_train: Train, tmp_path: Path
) -> None:
    path = own_base / "unet" / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert run_train(own_base).exit_code == 2
    path.write_bytes(data)
    run = run_train(own_base)
    assert run.exit_code == 0, run.output
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
