"""Adapters, optimizers and quantized bases: what they adapt in SDXL, that they learn, and that
diffusers draws from the file what the run would."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from sdxl.base import ModelSource, open_base
from sdxl.load import load_unet
from sdxl.lora.names import KOHYA, LORA
from shards.reader import Cache
from tests.made import learner_for
from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import Learner, evaluate
from train.loop import train
from train.option_values import CacheUse
from train.unet import add_adapter, trainable

CPU = torch.device("cpu")


@pytest.fixture
def sdxl(sdxl_configs: Path) -> Any:
    """SDXL's UNet on the meta device: shapes without weights."""
    config = UNet2DConditionModel.load_config(sdxl_configs / "unet")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).requires_grad_(False)


@pytest.mark.parametrize(
    ("targets", "num_modules", "num_parameters"),
    [
        ("attention-out", 140, 1_331_200),
        ("attention", 560, 5_806_080),
        ("all", 722, 10_639_360),
        (r"mid_block\..*attn2\.to_(k|v)", 20, None),
    ],
)
def test_targets_in_sdxl(
    sdxl: Any, targets: str, num_modules: int, num_parameters: int | None
) -> None:
    assert sum(p.numel() for p in sdxl.parameters()) == 2_567_463_684
    out = Path("unused")
    config = TrainConfig(
        caches=(CacheUse(out),), base="", out=out, steps=1, rank=4, targets=targets
    )
    with torch.device("meta"):
        add_adapter(sdxl, config)
    adapted = trainable(sdxl)
    assert len(adapted) == 2 * num_modules
    if num_parameters is not None:
        assert sum(p.numel() for p in adapted.values()) == num_parameters
    assert {p.dtype for p in adapted.values()} == {torch.float32}


def test_convolutions_by_choice(sdxl: Any) -> None:
    out = Path("unused")
    config = TrainConfig(caches=(CacheUse(out),), base="", out=out, steps=1, conv=True)
    with torch.device("meta"):
        add_adapter(sdxl, config)
    names = {name.split(".lora_")[0] for name in trainable(sdxl)}
    convolutions = {n for n in names if "attentions" not in n}
    every = {n for n, m in sdxl.named_modules() if isinstance(m, torch.nn.Conv2d)}
    every = {n.removesuffix(".base_layer") for n in every if "lora_" not in n}
    assert convolutions == every - {"conv_in", "conv_out"} and len(convolutions) > 40
    assert len(names) == 560 + len(convolutions)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("nothing_like_it", "matches no linear"),
        ("a(b", "no regex"),
        ("(" * 100_000, "no regex"),
        (r"((.*?)[\w.])*[!?]", "takes more than"),
    ],
)
def test_targets_that_are_none_are_refused(
    sdxl: Any, targets: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.unet.MATCH_SECONDS", 0.5)
    out = Path("unused")
    config = TrainConfig(caches=(CacheUse(out),), base="", out=out, steps=1, targets=targets)
    with pytest.raises(ValueError, match=message):
        add_adapter(sdxl, config)


Train = Callable[..., tuple[Path, TrainConfig]]


@pytest.fixture
def overfit(cache: Path, base: Path, tmp_path: Path) -> Train:
    """A run on the 14 images; returns its folder and settings."""

    def run(name: str = "run", **settings: Any) -> tuple[Path, TrainConfig]:
        defaults: dict[str, Any] = {
            "out": tmp_path / name,
            "steps": 30,
            "batch_size": 4,
            "device": "cpu",
            "lr": 5e-3,
        }
        config = TrainConfig(caches=(CacheUse(cache),), base=str(base), **{**defaults, **settings})
        train(config)
        return config.out, config

    return run


def eval_loss(unet: Any, config: TrainConfig, cache: Path) -> float:
    """The loss with any UNet, in fp32, by the run's own measure."""
    bare = TrainConfig(
        caches=config.caches, base=config.base, out=config.out, steps=1, device="cpu", batch_size=4
    )
    learner: Learner = learner_for(bare, DistContext(CPU))
    learner.unet = unet
    return evaluate(learner, Cache(cache), bare).loss


def reloaded(base: Path, run: Path) -> Any:
    """The base with the run's LoRA on it, by diffusers' own loader."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    pipeline.load_lora_weights(str(run), weight_name=LORA)
    return pipeline.unet


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 8, "alpha": 3.0, "targets": "all"},
        {"rank": 8, "alpha": 3.0, "adapter": "rslora"},
        {"rank": 8, "alpha": 3.0, "adapter": "dora"},
        {"rank": 4, "alpha": 16.0, "conv": True, "adapter": "dora"},
        {"rank": 4, "optimizer": "adamw8bit", "targets": "all"},
        {"rank": 4, "optimizer": "adafactor", "lr": 0.3},
        {"rank": 4, "optimizer": "prodigy", "lr": None, "steps": 200},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_each_kind_learns_and_diffusers_reads_it_at_equal_strength(
    overfit: Train, cache: Path, base: Path, settings: dict[str, Any]
) -> None:
    run, config = overfit(**settings)
    before = eval_loss(load_unet(open_base(base).unet, torch.float32), config, cache)
    after = eval_loss(reloaded(base, run), config, cache)
    assert after < before - 0.01, (before, after)
    learner = learner_for(config, DistContext(CPU))
    from train.weights import read_weights

    read_weights(learner.unet, False, run, None)
    assert eval_loss(learner.unet.eval(), config, cache) == pytest.approx(after, abs=1e-6)


def num_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(num_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore")  # of the packages' own imports
def test_a_lora_on_a_quantised_base_learns_and_fits_the_plain_one(
    overfit: Train, cache: Path, base: Path, quant: str, adapter: str
) -> None:
    run, config = overfit(base_quant=quant, targets="all", adapter=adapter)
    learner = learner_for(config, DistContext(CPU))
    packed = sum(num_bytes(p) for p in learner.unet.parameters() if not p.requires_grad)
    plain = load_unet(open_base(base).unet, torch.float32)
    assert packed < 0.8 * sum(p.numel() * 4 for p in plain.parameters())
    before = eval_loss(plain, config, cache)
    after = eval_loss(reloaded(base, run), config, cache)
    assert after < before - 0.01, (before, after)


def test_a_dora_leaves_no_file_for_uis(overfit: Train, tmp_path: Path) -> None:
    """Nor does that of an earlier version stay beside newer weights."""
    run, config = overfit(steps=1, adapter="dora")
    assert (run / LORA).exists() and not list(run.rglob(KOHYA))
    (run / KOHYA).write_bytes(b"old")
    train(replace(config, steps=2, resume=True))
    assert not (run / KOHYA).exists()


def test_a_resumed_run_adapts_what_its_checkpoint_adapts(
    overfit: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs with --conv of before adapt conv_in and conv_out too."""
    with monkeypatch.context() as patch:
        patch.setattr("train.unet.CONVOLUTIONS", r".*\.conv1|conv_in|conv_out")
        run, config = overfit(steps=1, conv=True)
    before = safetensors.torch.load_file(run / LORA)
    assert "unet.conv_in.lora_A.weight" in before
    train(replace(config, steps=2, resume=True))
    after = safetensors.torch.load_file(run / LORA)
    assert after.keys() == before.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [LORA, KOHYA])
def test_a_run_goes_on_from_a_lora_file(overfit: Train, cache: Path, base: Path, name: str) -> None:
    """Its rank, strength and targets; and what it has learned."""
    first, config = overfit("first", rank=8, alpha=3.0, adapter="rslora", steps=10)
    second, _ = overfit("second", init_lora=first / name, steps=1, lr=1e-9, weight_decay=0.0)
    left = safetensors.torch.load_file(first / LORA)
    right = safetensors.torch.load_file(second / LORA)
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[name], right[name], atol=1e-7) for name in left)
    assert eval_loss(reloaded(base, first), config, cache) == pytest.approx(
        eval_loss(reloaded(base, second), config, cache), abs=1e-6
    )
    with pytest.raises(ValueError, match="--init-lora brings its own rank"):
        overfit("third", init_lora=first / name, rank=4)


def test_a_lora_file_is_taken_in_fp32_on_a_half_precision_base(
    overfit: Train, cache: Path, base: Path
) -> None:
    """To its last bit, where the base's precision would round it."""
    first, config = overfit("first", rank=8, steps=2)
    half = replace(config, rank=None, init_lora=first / LORA, precision="bf16", allow_cpu_bf16=True)
    learner = learner_for(half, DistContext(CPU))
    state = safetensors.torch.load_file(first / LORA)
    for name, parameter in learner.optimizer.parameters.items():
        module, _, part = name.partition(".lora_")
        assert torch.equal(parameter, state[f"unet.{module}.lora_{part[0]}.weight"]), name
    assert len(learner.optimizer.parameters) == len(state)


@pytest.mark.slow
def test_full_fine_tunes_in_little_memory_learn(overfit: Train, cache: Path, base: Path) -> None:
    """The average of a run is what it publishes."""

    plain = None
    for number, settings in enumerate(
        (
            {"lr": 1e-3, "ema": 0.8, "ema_on_cpu": True},
            {"lr": 1e-3, "fused_backward": True},
            {"lr": 1e-2, "pure_bf16": True, "optimizer": "adafactor", "fused_backward": True},
        )
    ):
        if settings.get("pure_bf16"):
            settings |= {"precision": "bf16", "allow_cpu_bf16": True}
        run, config = overfit(str(number), full=True, **settings)
        plain = plain or eval_loss(load_unet(open_base(base).unet, torch.float32), config, cache)
        after = eval_loss(
            load_unet(ModelSource("unet", run / "unet"), torch.float32), config, cache
        )
        assert after < plain - 0.05, (settings, plain, after)
