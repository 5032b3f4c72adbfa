"""A base in int8: as exact as torchao's, and nothing of it is kept for the backward pass."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from made import config_of, learner_for
from torch.nn.functional import mse_loss

from sdxl.base import open_base
from sdxl.load import load_unet
from train.distributed import DistContext
from train.quantize import Int8Linear, quantize

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore")  # of torchao's import
def test_it_rounds_as_torchao_does(dtype: torch.dtype) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = torch.nn.Linear(96, 64).to(dtype)
    with torch.no_grad():
        plain.weight[3] = 0  # a row that has no scale
    reference = torch.nn.Sequential(copy.deepcopy(plain))
    quantize_(reference, Int8WeightOnlyConfig())
    actual, exact = Int8Linear(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    assert error(actual.weight, plain.weight) < 6e-3
    layers = (actual, reference, exact)
    inputs = torch.randn(5, 7, 96, dtype=dtype)
    given = [inputs.clone().to(p.dtype).requires_grad_() for p in (inputs, inputs, exact.weight)]
    outputs: list[Any] = [layer(x) for layer, x in zip(layers, given, strict=True)]
    grad = torch.randn(5, 7, 64, dtype=dtype)
    for output in outputs:
        output.backward(grad.to(output.dtype))
    for result, other, expected in (outputs, [x.grad for x in given]):
        assert result.dtype == dtype
        assert error(result, expected) < 1.1 * error(other, expected) < 6e-3


def test_backward_keeps_no_weight() -> None:
    layer = Int8Linear(torch.nn.Linear(96, 64))
    own = {layer.levels.data_ptr(), layer.scale.data_ptr()}
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(2, 96, requires_grad=True))
    assert set(kept) == own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_it_computes_in_half(dtype: torch.dtype) -> None:
    layer = Int8Linear(torch.nn.Linear(96, 64))
    inputs = torch.randn(2, 96, requires_grad=True)
    with torch.autocast("cpu", dtype):
        output = layer(inputs)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert inputs.grad is not None and inputs.grad.dtype == torch.float32


def test_a_dora_on_it_has_the_norms_of_its_weights(base: Path) -> None:
    """peft asks the layer for its weight, and must not get levels."""
    configs = [config_of(base, adapter="dora", base_quant=kind) for kind in ("none", "int8")]
    learners = [learner_for(config, DistContext(CPU)) for config in configs]
    plain, packed = (dict(learner.unet.named_parameters()) for learner in learners)
    names = [name for name in plain if "magnitude" in name]
    assert names
    for name in names:
        assert mse_loss(packed[name], plain[name]) < 1e-5 * plain[name].square().mean(), name


def test_the_linears_of_the_transformers_are_replaced(base: Path) -> None:
    unet: Any = load_unet(open_base(base).unet, torch.float32)
    linears = {name for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear)}
    quantize(unet, "int8", torch.float32, CPU)
    replaced = {name for name, module in unet.named_modules() if isinstance(module, Int8Linear)}
    assert replaced == {name for name in linears if ".attentions." in name}
