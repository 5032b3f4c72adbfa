"""The average of the weights against its definition, and where it stands in for them."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from made import config_of, learner_of, made_batch, made_sample, parameters_of, same, write_cache

from sdxl.base import open_base
from sdxl.lora.names import LORA
from sdxl.lora.write import lora_state
from shards.reader import Cache
from train.ema import Ema
from train.learner import evaluate, train_step
from train.weights import WeightsFormat, publish


def unrolled(decay: float, history: list[torch.Tensor]) -> torch.Tensor:
    """In fp64, by the definition: mean = d mean + (1 - d) weight, with d warmed up."""
    mean = history[0].double()
    for step, weight in enumerate(history[1:]):
        d = min(decay, (1 + step) / (10 + step))
        mean = d * mean + (1 - d) * weight.double()
    return mean


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_a_plain_loops(decay: float, dtype: torch.dtype, on_cpu: bool) -> None:
    parameters = parameters_of(0, dtype)
    parameters |= {f"more {n}": torch.nn.Parameter(torch.randn(3).to(dtype)) for n in range(70)}
    ema = Ema(parameters, decay, on_cpu)
    history: dict[str, list[torch.Tensor]] = {
        n: [p.detach().clone()] for n, p in parameters.items()
    }
    for step in range(30):
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape).to(dtype))
            history[name].append(parameter.detach().clone())
        ema.update(step)
    for name, value in ((name, ema.tensor(name)) for name in parameters):
        assert value.dtype == torch.float32
        expected = unrolled(decay, history[name]).float()
        assert torch.allclose(value, expected, atol=1e-5, rtol=1e-5), name


@pytest.mark.parametrize("num_steps", [7, 9])
def test_steps_taken_together_forget_as_much_as_one_by_one(num_steps: int) -> None:
    """At the last weight of each three, and at the end of what is left."""
    parameters = {"a": torch.nn.Parameter(torch.randn(5))}
    ema, mean = Ema(parameters, 0.9, on_cpu=False, every=3), parameters["a"].detach().double()
    kept = 1.0
    for step in range(num_steps):
        parameters["a"].data += torch.randn(5)
        kept *= min(0.9, (1 + step) / (10 + step))
        ema.update(step)
        if step % 3 == 2 or step == num_steps - 1:
            mean, kept = kept * mean + (1 - kept) * parameters["a"].detach().double(), 1.0
    ema.finish(num_steps)
    assert torch.allclose(ema.values["a"], mean.float(), atol=1e-6)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_after_the_average_stood_in(
    dtype: torch.dtype, on_cpu: bool
) -> None:
    parameters = parameters_of(0, dtype)
    ema = Ema(parameters, 0.9, on_cpu)
    for parameter in parameters.values():
        parameter.data.mul_(3)
    ema.update(0)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    values = {n: v.clone() for n, v in ema.values.items()}
    addresses = [p.data_ptr() for p in parameters.values()]
    with pytest.raises(RuntimeError, match="on the way"), ema.in_place():
        for name, parameter in parameters.items():
            assert torch.equal(parameter, values[name].to(dtype))
        assert not same(parameters, before)  # type: ignore[arg-type]
        raise RuntimeError("on the way")
    assert same(parameters, before)  # type: ignore[arg-type]
    assert all(torch.equal(ema.values[name], values[name]) for name in values)
    assert [p.data_ptr() for p in parameters.values()] == addresses


@pytest.mark.parametrize("full", [False, True])
def test_the_average_is_what_is_evaluated_and_published(
    base: Path, tmp_path: Path, full: bool
) -> None:
    torch.manual_seed(6)
    val = Cache(write_cache(tmp_path / "val", [made_sample(f"{n}") for n in range(3)]))
    learner = learner_of(base, ema=0.7, full=full)
    assert learner.ema is not None
    config, history = config_of(base, full=full), []
    parameters = learner.optimizer.parameters
    learner.ema = Ema(parameters, 0.7, on_cpu=False)  # of the weights that ``learner_of`` drew
    for step in range(4):
        history.append({n: p.detach().clone() for n, p in parameters.items()})
        train_step(learner, iter([made_batch(2)]), step, 1e-2)
    history.append({n: p.detach().clone() for n, p in parameters.items()})
    averaged = evaluate(learner, val, config).loss
    kind = WeightsFormat(full, open_base(base), learner.schedule)
    publish(learner.unet, kind, tmp_path, learner.world, learner.ema, steps=4)
    assert same(parameters, history[-1])  # type: ignore[arg-type]
    learner.ema = None
    assert evaluate(learner, val, config).loss != averaged
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(unrolled(0.7, [weights[name] for weights in history]))
    assert evaluate(learner, val, config).loss == pytest.approx(averaged, rel=1e-5)
    if full:
        actual = dict(UNet2DConditionModel.from_pretrained(tmp_path / "unet").named_parameters())
        expected = dict(parameters)
    else:
        actual, expected = safetensors.torch.load_file(tmp_path / LORA), lora_state(learner.unet)
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[n], value, atol=1e-5) for n, value in expected.items())
