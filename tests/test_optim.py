"""Optimizers and schedules against torch, diffusers and plain loops."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import safetensors.torch
import torch
from diffusers.optimization import get_scheduler
from made import (
    CPU,
    Parameters,
    config_of,
    learner_of,
    made_batch,
    parameters_of,
    same,
)

from train.config import TrainConfig
from train.learner import train_step
from train.memory import state_bytes
from train.optim import FusedBackward, Optimizer, learning_rate, stochastic_round_

FINITE = torch.tensor(True)
KINDS = get_args(get_type_hints(TrainConfig)["optimizer"])


def give_gradients(parameters: Parameters, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters.values():
        grad = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.grad = grad.to(parameter.dtype)


def run(optimizer: Optimizer, steps: range, lr: float = 1e-2) -> None:
    for step in steps:
        give_gradients(optimizer.parameters, step)
        optimizer.step(step, lr, FINITE)
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_takes_what_is_said_before_it_is_there(kind: str) -> None:
    """What the warm-up, the estimate and the look at the disk count with."""
    parameters = parameters_of(0) | {"deep": torch.nn.Parameter(torch.ones(3, 5, 700))}
    optimizer = Optimizer(parameters, config_of(optimizer=kind, full=True), CPU)
    run(optimizer, range(1))
    tensors, _ = optimizer.state()
    shared = ("step", "qmap1", "qmap2")  # a number, and bitsandbytes' one table for all
    result = sum(t.nbytes for name, t in tensors.items() if name.rsplit("|", 1)[1] not in shared)
    assert result == state_bytes(kind, (p.shape for p in parameters.values()))


# The learning rate.


@pytest.mark.parametrize(
    ("actual", "reference", "cycles"),
    [
        ("constant", "constant_with_warmup", 1),
        ("linear", "linear", 1),
        ("cosine", "cosine", 1),
        ("cosine-restarts", "cosine_with_restarts", 1),
        ("cosine-restarts", "cosine_with_restarts", 3),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_are_those_of_diffusers(
    actual: Any, reference: str, cycles: int, warmup: int
) -> None:
    """In the warmup actual is a step ahead: expected begins with a step at 0."""
    num = 50
    config = config_of(lr=3e-4, lr_schedule=actual, num_cycles=cycles, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_scheduler(
        reference, optimizer, num_warmup_steps=warmup, num_training_steps=num, num_cycles=cycles
    )
    expected = []
    for _ in range(num + 1):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    results = [learning_rate(config, step, num) for step in range(num)]
    assert results[warmup:] == pytest.approx(expected[warmup:num], rel=1e-9, abs=1e-12)
    assert results[:warmup] == pytest.approx(expected[1 : warmup + 1], rel=1e-9)
    assert min(results) > 0 and max(results) == pytest.approx(3e-4)


def test_a_warmup_longer_than_the_run_only_rises() -> None:
    config = config_of(lr=1.0, lr_schedule="cosine", warmup_steps=10)
    assert [learning_rate(config, step, 4) for step in range(4)] == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(("kind", "lr"), [("adamw", 1e-4), ("adafactor", 1e-2), ("prodigy", 1.0)])
def test_the_default_learning_rate_is_of_the_optimizer(kind: Any, lr: float) -> None:
    assert learning_rate(config_of(optimizer=kind), 0, 10) == lr


# Steps.


def torchs(kind: str, parameters: Parameters, lr: float, decay: float) -> torch.optim.Optimizer:
    make: Any = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[kind]
    more = {"fused": True} if kind == "adamw" else {}
    optimizer: torch.optim.Optimizer = make(parameters.values(), lr=lr, weight_decay=decay, **more)
    return optimizer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_steps_are_torchs_bit_for_bit(kind: Any, fused: bool) -> None:
    """As one optimizer and as one for each weight; the learning rate is of each step."""
    actual, expected = parameters_of(0), parameters_of(0)
    config = config_of(optimizer=kind, weight_decay=0.1, fused_backward=fused)
    optimizer, reference = Optimizer(actual, config, CPU), torchs(kind, expected, 1.0, 0.1)
    assert optimizer.in_groups == fused
    for step, lr in enumerate((1e-2, 3e-3, 5e-2, 1e-2)):
        run(optimizer, range(step, step + 1), lr)
        give_gradients(expected, step)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        assert same(actual, expected)
    assert not same(actual, parameters_of(0))


def test_adafactor_goes_on_from_torchs_state() -> None:
    """Which is what earlier checkpoints hold; its step is a tensor on the CPU."""
    actual, expected = parameters_of(0), parameters_of(0)
    reference = torchs("adafactor", expected, 1e-2, 1e-2)
    optimizer = Optimizer(actual, config_of(optimizer="adafactor"), CPU)
    for step in range(6):
        if step == 3:
            named = zip(expected.items(), reference.state.values(), strict=True)
            state = {f"{name}|{k}": v for (name, _), of in named for k, v in of.items()}
            for name, parameter in expected.items():
                actual[name].data.copy_(parameter)
            optimizer.load({key: value.clone() for key, value in state.items()}, {})
            assert optimizer.state()[0].keys() == state.keys()
        give_gradients(expected, step)
        reference.step()
        if step >= 3:
            run(optimizer, range(step, step + 1))
    assert same(actual, expected)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_of_a_weight_does_not_depend_on_its_group(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, two at a time, each alone, in another order."""
    results = []
    half = dtype == torch.bfloat16
    config = config_of(optimizer=kind, full=True, pure_bf16=half, fused_backward=True)
    for numel, order in ((1 << 24, 1), (300, 1), (1, 1), (1 << 24, -1)):
        for module in ("adafactor", "optim"):
            monkeypatch.setattr(f"train.{module}.GROUP_NUMEL", numel)
        parameters = parameters_of(0, dtype)
        optimizer = Optimizer(parameters, config, CPU)
        fused = FusedBackward(optimizer, 0.5)
        for step in range(3):
            fused.arm(step, 1e-2, FINITE)
            for parameter in [*parameters.values()][::order]:
                (parameter.float().square().sum() * 3).backward()
            assert float(fused.disarm()) > 0
        results.append((parameters, optimizer.state()[0]))
    for parameters, state in results[1:]:
        assert same(parameters, results[0][0])
        assert all(torch.equal(state[name], value) for name, value in results[0][1].items())


def test_adamw_is_near_torchs_plain_one() -> None:
    actual, expected = parameters_of(0), parameters_of(0)
    optimizer = Optimizer(actual, config_of(weight_decay=0.1), CPU)
    reference = torch.optim.AdamW(expected.values(), lr=1e-2, weight_decay=0.1, foreach=False)
    run(optimizer, range(20))
    for step in range(20):
        give_gradients(expected, step)
        reference.step()
    assert all(torch.allclose(actual[n], expected[n], atol=1e-6, rtol=1e-6) for n in actual)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_fused_backward_clips_each_gradient_alone(max_norm: float) -> None:
    actual, expected = parameters_of(0), parameters_of(0)
    optimizer = Optimizer(actual, config_of(fused_backward=True), CPU)
    fused = FusedBackward(optimizer, max_norm)
    reference = torchs("adamw", expected, 1e-2, 1e-2)
    for step in range(3):
        fused.arm(step, 1e-2, FINITE)
        sum((p.square() * (n + 1)).sum() for n, p in enumerate(actual.values())).backward()
        norm = fused.disarm()
        assert all(parameter.grad is None for parameter in actual.values())
        sum((p.square() * (n + 1)).sum() for n, p in enumerate(expected.values())).backward()
        norms = [p.grad.norm() for p in expected.values() if p.grad is not None]
        assert float(norm) == pytest.approx(float(torch.stack(norms).norm()), rel=1e-5)
        if max_norm:
            for parameter in expected.values():
                torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        reference.step()
        reference.zero_grad()
        assert all(torch.allclose(actual[n], expected[n], atol=1e-7, rtol=1e-6) for n in actual)
        assert max_norm or same(actual, expected)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("full", [True, False])
def test_fused_backward_is_the_plain_step_bit_for_bit(base: Path, kind: Any, full: bool) -> None:
    torch.manual_seed(5)
    batches = [made_batch(2) for _ in range(3)]
    results = []
    for fused in (False, True):
        common: dict[str, Any] = {"optimizer": kind, "full": full, "max_grad_norm": 0}
        learner = learner_of(base, fused_backward=fused, **common)
        before = {n: p.detach().clone() for n, p in learner.optimizer.parameters.items()}
        steps = [train_step(learner, iter([b]), n, 1e-3) for n, b in enumerate(batches)]
        assert all(p.grad is None for p in learner.optimizer.parameters.values())
        numbers = [[float(step.loss), float(step.finite)] for step in steps]
        norms = [float(step.grad_norm) for step in steps]
        results.append((numbers, norms, learner.optimizer.parameters, learner.optimizer.state()))
    plain, armed = results
    assert plain[0] == armed[0] and plain[1] == pytest.approx(armed[1], rel=1e-5)
    assert same(plain[2], armed[2]) and not same(plain[2], before)  # type: ignore[arg-type]
    assert plain[3][0].keys() == armed[3][0].keys()
    assert all(torch.equal(plain[3][0][name], armed[3][0][name]) for name in plain[3][0])


# Rounding to bf16.


def rounded(values: torch.Tensor, seed: int) -> torch.Tensor:
    target = torch.empty_like(values, dtype=torch.bfloat16)
    stochastic_round_([target], [values], [seed])
    return target


def test_stochastic_rounding_keeps_what_is_bf16_already() -> None:
    values = torch.randn(10_000).bfloat16()
    values[:6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-133, 3e38])  # a subnormal too
    assert torch.equal(rounded(values.float(), 0), values)


@pytest.mark.parametrize("value", [1.001, -1.001, 1.0 + 2**-15, 3e-5, -123.4, 0.9999])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    """One of the two neighbors, the nearer as often as keeps the mean."""
    num = 200_000
    exact = torch.tensor(value)
    (bits,) = struct.unpack("<I", struct.pack("<f", exact.item()))
    lower, upper = (
        struct.unpack("<f", struct.pack("<I", n << 16))[0] for n in (bits >> 16, (bits >> 16) + 1)
    )
    share = (bits & 0xFFFF) / 65536  # of the way to the upper one, in magnitude
    result = rounded(exact.expand(num).contiguous(), 1).double()
    assert set(result.tolist()) <= {lower, upper}
    deviation = abs(upper - lower) * (share * (1 - share) / num) ** 0.5
    assert abs(float(result.mean()) - exact.item()) < 4.5 * deviation + 1e-12


def test_rounding_depends_on_seed_step_and_number_alone() -> None:
    """And on nothing torch draws beside; so a resumed run rounds as one that went on."""

    def stepped(seed: int, steps: range, twins: bool = False) -> Parameters:
        parameters = parameters_of(0, torch.bfloat16)
        if twins:
            parameters["twin"] = copy.deepcopy(parameters["matrix"])
        config = config_of(full=True, pure_bf16=True, seed=seed)
        optimizer = Optimizer(parameters, config, CPU)
        for step in steps:
            torch.manual_seed(step)
            give_gradients(parameters, 0)
            if twins:
                parameters["twin"].grad = parameters["matrix"].grad
            optimizer.step(step, 1e-3, FINITE)
        assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
        return parameters

    assert same(stepped(0, range(3)), stepped(0, range(3)))
    assert not same(stepped(0, range(3)), stepped(1, range(3)))
    assert not same(stepped(0, range(3)), stepped(0, range(1, 4)))
    twins = stepped(0, range(1), twins=True)
    assert not torch.equal(twins["matrix"], twins["twin"])


def distances(step: Callable[[Parameters, int], None], parameters: Parameters) -> float:
    """How far 200 steps towards a goal leave the weights from it, in the mean."""
    goal = torch.full((64, 64), 1.2)
    for number in range(200):
        for parameter in parameters.values():
            parameter.grad = ((parameter.detach().float() - goal) / 10).to(parameter.dtype)
        step(parameters, number)
    return float((parameters["w"].detach().float() - goal).abs().mean())


def test_pure_bf16_tracks_fp32_where_plain_bf16_stalls() -> None:
    """Steps of 1e-3 at weights of 1: a bf16 there has neighbors 1/128 away."""

    def start(dtype: torch.dtype) -> Parameters:
        return {"w": torch.nn.Parameter(torch.ones(64, 64).to(dtype))}

    def by(parameters: Parameters, **settings: Any) -> float:
        optimizer = Optimizer(parameters, config_of(weight_decay=0.0, **settings), CPU)
        return distances(lambda _, n: optimizer.step(n, 1e-3, FINITE), parameters)

    half, exact = start(torch.bfloat16), start(torch.float32)
    exact_loss = by(exact)
    actual = by(half, full=True, pure_bf16=True)
    stalled = start(torch.bfloat16)
    reference = torch.optim.AdamW(stalled.values(), lr=1e-3, weight_decay=0.0)
    assert distances(lambda *_: reference.step(), stalled) == pytest.approx(0.2, abs=1e-3)
    assert exact_loss < 0.1 and abs(actual - exact_loss) < 0.01
    means = [p["w"].detach().double().mean() for p in (half, exact)]
    assert abs(float(means[0] - means[1])) < 2e-3


# The state, away and back.


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"fused_backward": True}) for kind in KINDS[:3]),
        *((kind, {"full": True, "pure_bf16": True}) for kind in KINDS[:3]),
    ],
)
def test_the_state_goes_into_a_file_and_comes_back(
    tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    """Ten steps at once, and five, a file, and five by a new optimizer: bit-equal."""
    dtype = torch.bfloat16 if "pure_bf16" in settings else torch.float32
    config, lr = config_of(optimizer=kind, **settings), 1.0 if kind == "prodigy" else 1e-2
    straight, stopped = parameters_of(0, dtype), parameters_of(0, dtype)
    uninterrupted, first = Optimizer(straight, config, CPU), Optimizer(stopped, config, CPU)
    run(uninterrupted, range(10), lr)
    run(first, range(5), lr)
    tensors, numbers = first.state()
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "t")
    numbers = json.loads(json.dumps(numbers))
    resumed = {n: torch.nn.Parameter(p.detach().clone()) for n, p in stopped.items()}
    second = Optimizer(resumed, config, CPU)
    second.load(safetensors.torch.load_file(tmp_path / "t"), numbers)
    again, others = second.state()
    assert again.keys() == tensors.keys() and others == numbers
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    run(second, range(5, 10), lr)
    assert same(resumed, straight) and not same(stopped, straight)
    for name, tensor in uninterrupted.state()[0].items():
        assert torch.equal(second.state()[0][name], tensor), name
    assert second.state()[1] == uninterrupted.state()[1]


@pytest.mark.parametrize("kind", ["adamw", "prodigy"])
def test_a_resumed_run_may_change_its_weight_decay(kind: Any) -> None:
    parameters = parameters_of(0)
    first = Optimizer(parameters, config_of(optimizer=kind, weight_decay=0.1), CPU)
    run(first, range(2))
    second = Optimizer(parameters, config_of(optimizer=kind, weight_decay=0.3), CPU)
    second.load(*first.state())
    assert second.torch_optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes' import
@pytest.mark.parametrize("settings", [{}, {"fused_backward": True}])
def test_eight_bit_adamw_is_bitsandbytes_but_waits_for_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which synchronizes with the card after each weight, by ``sync_gpu``."""
    from bitsandbytes.optim import AdamW8bit, optimizer

    synced: list[torch.Size] = []
    monkeypatch.setattr(optimizer, "sync_gpu", lambda weight: synced.append(weight.shape))
    actual, expected = parameters_of(0), parameters_of(0)
    config = config_of(optimizer="adamw8bit", weight_decay=0.1, **settings)
    optimizer_8bit = Optimizer(actual, config, CPU)
    reference = AdamW8bit(expected.values(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        run(optimizer_8bit, range(step, step + 1))
        assert synced == []
        give_gradients(expected, step)
        reference.step()
        assert len(synced) == len(expected)
        synced.clear()
    assert same(actual, expected) and not same(actual, parameters_of(0))


def test_eight_bit_state_is_in_eight_bits() -> None:
    optimizer = Optimizer(parameters_of(0), config_of(optimizer="adamw8bit"), CPU)
    run(optimizer, range(1))
    tensors = optimizer.state()[0]
    assert tensors["matrix|state1"].dtype == tensors["matrix|state2"].dtype == torch.uint8
    assert tensors["vector|state1"].dtype == torch.float32  # too small to be worth it
