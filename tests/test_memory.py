"""Ways to save memory and time: each trains the same, and says what it would take."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from click.testing import CliRunner
from diffusers.models.resnet import ResnetBlock2D
from runs import in_child

import train.unet
from benchmarks.estimates import operations
from cli import commands
from runtime.devices import Precision
from sdxl.base import open_base
from shards.batches import Reader
from shards.plan import Plan, RankShare
from shards.reader import Cache
from tests.made import learner_for
from train.config import TrainConfig
from train.distributed import DistContext, is_dtensor
from train.learner import Learner, _batch_of_zeros, train_step, warm_up
from train.loop import train as run_train
from train.memory import Estimator, advice
from train.option_values import CacheUse

CPU = torch.device("cpu")
Settings = dict[str, Any]


def config_of(cache: Path, base: Path, **settings: Any) -> TrainConfig:
    defaults: Settings = {"out": Path("unused"), "steps": 1, "device": "cpu", "batch_size": 2}
    return TrainConfig(caches=(CacheUse(cache),), base=str(base), **{**defaults, **settings})


def plan_of(cache: Path) -> tuple[Cache, Plan]:
    opened = Cache(cache)
    return opened, Plan(opened.groups(), 0, 2)


def steps_of(learner: Learner, cache: Path, num: int) -> list[float]:
    opened, plan = plan_of(cache)
    batches = Reader([opened], plan, RankShare(batch_size=2, world=1, rank=0)).epochs()
    losses = [float(train_step(learner, batches, number, 1e-3).loss) for number in range(num)]
    batches.close()
    return losses


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.optimizer.parameters.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"full": True, "ema": 0.9},
        {"full": True, "fused_backward": True},
        {"precision": "fp16", "allow_cpu_bf16": True, "noise_offset": 0.1},
    ],
    ids=["lora", "full+ema", "fused", "fp16"],
)
def test_the_warm_up_leaves_everything_bit_unchanged(
    cache: Path, base: Path, settings: Settings
) -> None:
    """Weights, average, optimizer, scaler and generators; and the steps after it are the same."""
    config = config_of(cache, base, warm_up=True, **settings)
    _, plan = plan_of(cache)
    learner = learner_for(config, DistContext(CPU))
    before, generator = weights_of(learner), torch.get_rng_state()
    scaler = learner.scaler.state_dict()
    seen: list[torch.Size] = []
    learner.unet.conv_in.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    warm_up(learner, config, plan, 77)
    assert seen and seen[0] == (2, 4, 8, 8)  # the largest bucket is 64x64
    after = weights_of(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)
    if learner.ema is not None:
        assert all(torch.equal(before[n], v) for n, v in learner.ema.values.items())
    assert learner.optimizer.state()[0] == {}
    assert learner.scaler.state_dict() == scaler
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in learner.unet.parameters())
    cold = learner_for(config, DistContext(CPU))
    assert steps_of(learner, cache, 3) == steps_of(cold, cache, 3)
    first, second = weights_of(learner), weights_of(cold)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_does_not_fit_says_so_before_its_folder_is_made(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is out of memory here is planted; the advice is real."""

    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("train.loop.warm_up", too_much)
    out = tmp_path / "run"
    flags = ["--base", str(base), "--out", str(out), "--steps", "1", "--batch-size", "4"]
    run = CliRunner().invoke(commands, ["train", str(cache), *flags, "--device", "cpu", "--full"])
    assert run.exit_code == 1
    assert not out.exists()
    (line,) = (line for line in run.stderr.splitlines() if line.startswith("Error"))
    assert "out of memory; the largest bucket is 64x64, at batch size 4" in line
    for remedy in ("--optimizer adafactor (about", "--pure-bf16 (about", "--batch-size 2 (about"):
        assert remedy in line, line
    assert "--base-quant" not in line  # not for a full fine-tune


@pytest.mark.slow
def test_estimates_of_the_real_sdxl(sdxl_configs: Path) -> None:
    """Saved activations were measured elsewhere: LoRA 1.42 and 5.61 GB an image, with
    checkpointing 0.15-0.18 and 0.61-0.74."""
    estimator = Estimator(open_base(sdxl_configs), 77)
    lora = config_of(Path("x"), sdxl_configs, device="cuda", rank=4, batch_size=1)
    assert estimator.num_trained(lora) == 5_806_080
    for bucket, plain, checkpointed in (
        ((512, 512), 1.42e9, (0.14e9, 0.2e9)),
        ((1024, 1024), 5.61e9, (0.55e9, 0.75e9)),
    ):
        activations = estimator.activations(lora, bucket)
        assert activations.total == pytest.approx(plain, rel=0.02)
        assert checkpointed[0] < activations.checkpointed < checkpointed[1]
    peak = estimator.estimate(lora, (1024, 1024)).peak
    assert 5.7e9 < peak < 6.6e9
    saved = dict(estimator.advice(lora, (1024, 1024)))
    assert 2.0e9 < saved["--base-quant int8"] < saved["--base-quant nf4"] < 3.5e9
    full = replace(lora, full=True, rank=None)
    assert 45e9 < estimator.estimate(full, (512, 512)).peak < 48e9
    small = replace(full, pure_bf16=True, fused_backward=True, optimizer="adafactor")
    assert 6e9 < estimator.estimate(small, (1024, 1024)).peak < 9.5e9


@pytest.mark.parametrize("settings", [{}, {"targets": "all"}, {"full": True}])
def test_adafactors_state_is_estimated_as_it_is(
    cache: Path, base: Path, settings: Settings
) -> None:
    config = config_of(cache, base, optimizer="adafactor", **settings)
    learner = learner_for(config, DistContext(CPU))
    steps_of(learner, cache, 1)
    tensors, _ = learner.optimizer.state()
    state = sum(t.nbytes for name, t in tensors.items() if not name.endswith("|step"))
    estimate = Estimator(open_base(base), 77, device="cpu").estimate(config, (64, 64))
    assert estimate.optimizer == state


def test_advice_is_a_line_with_the_reason(cache: Path, base: Path) -> None:
    config = config_of(cache, base, gradient_checkpointing=False, batch_size=8)
    line = advice(
        config,
        open_base(base),
        (64, 64),
        77,
        1,
        RuntimeError("CUDA out of memory. Tried 2 GiB.\nMore."),
    )
    assert line.startswith(
        "out of memory; the largest bucket is 64x64, at batch size 8; what would save"
    )
    assert "--gradient-checkpointing (about" in line and "--batch-size 4 (about" in line
    assert line.endswith("(CUDA out of memory)")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured and differentiated as always, and not made into C++, which takes
    minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(train.unet, "COMPILE", {**train.unet.COMPILE, "backend": "aot_eager"})
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own looks at what it compiles
def test_compiled_blocks_train_the_same(cache: Path, base: Path, traced: None) -> None:
    """Over all three buckets, from a few graphs for each kind of block."""
    results = []
    for compiled in (False, True):
        config = config_of(cache, base, compile=compiled, targets="attention-out")
        learner = learner_for(config, DistContext(CPU))
        blocks = [m for m in learner.unet.modules() if isinstance(m, ResnetBlock2D)]
        kinds = {(block.in_channels, block.out_channels) for block in blocks}
        torch._dynamo.utils.counters.clear()
        results.append(steps_of(learner, cache, 6))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > len(kinds)) == compiled
        assert graphs <= 8 + 2 * len(kinds), "a graph for each bucket, it seems"
    assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_compiled_is_an_error(
    cache: Path, base: Path, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    plain = BasicTransformerBlock.forward

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", breaks)
    learner = learner_for(config_of(cache, base, compile=True), DistContext(CPU))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        steps_of(learner, cache, 1)


def test_channels_last_trains_the_same(cache: Path, base: Path) -> None:
    plain = learner_for(config_of(cache, base), DistContext(CPU))
    last = learner_for(config_of(cache, base, channels_last=True), DistContext(CPU))
    weight = last.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert steps_of(plain, cache, 3) == pytest.approx(steps_of(last, cache, 3), abs=1e-5)


@pytest.mark.slow
def test_operations_are_those_of_a_step(sdxl_configs: Path) -> None:
    """As they are counted in a forward and a backward pass of SDXL's UNet on the meta device."""
    estimator = Estimator(open_base(sdxl_configs), 77)
    changes: tuple[Settings, ...] = ({"rank": 4}, {"full": True})
    for row, settings in zip(operations(512), changes, strict=True):
        config = config_of(Path("x"), sdxl_configs, gradient_checkpointing=False, **settings)
        once = row["forward + backward TFLOP"] * 1e12
        assert estimator.flops(config, (512, 512)) == pytest.approx(once, rel=0.07)


@pytest.mark.slow
def test_a_dry_run_says_what_would_be(cache: Path, base: Path, tmp_path: Path) -> None:
    flags = ["--base", str(base), "--out", str(tmp_path / "run"), "--epochs", "3", "--rank", "4"]
    caches = [str(cache), f"{cache},repeats=2"]
    run = CliRunner().invoke(commands, ["train", *caches, *flags, "--batch-size", "4", "--dry-run"])
    assert run.exit_code == 0, run.output
    assert not (tmp_path / "run").exists()
    lines = run.output.splitlines()
    learner = learner_for(config_of(cache, base, rank=4), DistContext(CPU))
    trained = sum(p.numel() for p in learner.optimizer.parameters.values())
    assert lines[0].startswith(f"trained parameters: {trained:,} (lora, rank 4, alpha 16")
    assert "samples an epoch: 42, from 2 caches" in lines[1]
    assert "global batch 4; 11 steps an epoch" in lines[1]  # 12 + 15 + 15 samples in batches of 4
    assert lines[2] == "steps: 33 (3.00 epochs)"
    assert lines[3].startswith("time with one card, counted and not measured: about 1 min on RTX")
    rows = {line.split()[0]: line.split()[1:3] for line in lines[6:9]}
    assert rows == {"48x80": ["12", "3"], "64x64": ["15", "4"], "80x48": ["15", "4"]}


@pytest.mark.slow
def test_a_dry_run_takes_the_steps_of_the_run(cache: Path, base: Path, tmp_path: Path) -> None:
    config = config_of(cache, base, steps=None, epochs=1.5, out=tmp_path / "run")
    run_train(config)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    flags = ["--base", str(base), "--out", "unused", "--epochs", "1.5", "--batch-size", "2"]
    output = CliRunner().invoke(commands, ["train", str(cache), *flags, "--dry-run"]).output
    assert f"steps: {len(rows)} " in output


def test_checkpointing_asks_no_generator_for_its_state(
    cache: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host would wait for it at every block."""
    learner = learner_for(config_of(cache, base, gradient_checkpointing=True), DistContext(CPU))
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("asked"))
    batch = _batch_of_zeros(learner.unet, (64, 64), 1, 77)
    learner.losses(learner.forward, batch).sum().backward()
    assert learner.unet.is_gradient_checkpointing
    assert all(p.grad is not None for p in learner.optimizer.parameters.values())


def whole_gradients_after_one_micro_batch(base: Path) -> None:
    """A sharded UNet in the middle of a step; one rank is enough to see it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    learner = learner_for(config_of(Path("unused"), base, full=True), DistContext(CPU))
    precision = Precision(dtype=torch.float32, autocast=False, scaler=False)
    train.unet._shard(learner.unet, precision, DistContext(CPU))
    batch = _batch_of_zeros(learner.unet, (64, 64), 1, 77)
    with learner.grad_sync(last=False):
        learner.losses(learner.unet, batch).sum().backward()
    grads = [p.grad for p in learner.unet.parameters() if p.requires_grad]
    assert grads and all(is_dtensor(grad) for grad in grads), "kept whole until the last one"


def test_a_sharded_run_keeps_no_whole_gradients_between_micro_batches(base: Path) -> None:
    in_child(lambda: whole_gradients_after_one_micro_batch(base))
