"""What is decided by the device: where no such device is needed to decide it."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from drawing import settings_of as drawing_settings
from encodes import copy_old, counted, settings_of
from encodes import encode as encode_again
from made import config_of
from pretended_cuda import PretendedCuda
from transformers import CLIPTextModel

from infer.generate import generate, make_pipeline
from infer.settings import GenerateSettings
from precompute.encode import encode
from precompute.encoders import Encoders
from precompute.settings import EncodeSettings
from runtime.devices import has_bf16, pick_device, pick_precision, to_device
from runtime.process import ALLOCATOR
from sdxl.base import open_base
from tests.made import learner_for
from train.distributed import DistContext, StopVote, start_world

CUDA = torch.device("cuda")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``capability(7, 5)``: from here on the GPU's."""

    def of(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # it is emulated
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old Card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))

    return of


@pytest.mark.parametrize(
    ("major", "minor", "dtype"),
    [
        (7, 0, "float16"),
        (7, 5, "float16"),
        (8, 0, "bfloat16"),
        (8, 9, "bfloat16"),
        (10, 0, "bfloat16"),
    ],
)
def test_auto_is_bf16_where_the_gpu_has_it(
    capability: Any, major: int, minor: int, dtype: str
) -> None:
    capability(major, minor)
    precision = pick_precision("auto", CUDA)
    assert (precision.dtype, precision.autocast) == (getattr(torch, dtype), True)
    assert precision.scaler == (dtype == "float16")
    assert has_bf16(CUDA) == (dtype == "bfloat16")


@pytest.mark.parametrize("major", [7, 8])
def test_what_is_asked_for_is_taken(capability: Any, major: int) -> None:
    capability(major, 0)
    for requested, dtype, autocast, scaler in (
        ("fp16", torch.float16, True, True),
        ("fp32", torch.float32, False, False),
        *([("bf16", torch.bfloat16, True, False)] if major >= 8 else []),
    ):
        precision = pick_precision(requested, CUDA)
        assert (precision.dtype, precision.autocast, precision.scaler) == (dtype, autocast, scaler)


def test_bf16_is_refused_where_the_gpu_has_none(capability: Any, base: Path) -> None:
    capability(7, 5)
    message = r": Old Card has no bf16 \(compute capability 7.5; it takes 8.0\); use fp16 or fp32"
    with pytest.raises(ValueError, match="--precision bf16" + message):
        pick_precision("bf16", CUDA)
    pure = config_of(base, full=True, pure_bf16=True)
    with pytest.raises(ValueError, match="--pure-bf16" + message):
        learner_for(pure, DistContext(CUDA))
    fused = config_of(base, full=True, fused_backward=True)
    with pytest.raises(ValueError, match=r"--fused-backward .* this GPU has no bf16"):
        learner_for(fused, DistContext(CUDA))
    settings = EncodeSettings(
        dataset=base, out=base, base=str(base), vae_dtype="bf16", device="cuda"
    )
    with pytest.raises(ValueError, match="--vae-dtype bf16" + message):
        _ = Encoders(settings, open_base(base), 1).latents


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_the_host_does_not_wait_for_cuda_and_pinned_memory_alone(kind: str, pinned: bool) -> None:
    class Tensor:
        def is_pinned(self) -> bool:
            return pinned

        def to(self, device: torch.device, *, non_blocking: bool) -> tuple[str, bool]:
            return device.type, non_blocking

    moved: Any = to_device(Tensor(), torch.device(kind))  # type: ignore[arg-type]
    assert moved == (kind, kind == "cuda" and pinned)


def test_a_rank_takes_a_gpu_of_its_own_and_waits_in_a_step_for_minutes(
    capability: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability(8, 0)
    called: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **how: called.append((*args, how))
    )
    monkeypatch.setattr(dist, "new_group", lambda **how: called.append(how))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    world = start_world("cuda")
    StopVote(world)
    gpu, minutes = torch.device("cuda:1"), [timedelta(minutes=n) for n in (15, 120, 10)]
    assert (world.device, world.rank, world.size) == (gpu, 5, 8)
    step, patient, vote = ({"timeout": limit} for limit in minutes)
    gloo = {"backend": "gloo"}
    assert called == [gpu, ("nccl", step), gloo | patient, gloo | vote]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each sees its own alone
    assert pick_device("cuda") == torch.device("cuda:0")


# TF32.


def test_tf32_is_refused_where_there_is_none(capability: Any, base: Path) -> None:
    def encoders(device: str) -> Encoders:
        settings = EncodeSettings(
            dataset=base, out=base, base=str(base), vae_dtype="tf32", device=device
        )
        return Encoders(settings, open_base(base), 1)

    text = "--vae-dtype tf32: only NVIDIA GPUs of .* 8.0 or more have TF32, and this is "
    with pytest.raises(ValueError, match=text + "a CPU; use fp32"):
        _ = encoders("cpu").latents
    capability(7, 5)
    with pytest.raises(ValueError, match=text + r"Old Card \(compute capability 7.5\); use fp32"):
        _ = encoders("cuda").latents


class Flags:
    """Notes by method of a model whether its call may compute in TF32."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[bool, bool]]] = {}

    def watch(self, kind: Any, name: str) -> None:
        method, seen = getattr(kind, name), self.seen.setdefault(f"{kind.__name__}.{name}", [])

        def noted(*args: Any, **kwargs: Any) -> Any:
            backends = torch.backends
            seen.append((backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32))
            return method(*args, **kwargs)

        setattr(kind, name, noted)


def encode_in_tf32(images: Path, base: Path, out: Path) -> Any:
    """The flags at each call of the VAE, and the flags in the end."""
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    flags = Flags()
    flags.watch(AutoencoderKL, "encode")
    flags.watch(CLIPTextModel, "forward")
    encode(
        settings_of(images, base, out, vae_dtype="tf32", device="cuda", batch_size=8, threads=None)
    )
    return flags.seen, torch.backends.cudnn.allow_tf32


def test_a_cache_of_tf32_is_told_from_an_exact_one(
    cuda: PretendedCuda, images: Path, base: Path, tmp_path: Path
) -> None:
    data = copy_old(images, tmp_path / "data")
    seen, in_the_end = cuda(encode_in_tf32, data, base, tmp_path / "cache")
    calls = seen["AutoencoderKL.encode"]
    # Drawings in TF32, then exactly, one by one; the batches; three images of the checks, exactly.
    assert calls == [
        (True, True),
        *[(False, False)] * 2,
        *[(True, True)] * 6,
        *[(False, False)] * 3,
    ]
    assert {*seen["CLIPTextModel.forward"]} == {(False, False)} and not in_the_end
    with counted() as count, pytest.warns(UserWarning, match=r"anew: VAE precision \(14\)"):
        report = encode_again(data, base, tmp_path / "cache", batch_size=8)
    assert count == (14, 0) and report.changes.causes == {"VAE precision": 14}


def generate_on_cuda(settings: GenerateSettings) -> Any:
    """The flags of the UNet and the VAE, and what the record of an image says of the VAE."""
    flags = Flags()
    flags.watch(AutoencoderKL, "decode")
    flags.watch(UNet2DConditionModel, "forward")
    pipeline = make_pipeline(settings)
    generate(settings, pipeline)
    digests = pipeline.weights.digests(pipeline.dtype, pipeline.decodes_in_tf32)
    return {name: {*calls} for name, calls in flags.seen.items()}, digests["vae_dtype"]


@pytest.mark.parametrize(
    ("precision", "major", "in_tf32"), [("auto", 8, True), ("auto", 7, False), ("fp32", 8, False)]
)
def test_images_are_decoded_in_tf32_unless_fp32_is_asked_for(
    cuda: PretendedCuda, base: Path, tmp_path: Path, precision: Any, major: int, in_tf32: bool
) -> None:
    settings = drawing_settings(base, tmp_path, ["a red circle --s 2"], precision=precision)
    seen, recorded = cuda(generate_on_cuda, replace(settings, device="cuda"), major=major)
    assert seen["AutoencoderKL.decode"] == {(in_tf32, in_tf32)}
    assert seen["UNet2DConditionModel.forward"] == {(False, False)}
    assert recorded == ("tf32" if in_tf32 else "float32")


# The allocator.


@pytest.mark.parametrize("command", ["encode", "train", "generate"])
def test_a_command_lets_the_allocator_grow_before_torch_is_there(
    command: str, tmp_path: Path
) -> None:
    code = (
        "import os, sys, cli, runtime.options\n"
        f"cli.commands.commands[{command!r}].callback = lambda *_, **__: print(\n"
        "    'torch' in sys.modules, *(os.environ.get(name) for name in cli_names))\n"
    )
    code = code.replace("cli_names", repr(ALLOCATOR))
    arguments = {
        "encode": [str(tmp_path), "--base", "b", "--out", "o"],
        "train": [str(tmp_path), "--base", "b", "--out", "o", "--steps", "1"],
        "generate": ["--base", "b", "--out", "o", "--prompt", "p"],
    }
    code += f"cli.commands({[command, *arguments[command]]!r})"
    plain = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    for given, expected in (
        ({}, "False expandable_segments:True expandable_segments:True"),
        ({ALLOCATOR[0]: "backend:native"}, "False backend:native None"),
        ({ALLOCATOR[1]: ""}, "False None "),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=plain | given,
            capture_output=True,
            text=True,
        )
        assert run.stdout.rstrip("\n") == expected, run.stderr


# Systems without what Linux has.

WITHOUT = """
import importlib, os, pathlib, signal, sys
rooms = ("precompute", "train", "infer", "shards", "sdxl", "runtime")
paths = [path for room in rooms for path in pathlib.Path(room).rglob("*.py")]
assert len(paths) > 80
names = [".".join(path.with_suffix("").parts) for path in paths] + ["cli", "cli_caches"]
for name in names:  # with all that libraries, whose own affair it is, take from the system
    importlib.import_module(name)
for name in [*sys.modules]:
    if name.split(".")[0] in (*rooms, "cli", "cli_caches"):
        del sys.modules[name]
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in "fork O_DIRECTORY O_NONBLOCK getuid geteuid sched_getaffinity pread".split():
    delattr(os, name)
for name in "HUP KILL USR1 USR2 CHLD ALRM QUIT PIPE".split():
    delattr(signal, "SIG" + name)
for name in names:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_every_module_can_be_imported_without_unix() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
