"""Training from CUDA graphs is training without them, to the bit. No card is needed: the graphs are
recordings of operations (``recorded_cuda_graphs.py``), on the CPU or on a pretended card.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import recorded_cuda_graphs
import torch
from made import config_of, learner_for, made_batch
from pretended_cuda import PretendedCuda
from recorded_cuda_graphs import stand_in
from runs import assert_same_run, at_step, run, stop_by
from test_cuda import Traffic, slow

import train.cuda_graphs
import train.learner
from runtime.signals import Stopped
from sdxl.base import open_base
from shards.batches import Batch, Reader, ReadOptions
from shards.plan import Plan, RankShare
from shards.reader import Cache
from train.config import TrainConfig
from train.cuda_graphs import MAX_GRAPHS, CudaGraphs, why_no_graphs
from train.distributed import DistContext
from train.learner import train_step
from train.memory import Estimator

Settings = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs on the CPU, which a run would not take."""
    stand_in(monkeypatch.setattr)
    monkeypatch.setattr(train.learner, "why_no_graphs", lambda *_: None)
    yield


# Graphs of a small function.


class Small:
    """Adds to the gradients of two matrices, which ``step`` uses up."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [
            torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((8, 5), (5, 8))
        ]

    def compute(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        first, second = self.weights
        noisy = batch.latents.flatten(2) + batch.noise.flatten(2) * batch.times[:, None, None]
        losses = (torch.tanh(noisy @ first) @ second - noisy).square().mean((1, 2))
        loss = (losses * batch.weights).sum() / batch.num_entries
        loss.backward()  # type: ignore[no-untyped-call]
        return losses.detach(), loss.detach()

    @torch.no_grad()
    def step(self) -> None:
        for weight in self.weights:
            assert weight.grad is not None
            weight.add_(weight.grad, alpha=-0.1)
            weight.grad.zero_()

    def train(self, call: Callable[[Batch], Any], num: int = 24) -> list[Any]:
        """Results as they are after all steps; of three sizes in turn, one in two batches."""
        torch.manual_seed(1)
        results = []
        for number in range(num):
            kind = number % 3
            batch = made_batch(1 + kind % 2, num_entries=4 if kind else 2)
            before = batch.map(torch.clone)
            results.append(call(batch))
            assert torch.equal(batch.latents, before.latents)
            if number % 2:
                self.step()
        return [[result.tolist() for result in pair] for pair in results]


@pytest.mark.parametrize("max_graphs", [2, 16])
def test_a_small_function_comes_to_the_same_bits(
    recorded: None, monkeypatch: pytest.MonkeyPatch, max_graphs: int
) -> None:
    monkeypatch.setattr(train.cuda_graphs, "MAX_GRAPHS", max_graphs)
    plain, other = Small(), Small()
    graphs = CudaGraphs(other.compute, other.weights)
    expected, actual = plain.train(plain.compute), other.train(graphs)
    assert actual == expected
    assert all(map(torch.equal, plain.weights, other.weights))
    left_out = 24 // 3 - 3 if max_graphs == 2 else 0
    counts = {"warm-up": 9, "replayed": 15 - left_out}
    assert graphs.counts == counts | ({"no graph": left_out} if left_out else {})
    assert f"{15 - left_out} of 24 micro-batches were replayed" in graphs.describe()
    assert (f"; {left_out} were of sizes beyond" in graphs.describe()) == bool(left_out)


def test_warm_ups_are_on_another_stream_and_waited_for(recorded: None) -> None:
    small = Small()
    small.train(CudaGraphs(small.compute, small.weights))
    text = ", ".join(recorded_cuda_graphs.events)
    warm_up = "side waits for main, main waits for side"
    assert text == ", ".join([*[warm_up] * 9, *["capture"] * 3])


def test_a_gradient_that_is_dropped_is_an_error(recorded: None) -> None:
    small = Small()
    graphs = CudaGraphs(small.compute, small.weights)
    small.train(graphs, 15)
    small.weights[1].grad = None
    with pytest.raises(AssertionError, match="a gradient that graphs write to was replaced"):
        graphs(made_batch(1, num_entries=2))


def test_what_cannot_be_recorded_is_an_error_with_the_remedy(recorded: None) -> None:
    small = Small()

    def reading(batch: Batch) -> Any:
        results = small.compute(batch)
        assert float(results[1]) > 0
        return results

    graphs = CudaGraphs(reading, small.weights)
    for _ in range(3):
        graphs(made_batch(1))
    with pytest.raises(RuntimeError, match="not permitted when a stream is capturing") as caught:
        graphs(made_batch(1))
    assert caught.value.__notes__[-1].endswith("try without --cuda-graphs.")


# The product's steps.


def steps_of(
    cache: Path, base: Path, settings: Settings, *, graphs: bool, device: str = "cpu"
) -> dict[str, Any]:
    """What steps of up to two micro-batches come to, and how they were computed."""
    torch.manual_seed(0)
    settings = {"gradient_checkpointing": False, "batch_size": 2, **settings}
    num = settings.pop("num", 8)  # more than an epoch: three buckets, two with a short batch
    config = config_of(
        base,
        cache,
        device=device,
        cuda_graphs=graphs,
        allow_cpu_bf16=True,
        **settings,
    )
    learner = learner_for(config, DistContext(torch.device(device)))
    for name, parameter in learner.optimizer.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    opened = Cache(cache)
    size = config.batch_size
    plan, share = Plan(opened.groups(), 0, 2 * size), RankShare(batch_size=size, world=1, rank=0)
    options = ReadOptions(offsets=config.noise_offset > 0)
    batches = Reader([opened], plan, share, options).epochs(pin=device == "cuda")
    steps, reads, copies = [], [], set()
    for number in range(num):
        traffic = Traffic()
        with traffic if device == "cuda" else nullcontext():
            steps.append(train_step(learner, batches, number, 1e-3))
        reads.append(len(traffic.reads))
        copies |= traffic.copies
    batches.close()
    state, _ = learner.optimizer.state()
    return {
        "losses": [step.loss.item() for step in steps],
        "norms": [step.grad_norm.item() for step in steps],
        "by sample": [micro.losses.tolist() for step in steps for micro in step.micros],
        "weights": {n: p.tolist() for n, p in learner.optimizer.parameters.items()},
        "state": {n: t.tolist() for n, t in state.items()},
        "scale": learner.scaler.get_scale(),
        "reads": reads,
        "copies": copies,
        "counts": Counter() if learner.graphs is None else learner.graphs.counts,
    }


def with_and_without(
    cache: Path, base: Path, settings: Settings, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, Any]]:
    train.cuda_graphs.WARM_UPS = 1
    if device == "cuda":
        stand_in(setattr)
    actual, expected = (
        steps_of(cache, base, settings, graphs=on, device=device) for on in (True, False)
    )
    return actual, expected


def assert_same_steps(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(set(expected["losses"])) == len(expected["losses"])
    assert not expected["counts"]
    for name in ("losses", "norms", "by sample", "scale", "weights", "state", "reads"):
        assert actual[name] == expected[name], name
    counts: Counter[str] = actual["counts"]
    assert counts.total() == len(expected["by sample"]) > len(expected["losses"])
    assert counts["replayed"] >= counts.total() / 3 and not counts["no graph"]


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "targets": "attention-out", "batch_size": 1, "num": 5},
        slow({"precision": "bf16", "noise_offset": 0.1, "min_snr_gamma": 5.0}),
        slow({"gradient_checkpointing": True, "precision": "fp16", "conv": True}),
        slow({"optimizer": "prodigy", "ema": 0.9}),
        slow({"base_quant": "int8", "precision": "bf16"}),
        slow({"adapter": "dora", "optimizer": "adafactor"}),
        slow({"full": True, "ema": 0.9, "precision": "bf16"}),
    ],
    ids=str,
)
def test_steps_from_graphs_are_those_without(
    recorded: None,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    base: Path,
    settings: Settings,
) -> None:
    """Over several sizes in turn, one or two micro-batches a step, gradients added up and set to
    zero in between."""
    monkeypatch.setattr(train.cuda_graphs, "WARM_UPS", 1)
    assert_same_steps(*with_and_without(cache, base, settings))


@pytest.mark.slow
def test_steps_from_graphs_on_cuda_are_those_without(
    cuda: PretendedCuda, cache: Path, base: Path
) -> None:
    """Nothing waits for the device, nor is copied to it while a graph is recorded."""
    settings = {"targets": "attention-out"}
    actual, expected = cuda(with_and_without, cache, base, settings, "cuda")
    assert_same_steps(actual, expected)
    assert actual["copies"] == {(True, True)} and not any(actual["reads"])


def whole_runs(cache: Path, base: Path, out: Path) -> list[str]:
    """With graphs, the same stopped and resumed, and without graphs."""
    stand_in(setattr)
    train.cuda_graphs.WARM_UPS = 1
    settings: Settings = {"device": "cuda", "epochs": 2, "log_every": 1, "ema": 0.9}
    settings |= {"cuda_graphs": True, "accumulate": 2, "targets": "attention-out"}
    run(cache, base, out / "straight", **settings)
    with at_step(4, stop_by(signal.SIGTERM)), pytest.raises(Stopped):
        run(cache, base, out / "stopped", **settings)
    run(cache, base, out / "stopped", resume=True, **settings)
    assert_same_run(out / "straight", out / "stopped")
    run(cache, base, out / "without", **{**settings, "cuda_graphs": False})
    assert_same_run(out / "straight", out / "without")
    return recorded_cuda_graphs.events


@pytest.mark.slow
def test_a_run_from_graphs_is_itself_after_a_resume_and_that_without(
    cuda: PretendedCuda, cache: Path, base: Path, tmp_path: Path
) -> None:
    assert cuda(whole_runs, cache, base, tmp_path).count("capture") > 4


# Where there are none.


@pytest.mark.parametrize(
    ("settings", "device", "num", "reason"),
    [
        ({}, "cpu", 1, "not on CUDA"),
        ({}, "cuda", 2, "several processes"),
        ({"compile": True}, "cuda", 1, "--compile"),
        ({"full": True, "pure_bf16": True}, "cuda", 1, "--pure-bf16"),
        ({"full": True, "fused_backward": True}, "cuda", 1, "--fused-backward"),
        ({"base_quant": "nf4"}, "cuda", 1, "nf4"),
        ({"base_quant": "int8"}, "cuda", 1, None),
        ({"full": True, "precision": "fp16"}, "cuda", 1, None),
    ],
)
def test_the_reason_is_named_and_the_estimate_knows(
    base: Path, settings: Settings, device: str, num: int, reason: str | None
) -> None:
    config = config_of(base, cuda_graphs=True, **settings)
    plain = config_of(base, **settings)
    answer = why_no_graphs(config, device, num)
    assert answer is None if reason is None else answer is not None and reason in answer
    if settings:
        return
    estimator = Estimator(open_base(base), 77, device, num)
    peaks = [estimator.estimate(c, (64, 64)) for c in (config, plain)]
    assert (peaks[0] == peaks[1]) == (reason is not None)


def test_the_estimate_has_two_passes(base: Path) -> None:
    config, plain = config_of(base, cuda_graphs=True), config_of(base)
    estimator = Estimator(open_base(base), 77)
    twice, once = (estimator.estimate(c, (64, 64)) for c in (config, plain))
    assert twice.peak - once.peak == once.activations + once.working > 0
    advice = dict(estimator.advice(config, (64, 64)))
    assert advice["--no-cuda-graphs"] == twice.peak - once.peak
    assert "--no-cuda-graphs" not in dict(estimator.advice(plain, (64, 64)))
    field = TrainConfig.__dataclass_fields__["cuda_graphs"]
    assert f"{MAX_GRAPHS} at most" in field.metadata["help"]


def test_a_run_that_takes_none_says_why(base: Path, cache: Path) -> None:
    with pytest.warns(UserWarning, match="--cuda-graphs is left out: .* not on CUDA"):
        learner = learner_for(config_of(base, cache, cuda_graphs=True), DistContext(CPU))
    assert learner.graphs is None and not learner.optimizer.keeps_gradients
