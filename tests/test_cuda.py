"""The stages on a CUDA device, which is pretended (``pretended_cuda.py``), against a CPU.

Functions of this file that take no fixtures run in a process of their own, where CUDA is.
"""

import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from drawing import PROMPTS, draw, images_in, settings_of
from made import config_of
from pretended_cuda import PretendedCuda
from runs import assert_same_run, at_step, evals, rows, run, stop_by
from torch.utils._python_dispatch import TorchDispatchMode

import train.learner
from infer.generate import generate, make_pipeline
from infer.settings import GenerateSettings
from precompute.encode import encode
from precompute.prompts import change_prompts
from precompute.settings import EncodeSettings
from runtime.signals import Stopped
from sdxl.base import open_base
from shards.batches import Batch, Reader
from shards.plan import Plan, RankShare
from shards.reader import Cache
from tests.made import learner_for
from train.config import TrainConfig
from train.distributed import DistContext
from train.ema import Ema
from train.learner import train_step, warm_up
from train.loop import train as train_run
from train.memory import Estimator, choose_checkpointing, state_bytes
from train.option_values import Every

Settings = dict[str, Any]
GPU = torch.device("cuda:0")
OPTIMIZERS = get_args(get_type_hints(TrainConfig)["optimizer"])
FUSED = {"full": True, "pure_bf16": True, "fused_backward": True, "optimizer": "adafactor"}
SMALL = {"batch_size": 2, "gradient_checkpointing": False}  # settings that are quick here


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def batches_of(cache: Path, size: int, *, pin: bool) -> tuple[Plan, Any]:
    opened = Cache(cache)
    plan = Plan(opened.groups(), 0, size)
    share = RankShare(batch_size=size, world=1, rank=0)
    return plan, Reader([opened], plan, share).epochs(pin=pin)


# Steps.


VALUES = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default  # it reads


class Traffic(TorchDispatchMode):
    """Notes what goes over the bus: copies to the GPU as (pinned, not waited for), and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: set[tuple[bool, bool]] = set()
        self.reads: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with self:  # in inference mode operations come whole, and are made of others
            result = function.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != result.device:
            if args[0].is_cuda:
                self.reads.append(str(function))
            elif args[0].dim():
                self.copies.add((args[0].is_pinned(), bool((kwargs or {}).get("non_blocking"))))
        elif function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            host, not_waited_for = args[1 if args[0].is_cuda else 0], (*args, False)[2]
            if args[0].is_cuda:
                self.copies.add((host.is_pinned(), not_waited_for))
            elif not (host.is_pinned() and not_waited_for):
                self.reads.append(str(function))
        elif function in VALUES and args[0].is_cuda:
            self.reads.append(str(function))
        return result


def steps_on(device: str, cache: Path, base: Path, settings: Settings) -> Settings:
    """What two steps come to."""
    torch.manual_seed(0)
    config = config_of(base, cache, device=device, **{**SMALL, **settings})
    learner = learner_for(config, DistContext(torch.device(device)))
    on_gpu = learner.world.device.type == "cuda"
    _, batches = batches_of(cache, 2, pin=on_gpu)
    with Traffic() as traffic:
        steps = [train_step(learner, batches, number, 1e-3) for number in range(2)]
    batches.close()
    tensors, _ = learner.optimizer.state()
    return {
        "losses": [float(step.loss) for step in steps],
        "norms": [float(step.grad_norm) for step in steps],
        "devices": {p.device.type for p in learner.unet.parameters()},
        "dtype": str(learner.precision.dtype),
        "scale": learner.scaler.get_scale() if learner.scaler.is_enabled() else 0,
        "trained": {str(p.dtype) for p in learner.optimizer.parameters.values()},
        "state": {t.device.type for name, t in tensors.items() if not name.endswith("|step")},
        "copies": traffic.copies,
        "reads": traffic.reads,
    }


@pytest.mark.parametrize(
    ("settings", "major", "expected"),
    [
        ({}, 8, {"dtype": "torch.bfloat16", "scale": 0}),
        ({}, 7, {"dtype": "torch.float16", "scale": 2.0**16}),
        slow({"gradient_checkpointing": True, "precision": "fp16"}, 8, {"scale": 2.0**16}),
        slow({"full": True}, 8, {"dtype": "torch.bfloat16"}),
        ({"full": True, "precision": "fp16"}, 7, {"scale": 2.0**16}),
        slow({"full": True, "precision": "fp32"}, 7, {"dtype": "torch.float32"}),
        (FUSED, 9, {"dtype": "torch.bfloat16", "trained": {"torch.bfloat16"}}),
    ],
    ids=["lora", "lora before 8.0", "lora fp16", "full", "full fp16", "full fp32", "fused"],
)
def test_steps_on_cuda_are_those_of_a_cpu(
    cuda: PretendedCuda,
    cache: Path,
    base: Path,
    settings: Settings,
    major: int,
    expected: Settings,
) -> None:
    actual = cuda(steps_on, "cuda", cache, base, settings, major=major)
    assert {name: actual[name] for name in expected} == expected
    assert actual["devices"] == actual["state"] == {"cuda"}
    assert actual["copies"] == {(True, True)}, "each copy is from pinned memory and not waited for"
    assert actual["reads"] == [], "no step waits for the device"
    reference: Settings = {"precision": "fp32"}
    if settings.get("pure_bf16"):
        reference = {"precision": "bf16", "allow_cpu_bf16": True}
    on_cpu = steps_on("cpu", cache, base, {**settings, **reference})
    exact = settings.get("precision") == "fp32"
    for name in ("losses", "norms"):
        assert actual[name] == pytest.approx(on_cpu[name], rel=1e-5 if exact else 0.05), name


def wrapped_by_ddp(cache: Path, base: Path) -> Settings:
    """With what DDP is called for one of two ranks."""
    made: list[Settings] = []
    train.learner.DistributedDataParallel = lambda unet, **how: made.append(how)  # type: ignore
    learner_for(config_of(base, cache, device="cuda"), DistContext(GPU, 0, 2))
    return made[0]


def test_ddp_is_told_of_the_ranks_gpu(cuda: PretendedCuda, cache: Path, base: Path) -> None:
    assert cuda(wrapped_by_ddp, cache, base)["device_ids"] == [0]


# The warm-up and the memory it tries.


def warm_up_on_cuda(cache: Path, base: Path, settings: Settings) -> int:
    """The most bytes that the optimizer's state was tried with."""
    config = config_of(base, cache, device="cuda", batch_size=1, **settings)
    learner = learner_for(config, DistContext(GPU))
    plan, batches = batches_of(cache, 1, pin=True)
    batches.close()
    tried: list[int] = []
    empty = torch.empty
    torch.empty = lambda *size, **how: (tried.append(size[0]), empty(*size, **how))[1]
    warm_up(learner, config, plan, 77)
    torch.empty = empty
    assert all(parameter.grad is None for parameter in learner.unet.parameters())
    return max(size for size in tried if isinstance(size, int))


@pytest.mark.parametrize(
    "optimizer", ["adafactor", *(slow(o) for o in OPTIMIZERS if o != "adafactor")]
)
def test_the_warm_up_tries_the_state_of_every_optimizer(
    cuda: PretendedCuda, cache: Path, base: Path, optimizer: str
) -> None:
    tried = cuda(warm_up_on_cuda, cache, base, {"optimizer": optimizer})
    config = config_of(base, cache, device="cuda", batch_size=1, optimizer=optimizer)
    assert tried == Estimator(open_base(base), 77).estimate(config, (64, 64)).optimizer


def peak_of_warm_up(cache: Path, base: Path, with_state: bool) -> tuple[int, int]:
    """The most bytes allocated in it, and those of the optimizer's state."""
    config = config_of(base, cache, device="cuda", batch_size=1, full=True)
    learner = learner_for(config, DistContext(GPU))
    plan, batches = batches_of(cache, 1, pin=True)
    batches.close()
    shapes = [parameter.shape for parameter in learner.optimizer.parameters.values()]
    if not with_state:
        train.learner.state_bytes = lambda *_: 0  # type: ignore[assignment]
    torch.cuda.reset_peak_memory_stats()
    warm_up(learner, config, plan, 77)
    return torch.cuda.max_memory_allocated(), state_bytes(config.optimizer, shapes)


def test_the_warm_up_has_room_for_the_state_beside_the_activations(
    cuda: PretendedCuda, cache: Path, base: Path
) -> None:
    peak, state = cuda(peak_of_warm_up, cache, base, True)
    without, _ = cuda(peak_of_warm_up, cache, base, False)
    assert peak - without == pytest.approx(state, rel=0.01)


def peak_with_accumulation(cache: Path, base: Path, global_batch: int) -> tuple[int, int]:
    """The most bytes allocated in a warm-up, and those of all gradients."""
    config = config_of(base, cache, device="cuda", batch_size=1, full=True)
    learner = learner_for(config, DistContext(GPU))
    train.learner.state_bytes = lambda *_: 0  # type: ignore[assignment]
    torch.cuda.reset_peak_memory_stats()
    warm_up(learner, config, Plan(Cache(cache).groups(), 0, global_batch), 77)
    gradients = sum(4 * p.numel() for p in learner.optimizer.parameters.values())
    return torch.cuda.max_memory_allocated(), gradients


def test_the_warm_up_has_the_gradients_of_earlier_micro_batches(
    cuda: PretendedCuda, cache: Path, base: Path
) -> None:
    peak, gradients = cuda(peak_with_accumulation, cache, base, 2)
    alone, _ = cuda(peak_with_accumulation, cache, base, 1)
    assert peak - alone > gradients / 2  # some were there beside the activations anyway


def checkpointing_on(cache: Path, base: Path) -> bool | None:
    config = config_of(base, cache, device="cuda", batch_size=2)
    world = DistContext(GPU)
    return choose_checkpointing(config, open_base(base), (64, 64), 77, world).gradient_checkpointing


def test_checkpointing_is_on_where_the_card_has_no_room(
    cuda: PretendedCuda, cache: Path, base: Path
) -> None:
    config = config_of(base, cache, device="cuda", batch_size=2, gradient_checkpointing=False)
    peak = Estimator(open_base(base), 77).estimate(config, (64, 64)).peak
    assert cuda(checkpointing_on, cache, base, total_memory=int(1.2 * peak)) is False
    assert cuda(checkpointing_on, cache, base, total_memory=int(1.05 * peak)) is True


def too_large(cache: Path, base: Path, out: Path) -> str:
    with pytest.raises(MemoryError) as caught:
        train_run(config_of(base, cache, device="cuda", batch_size=2, full=True, out=out))
    return str(caught.value)


def test_a_run_that_does_not_fit_says_so_before_its_folder_is_made(
    cuda: PretendedCuda, cache: Path, base: Path, tmp_path: Path
) -> None:
    config = config_of(base, cache, device="cuda", batch_size=2, full=True)
    weights = Estimator(open_base(base), 77).estimate(config, (64, 64)).weights
    message = cuda(too_large, cache, base, tmp_path / "run", total_memory=2 * weights)
    assert message.startswith("out of memory; the largest bucket is 64x64, at batch size 2")
    assert "--pure-bf16 (about" in message and "CUDA out of memory" in message
    assert not (tmp_path / "run").exists()


# The average of weights on a GPU in the CPU's memory.


def averages_of(every: int) -> dict[str, Any]:
    """By a thread beside the steps, and on the GPU, after seven steps."""
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(9, device=GPU)) for name in "ab"}
    on_cpu, on_gpu = Ema(weights, 0.9, True, every), Ema(weights, 0.9, False, every)
    real, may_go, went = on_cpu._lerp, threading.Semaphore(0), []

    def lerp(*given: Any) -> None:
        went.append(may_go.acquire(timeout=60))
        real(*given)

    on_cpu._lerp = lerp  # type: ignore[method-assign]
    for step in range(7):
        for weight in weights.values():
            weight.data += torch.randn(9, device=GPU)
        on_cpu.update(step)  # returns, while the thread waits
        on_gpu.update(step)
        if step % every == every - 1:
            may_go.release()
    on_cpu.finish(7)
    on_gpu.finish(7)
    may_go.release()
    return {
        "beside": {name: value.tolist() for name, value in on_cpu.values.items()},
        "here": {name: value.cpu().tolist() for name, value in on_gpu.values.items()},
        "devices": {value.device.type for value in on_cpu.values.values()},
        "pinned": all(stage.is_pinned() for stage in on_cpu._stages.values()),
        "went": went,
    }


@pytest.mark.parametrize("every", [1, 3])
def test_an_average_in_main_memory_is_that_of_the_gpu(cuda: PretendedCuda, every: int) -> None:
    result = cuda(averages_of, every)
    for name in "ab":
        assert result["beside"][name] == pytest.approx(result["here"][name], abs=1e-6)
    assert result["devices"] == {"cpu"} and result["pinned"]
    assert result["went"] == [True] * (7 if every == 1 else 3)


# A whole run.


def a_run_and_a_resumed_one(cache: Path, base: Path, out: Path) -> dict[str, Any]:
    """With all that a run does between its steps."""
    settings: Settings = {
        "device": "cuda",
        "steps": 4,
        "log_every": 1,
        "ema": 0.9,
        "precision": "fp16",
    }
    settings |= {"eval_every": Every(2), "preview_every": Every(2), "preview_vae": True}
    settings["val"] = cache.with_name("val")
    pinned: list[bool] = []
    epochs = Reader.epochs

    def spy(self: Reader, start: tuple[int, int], *, threads: int, pin: bool) -> Any:
        pinned.append(pin)
        return epochs(self, start, threads=threads, pin=pin)

    Reader.epochs = spy  # type: ignore[method-assign]
    straight = run(cache, base, out / "straight", **settings)
    with at_step(2, stop_by(signal.SIGTERM)), pytest.raises(Stopped):
        run(cache, base, out / "stopped", **settings)
    run(cache, base, out / "stopped", resume=True, **settings)
    assert_same_run(out / "straight", out / "stopped")
    assert pinned == [True] * 3
    return {"path": straight, "peak": torch.cuda.max_memory_allocated()}


@pytest.mark.slow
def test_a_run_on_cuda_is_itself_after_a_resume(
    cuda: PretendedCuda, split_cache: Path, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(split_cache, tmp_path / "split")
    cache = tmp_path / "split" / "train"
    (tmp_path / "prompts.txt").write_text("a red circle --s 2")
    change_prompts(cache, tmp_path / "prompts.txt", str(base), "cpu")
    result = cuda(a_run_and_a_resumed_one, cache, base, tmp_path)
    assert result["path"].exists() and len(evals(tmp_path / "straight")) == 3
    assert len([*(tmp_path / "straight" / "previews").iterdir()]) == 3
    name = "train/peak_memory_bytes"
    peaks = [row[name] for row in rows(tmp_path / "straight") if name in row]
    assert peaks == sorted(peaks) and 0 < peaks[-1] <= result["peak"]


# Encoding and generating.


def encode_on_cuda(images: Path, base: Path, out: Path) -> set[str]:
    from precompute import encoders

    loaded: set[str] = set()
    load = encoders.TextEncoders

    def spy(source: Any, dtype: torch.dtype, device: torch.device, *rest: Any) -> Any:
        loaded.add(f"{dtype} {device}")
        return load(source, dtype, device, *rest)

    encoders.TextEncoders = spy  # type: ignore[assignment,misc]
    encode(
        EncodeSettings(
            dataset=images,
            out=out,
            base=str(base),
            resolution=64,
            bucket_step=16,
            batch_size=4,
            device="cuda",
            dtype="fp32",
        )
    )
    return loaded


def test_a_cache_encoded_on_cuda_is_that_of_a_cpu(
    cuda: PretendedCuda, images: Path, cache: Path, base: Path, tmp_path: Path
) -> None:
    assert cuda(encode_on_cuda, images, base, tmp_path / "cache") == {"torch.float16 cuda"}
    on_cpu, on_cuda = (epoch_tensors(folder) for folder in (cache, tmp_path / "cache"))
    assert on_cpu.keys() == on_cuda.keys() and len(on_cpu) == 14
    for key, tensors in on_cpu.items():
        for name, tensor in tensors.items():
            tolerance = 1e-5 if name == "latents" else 2e-2  # text encoders are fp16 on CUDA
            torch.testing.assert_close(on_cuda[key][name], tensor, rtol=tolerance, atol=tolerance)


def epoch_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What a cache holds of each sample."""
    opened = Cache(folder)
    plan = Plan(opened.groups(), 0, 1)
    reader = Reader([opened], plan, RankShare(batch_size=1, world=1, rank=0))
    batches: list[Batch] = [reader.read(plan.batch(0, n), 0) for n in range(plan.num_batches)]
    names = ("latents", "prompt", "pooled", "time_ids")
    return {b.keys[0]: {name: getattr(b, name) for name in names} for b in batches}


def draw_on_cuda(settings: GenerateSettings) -> tuple[str, bool]:
    """In which dtype, and whether the models took turns on the card."""
    pipeline = make_pipeline(settings, keep_loaded=True)
    generate(settings, pipeline)
    assert pipeline._models is not None
    return str(pipeline.dtype), pipeline._models.takes_turns


@pytest.mark.parametrize(
    ("precision", "gib", "expected"),
    [
        slow("fp32", 24, ("torch.float32", False)),
        ("fp32", 2, ("torch.float32", True)),
        ("auto", 24, ("torch.float16", False)),
    ],
)
def test_images_drawn_on_cuda_are_those_of_a_cpu(
    cuda: PretendedCuda,
    base: Path,
    tmp_path: Path,
    precision: str,
    gib: int,
    expected: tuple[str, bool],
) -> None:
    on_cpu = draw(base, tmp_path / "cpu", PROMPTS)
    settings = settings_of(base, tmp_path / "cuda", PROMPTS, precision=precision)
    settings = replace(settings, device="cuda")
    assert cuda(draw_on_cuda, settings, total_memory=gib << 30) == expected
    on_cuda = images_in(tmp_path / "cuda")
    assert len(on_cuda) == len(on_cpu) == len(PROMPTS)
    for first, other in zip(on_cpu, on_cuda, strict=True):
        assert np.abs(first - other).mean() <= (0.01 if precision == "fp32" else 3.0)
