"""Precisions take the paths they are named for, as seen in dtypes, the scale and gradients."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from benchmarks.operations import CudaNorms, library_forwards
from runtime.devices import DTYPES
from sdxl.base import open_base
from shards.batches import Batch, Reader
from shards.plan import Plan, RankShare
from shards.reader import Cache
from tests.made import config_of, learner_for, made_batch
from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import Learner, train_step
from train.option_values import CacheUse

CPU = torch.device("cpu")


def learner_of(cache: Path, base: Path, **settings: Any) -> Learner:
    config = TrainConfig(
        caches=(CacheUse(cache),),
        base=str(base),
        out=Path("unused"),
        steps=1,
        device="cpu",
        **settings,
    )
    return learner_for(config, DistContext(CPU))


def torch_optimizer(learner: Learner) -> torch.optim.Optimizer:
    return learner.optimizer.torch_optimizer


def batches_of(cache: Path) -> Any:
    opened = Cache(cache)
    share = RankShare(batch_size=2, world=1, rank=0)
    return Reader([opened], Plan(opened.groups(), 0, 2), share).epochs()


def seen_dtypes(learner: Learner) -> dict[str, set[torch.dtype]]:
    """Record what one linear and the last convolution give while a step runs."""
    seen: dict[str, set[torch.dtype]] = {"linear": set(), "out": set()}
    unet = learner.unet
    linear = next(m for n, m in unet.named_modules() if n.endswith("attn1.to_out.0"))
    for name, module in (("linear", linear), ("out", unet.conv_out)):
        module.register_forward_hook(lambda m, i, out, name=name: seen[name].add(out.dtype))
    return seen


def trained_dtypes(learner: Learner) -> tuple[set[torch.dtype], set[torch.dtype]]:
    parameters = list(learner.unet.parameters())
    return (
        {p.dtype for p in parameters if p.requires_grad},
        {p.dtype for p in parameters if not p.requires_grad},
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cpu_computes_in_fp32_whatever_was_asked(cache: Path, base: Path, precision: str) -> None:
    with pytest.warns(UserWarning, match=f"--precision {precision} on a CPU.* fp32") as caught:
        learner = learner_of(cache, base, precision=precision)
    assert len(caught) == 1
    assert not learner.scaler.is_enabled() and not learner.precision.autocast
    seen, batches = seen_dtypes(learner), batches_of(cache)
    train_step(learner, batches, 0, 1e-3)
    batches.close()
    assert seen == {"linear": {torch.float32}, "out": {torch.float32}}
    assert trained_dtypes(learner) == ({torch.float32}, {torch.float32})


def test_auto_on_a_cpu_is_fp32_and_says_nothing(cache: Path, base: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert learner_of(cache, base).precision.dtype == torch.float32


@pytest.mark.parametrize("full", [False, True])
def test_bf16_is_autocast_without_a_scaler(cache: Path, base: Path, full: bool) -> None:
    learner = learner_of(cache, base, precision="bf16", allow_cpu_bf16=True, full=full)
    assert not learner.scaler.is_enabled()
    base_dtypes = set() if full else {torch.bfloat16}
    assert trained_dtypes(learner) == ({torch.float32}, base_dtypes)
    seen, batches = seen_dtypes(learner), batches_of(cache)
    step = train_step(learner, batches, 0, 1e-3)
    loss, norm = step.loss, step.grad_norm
    batches.close()
    assert seen == {"linear": {torch.bfloat16}, "out": {torch.bfloat16}}
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and norm > 0
    for group in torch_optimizer(learner).param_groups:
        assert all(
            torch_optimizer(learner).state[p]["exp_avg"].dtype == torch.float32
            for p in group["params"]
        )


@pytest.mark.parametrize("checkpoints", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("bf16", {}),
        ("fp16", {}),
        ("bf16", {"adapter": "dora"}),
        ("bf16", {"full": True, "pure_bf16": True}),
        ("bf16", {"full": True}),
    ],
)
def test_norms_stay_in_half(
    cache: Path, base: Path, precision: str, settings: dict[str, Any], checkpoints: bool
) -> None:
    """But for group norms with fp32 weights; autocast is not asked, so a step on CUDA computes what
    it does on a CPU."""
    losses, seen = [], CudaNorms()
    settings = {**settings, "precision": precision, "gradient_checkpointing": checkpoints}
    for mode in (nullcontext(), seen):
        learner = learner_of(cache, base, allow_cpu_bf16=True, **settings)
        batches = batches_of(cache)
        with mode:
            losses.append([float(train_step(learner, batches, n, 1e-3).loss) for n in range(2)])
        batches.close()
    in_fp32 = settings.get("full") and not settings.get("pure_bf16")
    assert set(seen.outputs) == {DTYPES[precision], *([torch.float32] if in_fp32 else [])}
    assert seen.outputs.total() >= 20
    assert losses[0] == losses[1]


def gradients_of(
    batches: list[Batch], precision: str, norms_in_half: bool, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Of all weights of the miniature, trained in full, by each batch."""
    with monkeypatch.context() as patch:
        if not norms_in_half:
            patch.setattr("train.unet.keep_norms_in_half", lambda unet: None)
        settings: dict[str, Any] = {"precision": precision, "allow_cpu_bf16": True, "full": True}
        config = config_of("miniature", **settings)
        learner = learner_for(config, DistContext(CPU))
    actual = []
    for batch in batches:
        with nullcontext() if norms_in_half else CudaNorms():
            learner.losses(learner.unet, batch).mean().backward()
        grads = [p.grad for p in learner.optimizer.parameters.values() if p.grad is not None]
        actual.append(torch.cat([grad.flatten() for grad in grads]))
        learner.optimizer.zero_grad()
    return actual


def test_norms_in_half_round_no_worse_than_autocasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of fp32 masters in bf16, against those in fp32. Group norms that rounded their
    weights would be at 1.2 to 1.3."""
    torch.manual_seed(0)
    unet = open_base("miniature").unet.config
    width = unet["cross_attention_dim"]
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    sizes = {"prompt": torch.randn(2, 77, width), "pooled": torch.randn(2, pooled)}
    batches = [made_batch(2, (4, 8, 8), **sizes) for _ in range(3)]
    exact = gradients_of(batches, "fp32", True, monkeypatch)
    errors = [
        [
            float((grad - true).norm() / true.norm())
            for grad, true in zip(
                gradients_of(batches, "bf16", half, monkeypatch), exact, strict=True
            )
        ]
        for half in (True, False)
    ]
    product, autocasts = map(sum, errors)
    assert 0 < product < 1.1 * autocasts, errors


@contextmanager
def saved_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """What autograd keeps."""
    results: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        results[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield results


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [{}, {"conv": True, "adapter": "rslora"}])
def test_a_loras_input_is_not_cast_in_vain(
    cache: Path, base: Path, precision: str, settings: dict[str, Any]
) -> None:
    """peft takes it to fp32, and autograd keeps that for each LoRA."""
    results, sizes = [], []
    for forwards in (nullcontext, library_forwards):
        with forwards():
            learner = learner_of(
                cache, base, precision=precision, allow_cpu_bf16=True, targets="all", **settings
            )
        batches = batches_of(cache)
        with saved_storages() as saved:
            results += [[float(train_step(learner, batches, n, 1e-3).loss) for n in range(2)]]
        batches.close()
        sizes.append(sum(storage.nbytes() for storage in saved.values()))
    assert results[0] == pytest.approx(results[1], rel=2e-2)
    assert sizes[0] < 0.9 * sizes[1]


def test_dora_computes_its_norms_in_fp32(cache: Path, base: Path) -> None:
    settings = {"adapter": "dora", "precision": "bf16", "allow_cpu_bf16": True}
    learner = learner_of(cache, base, **settings)
    layers = [m for m in learner.unet.modules() if isinstance(m, LoraLayer)]
    assert layers and all(m.cast_input_dtype_enabled for m in layers)


def test_half_precision_losses_are_near_those_of_fp32(cache: Path, base: Path) -> None:
    results = {}
    for precision in ("fp32", "bf16", "fp16"):
        learner = learner_of(cache, base, precision=precision, allow_cpu_bf16=True)
        batches = batches_of(cache)
        results[precision] = [float(train_step(learner, batches, n, 1e-3).loss) for n in range(3)]
        batches.close()
    for precision, tolerance in (("bf16", 2e-2), ("fp16", 4e-3)):
        assert results[precision] != results["fp32"]
        for actual, exact in zip(results[precision], results["fp32"], strict=True):
            assert actual == pytest.approx(exact, rel=tolerance)


def test_fp16_is_autocast_with_a_scaler_that_is_undone_before_clipping(
    cache: Path, base: Path
) -> None:
    norms = {}
    for precision in ("fp32", "fp16"):
        learner = learner_of(cache, base, precision=precision, allow_cpu_bf16=True)
        learner.max_grad_norm = 1e-3
        seen, batches = seen_dtypes(learner), batches_of(cache)
        grads: list[torch.Tensor] = []
        parameters = torch_optimizer(learner).param_groups[0]["params"]
        step = torch_optimizer(learner).step

        def spy(
            *args: Any, parameters: Any = parameters, grads: Any = grads, step: Any = step
        ) -> Any:
            grads.append(torch.stack([p.grad.norm() for p in parameters]).norm())
            return step(*args)

        torch_optimizer(learner).step = spy  # type: ignore[method-assign]
        norm = train_step(learner, batches, 0, 1e-3).grad_norm
        batches.close()
        norms[precision] = float(norm)
        assert float(grads[0]) == pytest.approx(1e-3, rel=1e-2)  # clipped, in true units
    assert seen == {"linear": {torch.float16}, "out": {torch.float16}}
    assert learner.scaler.is_enabled() and learner.scaler.get_scale() == 2.0**16
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)


def test_an_overflow_skips_the_step_and_halves_the_scale(cache: Path, base: Path) -> None:
    learner = learner_of(cache, base, precision="fp16", allow_cpu_bf16=True)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in torch_optimizer(learner).param_groups[0]["params"]]
    batches = batches_of(cache)
    train_step(learner, batches, 0, 1e-3)
    after = torch_optimizer(learner).param_groups[0]["params"]
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert learner.scaler.get_scale() == 2.0**39
    for number in range(1, 31):
        train_step(learner, batches, number, 1e-3)
    batches.close()
    assert learner.scaler.get_scale() < 2.0**39
    assert not all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert all(bool(p.isfinite().all()) for p in after)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_a_step_on_cuda(cache: Path, base: Path) -> None:
    config = TrainConfig(
        caches=(CacheUse(cache),), base=str(base), out=Path("unused"), steps=1, device="cuda"
    )
    learner = learner_for(config, DistContext(torch.device("cuda")))
    batches = batches_of(cache)
    step = train_step(learner, batches, 0, 1e-3)
    loss, norm = step.loss, step.grad_norm
    batches.close()
    assert torch.isfinite(loss) and norm > 0
    assert learner.precision.dtype == torch.bfloat16
