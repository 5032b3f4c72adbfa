"""Our forward passes compute what peft's and diffusers' do, outputs and gradients, and are used
where they may be."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from made import config_of, learner_for
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint

from benchmarks.operations import Operations
from train.distributed import DistContext
from train.fast_forwards import LoraCasts, use_direct_forwards
from train.quantize import Int8Linear

CPU = torch.device("cpu")
WIDTH, TOKENS, CONTEXT = 24, 10, 16
Kinds = dict[str, Any]


class Block(torch.nn.Module):
    """One of each thing that has a direct forward."""

    def __init__(self) -> None:
        super().__init__()
        sizes: Kinds = {"query_dim": WIDTH, "heads": 3, "dim_head": 8}
        self.own = Attention(**sizes)
        self.cross = Attention(**sizes, cross_attention_dim=CONTEXT)
        self.resnet = ResnetBlock2D(
            in_channels=8, out_channels=12, temb_channels=5, groups=4, groups_out=4
        )
        self.after = torch.nn.Conv2d(12, WIDTH, 3, padding=1)
        self.last = torch.nn.Linear(WIDTH, 7)

    def forward(self, image: Any, time: Any, context: Any) -> torch.Tensor:
        hidden = self.after(self.resnet(image, time)).flatten(2).transpose(1, 2)
        hidden = hidden + self.own(hidden)
        output: torch.Tensor = self.last(hidden + self.cross(hidden, context))
        return output


def adapted(**settings: Any) -> Any:
    """A block with a LoRA on all that can have one, whose output is not zero; and a copy of it with
    our forwards."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "last", "conv1", "conv_shortcut", "after"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": targets, **settings})
    expected: Any = get_peft_model(Block(), config).base_model.model
    for name, parameter in expected.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    actual = copy.deepcopy(expected)
    use_direct_forwards(actual)
    return expected.train(), actual.train()


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = (2, 8, 4, 4), (2, 5), (2, TOKENS, CONTEXT)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def result_of(
    block: Any,
    given: list[torch.Tensor],
    grad: torch.Tensor,
    call: Callable[..., Any] | None = None,
) -> dict[str, torch.Tensor]:
    """The output and the gradients of the inputs and the adapters."""
    given = [tensor.clone().requires_grad_() for tensor in given]
    output = (block if call is None else call)(*given)
    output.backward(grad.to(output.dtype))
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    results = {"output": output.detach(), **grads, **{str(i): t.grad for i, t in enumerate(given)}}
    block.zero_grad()
    assert all(tensor is not None for tensor in results.values())
    return results


def assert_close(actual: Kinds, expected: Kinds, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        error = (actual[name] - value).float().norm() / value.float().norm()
        assert error < tolerance, (name, error)


def replaced(block: Any) -> set[str]:
    return {name for name, module in block.named_modules() if "forward" in vars(module)}


SETTINGS: list[Kinds] = [
    {},
    {"use_rslora": True, "lora_alpha": 5},
    {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 7}},
    {"lora_alpha": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_outputs_and_gradients_are_pefts(settings: Kinds) -> None:
    """In fp64, which shows every difference that is more than rounding."""
    reference, actual = (block.double() for block in adapted(**settings))
    assert len(replaced(actual)) == 15 and not replaced(reference)
    given, grad = inputs(torch.float64), torch.randn(2, 16, 7)
    expected = result_of(reference, given, grad)
    assert len(expected) == 1 + 3 + 2 * 12
    assert_close(result_of(actual, given, grad), expected, 1e-11)
    assert_close(
        result_of(actual, given, grad, lambda *x: checkpoint(actual, *x, use_reentrant=False)),
        expected,
        1e-11,
    )
    with torch.no_grad():
        assert torch.allclose(actual.eval()(*given), expected["output"], rtol=1e-11)


@pytest.mark.parametrize("scale", [3, 4])
def test_one_layer_in_fp32_is_pefts_to_1e_6(scale: float) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(64, 48))
    config = LoraConfig(r=4, lora_alpha=scale, target_modules=["0"])
    expected: Any = get_peft_model(base, config).base_model.model
    torch.nn.init.normal_(expected[0].lora_B["default"].weight)
    actual = copy.deepcopy(expected)
    use_direct_forwards(actual)
    given, grad = [torch.randn(2, 5, 64)], torch.randn(2, 5, 48)
    assert_close(result_of(actual, given, grad), result_of(expected, given, grad), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_base", [True, False])
def test_rounding_is_no_worse_than_pefts(dtype: torch.dtype, half_base: bool) -> None:
    torch.manual_seed(0)  # of few numbers, some have larger errors by chance
    reference, actual = adapted()
    for block in (reference, actual):
        for name, parameter in block.named_parameters():
            if half_base and not parameter.requires_grad and "norm" not in name:
                parameter.data = parameter.data.to(dtype)
    exact_block = copy.deepcopy(reference).double()
    given, grad = inputs(), torch.randn(2, 16, 7)
    exact = result_of(exact_block, [tensor.double() for tensor in given], grad)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected, result = (result_of(block, given, grad) for block in (reference, actual))
    errors: dict[str, list[float]] = {"mine": [], "other": []}
    for name, value in exact.items():
        assert result[name].dtype == expected[name].dtype, name
        for whose, tensors in (("mine", result), ("other", expected)):
            errors[whose].append(float((tensors[name] - value).norm() / value.norm()))
    first, other = (sum(values) for values in errors.values())
    assert first < 1.2 * other, errors


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_matrices_that_are_cast_together_give_the_same_bits(
    settings: Kinds, dtype: torch.dtype, checkpointed: bool
) -> None:
    """Also where gradients are added up, and when weights have changed since."""
    torch.manual_seed(0)  # by chance some fp16 gradients are NaN, which equal nothing
    _, block = adapted(**settings)
    casts, given, grad = LoraCasts(block, dtype), inputs(), torch.randn(2, 16, 7)
    assert sorted(map(len, casts.groups)) == [1, 1, 1, 1, 2, 3]

    def passes(casts: LoraCasts | None) -> tuple[dict[str, torch.Tensor], int]:
        """Outputs and gradients of two, and how many casts they took."""
        results = {}
        with torch.autocast("cpu", dtype), Operations() as operations:
            for number in range(2):
                with nullcontext() if casts is None else casts.in_place():
                    call = partial(checkpoint, block, use_reentrant=False)
                    output = (call if checkpointed else block)(*given)
                    output.backward(grad.to(output.dtype))
                results[f"output {number}"] = output.detach()
        grads: Any = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
        block.zero_grad()
        return results | grads, operations.counts["casts"]

    for _ in range(2):
        (expected, each), (result, together) = passes(None), passes(casts)
        assert len(expected) == 2 + 2 * 12 and expected.keys() == result.keys()
        assert all(torch.equal(result[name], value) for name, value in expected.items())
        # 6 joined A and 9 B, forward, backward, and where the block is computed again.
        assert each - together == 2 * ((3 if checkpointed else 2) * (6 + 9) - 3)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(0.9)
    assert all(layers[0].cast_matrices is None for layers in casts.groups)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes' import
def test_on_quantized_bases_too(kind: str) -> None:
    from train.quantize import _nf4_maker

    make = Int8Linear if kind == "int8" else _nf4_maker(torch.float32, CPU)
    base = torch.nn.Sequential(make(torch.nn.Linear(64, 64)))
    reference: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=3, target_modules=["0"]))
    reference = reference.base_model.model
    torch.nn.init.normal_(reference[0].lora_B["default"].weight)
    actual = copy.deepcopy(reference)
    use_direct_forwards(actual)
    assert replaced(actual) == {"0"}
    given, grad = [torch.randn(2, 5, 64)], torch.randn(2, 5, 64)
    assert_close(result_of(actual, given, grad), result_of(reference, given, grad), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = (result_of(block, given, grad) for block in (actual, reference))
    assert_close(result, expected, 0.02)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str
)
def test_what_is_not_the_plain_formula_stays_pefts(settings: Kinds) -> None:
    _, actual = adapted(**settings)
    assert replaced(actual) == {"own", "cross", "resnet"}


def test_a_second_adapter_stays_pefts_and_a_switch_is_obeyed() -> None:
    expected, actual = adapted()
    given = inputs()
    for block in (expected, actual):
        for module in block.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(False)
    assert torch.equal(actual(*given), expected(*given))
    twice: Any = get_peft_model(Block(), LoraConfig(target_modules=["to_q"]))
    twice.add_adapter("second", LoraConfig(target_modules=["to_q"]))
    use_direct_forwards(twice)
    assert not any(name.endswith("to_q") for name in replaced(twice))


@pytest.mark.parametrize(
    "settings", [{"rescale_output_factor": 2.0}, {"residual_connection": True}, {"qk_norm": "l2"}]
)
def test_attention_with_more_to_it_stays_diffusers(settings: Kinds) -> None:
    block = torch.nn.ModuleList([Attention(query_dim=8, heads=2, dim_head=4, **settings)])
    use_direct_forwards(block)
    assert not replaced(block)


def test_a_mask_is_obeyed() -> None:
    expected = Attention(query_dim=8, heads=2, dim_head=4)
    actual = copy.deepcopy(expected)
    use_direct_forwards(actual)
    mask = torch.zeros(2, 1, 6).masked_fill(torch.rand(2, 1, 6) < 0.5, -1e4)
    hidden = torch.randn(2, 6, 8)
    assert torch.equal(actual(hidden, attention_mask=mask), expected(hidden, attention_mask=mask))


def test_without_adapters_bits_are_diffusers_and_nothing_is_divided_by_one() -> None:
    reference = Block().train()
    actual = copy.deepcopy(reference)
    use_direct_forwards(actual)
    assert replaced(actual) == {"own", "cross", "resnet"}
    given, grad = inputs(), torch.randn(2, 16, 7)
    with Operations() as before:
        expected = result_of(reference, given, grad)
    with Operations() as after:
        result = result_of(actual, given, grad)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert before.counts["divisions by 1"] == 6 and not after.counts["divisions by 1"]


def test_a_run_uses_them_for_every_layer(base: Path) -> None:
    """And adds what is adapted without a pass of its own."""
    config = config_of(base, targets="all", conv=True)
    unet = learner_for(config, DistContext(CPU)).unet
    modules = [m for m in unet.modules() if isinstance(m, LoraLayer | Attention | ResnetBlock2D)]
    assert len(modules) > 50 and all("forward" in vars(module) for module in modules)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_layers_compile_whole(dtype: torch.dtype) -> None:
    """In bf16 with matrices that are cast outside."""
    reference, actual = adapted()
    given, grad = [torch.randn(2, TOKENS, WIDTH)], torch.randn(2, TOKENS, WIDTH)
    compiled = torch.compile(actual.own, fullgraph=True, dynamic=True)
    expected = result_of(reference.own, given, grad)
    casts = LoraCasts(actual.own, dtype)
    is_half = dtype != torch.float32
    with torch.autocast("cpu", dtype, enabled=is_half):
        for _ in range(2):
            with casts.in_place() if is_half else nullcontext():
                result = result_of(actual.own, given, grad, compiled)
            assert set(result) == set(expected)
            for name, value in expected.items():
                error = (result[name] - value).float().norm() / value.norm()
                assert error < (0.03 if is_half else 1e-4), (name, error)
