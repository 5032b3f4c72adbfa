"""Estimates memory and operations of full-size SDXL on a GPU, from fake and meta tensors on a CPU.

The figures are estimates of full-size SDXL, and stand beside the targets until a card measures
them (``benchmarks.gpu``). Nothing is computed and no weights are made.

    python -m benchmarks.estimates [--out benchmark-output]
"""

from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_base import CONFIGS
from benchmarks.report import keep, machine, show
from sdxl.base import open_base
from train.config import TrainConfig
from train.memory import CARDS, Estimator
from train.option_values import CacheUse
from train.unet import add_adapter

TOKENS = 77
LORA: dict[str, Any] = {"rank": 4, "gradient_checkpointing": True}
FULL: dict[str, Any] = {
    "full": True,
    "pure_bf16": True,
    "fused_backward": True,
    "optimizer": "adafactor",
    "gradient_checkpointing": True,
}
# Name, settings, pixels, target in GB (10^9 bytes).
PEAKS: tuple[tuple[str, dict[str, Any], int, float | None], ...] = (
    ("LoRA 4", LORA, 512, 5.8),
    ("LoRA 4", LORA, 1024, 6.5),
    ("LoRA 4, int8 base", {**LORA, "base_quant": "int8"}, 512, 3.6),
    ("LoRA 4, int8 base", {**LORA, "base_quant": "int8"}, 1024, 4.2),
    ("LoRA 4, nf4 base", {**LORA, "base_quant": "nf4"}, 512, 3.6),
    ("LoRA 4, nf4 base", {**LORA, "base_quant": "nf4"}, 1024, 4.2),
    ("LoRA 16", {**LORA, "rank": 16}, 1024, None),
    ("LoRA 4, no checkpointing", {**LORA, "gradient_checkpointing": False}, 1024, None),
    ("full, bf16, fused, adafactor", FULL, 512, None),
    ("full, bf16, fused, adafactor", FULL, 1024, 9.5),
    ("full, bf16, adafactor, not fused", {**FULL, "fused_backward": False}, 1024, None),
)


def config_of(**settings: Any) -> TrainConfig:
    return TrainConfig(
        caches=(CacheUse(Path("unused")),),
        base=str(CONFIGS),
        out=Path("unused"),
        steps=1,
        precision="bf16",
        **settings,
    )


def memory() -> list[dict[str, Any]]:
    """Estimated peaks by part, in GB, at batch 1."""
    estimator, rows = Estimator(open_base(CONFIGS), TOKENS), []
    for name, settings, pixels, target in PEAKS:
        config, bucket = config_of(**settings), (pixels, pixels)
        estimate = estimator.estimate(config, bucket)
        rows.append(
            {
                "run": name,
                "px": pixels,
                "estimated GB": estimate.peak / 1e9,
                "target GB": target,
                "weights": estimate.weights / 1e9,
                "gradients": estimate.gradients / 1e9,
                "optimizer": estimate.optimizer / 1e9,
                "activations": estimate.activations / 1e9,
                "working": estimate.working / 1e9,
            }
        )
    return rows


def saved(pixels: int) -> list[dict[str, Any]]:
    """What autograd keeps of one image, in GB: in all, with checkpointing, its largest tensor."""
    estimator, rows = Estimator(open_base(CONFIGS), TOKENS), []
    for name, settings in (("LoRA 4", LORA), ("full", FULL)):
        activations = estimator.activations(config_of(**settings), (pixels, pixels))
        rows.append(
            {
                "run": name,
                "px": pixels,
                "saved GB": activations.total / 1e9,
                "checkpointed GB": activations.checkpointed / 1e9,
                "largest tensor GB": activations.largest / 1e9,
            }
        )
    return rows


def meta_unet(full: bool) -> Any:
    """The UNet as a run trains it, in bf16, without weights."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(str(CONFIGS / "unet"))
        )
        unet.requires_grad_(full)
        if not full:
            add_adapter(unet, config_of(**LORA))
        return unet.to(torch.bfloat16).train()


def inputs_of(pixels: int) -> dict[str, Any]:
    """What it takes for one image, on the device or in the mode at hand."""
    side, dtype = pixels // 8, torch.bfloat16
    return {
        "sample": torch.empty(1, 4, side, side, dtype=dtype),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.empty(1, TOKENS, 2048, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(1, 1280, dtype=dtype),
            "time_ids": torch.empty(1, 6),
        },
    }


def operations(pixels: int) -> list[dict[str, Any]]:
    """TFLOP of one image's forward and backward pass, on the meta device, without recomputing."""
    rows = []
    for name, full in (("LoRA 4", False), ("full", True)):
        unet = meta_unet(full)
        with torch.device("meta"):
            inputs = inputs_of(pixels)
        with FlopCounterMode(display=False) as counter:
            output = unet(**inputs).sample
            forward = counter.get_total_flops()
            output.sum().backward()
        rows.append(
            {
                "run": name,
                "px": pixels,
                "forward TFLOP": forward / 1e12,
                "forward + backward TFLOP": counter.get_total_flops() / 1e12,
            }
        )
    return rows


def by_block(pixels: int) -> list[dict[str, Any]]:
    """Operations and saved bytes of a LoRA's forward pass, by the blocks of the UNet; over fake
    tensors, where attention is a fused kernel as on a card."""
    saved: Counter[str] = Counter()
    kept: dict[int, Any] = {}
    inside = ["the rest"]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            kept[storage._cdata] = storage  # held, so that its address is not used again
            saved[inside[-1]] += storage.nbytes()
        return tensor

    unet = meta_unet(full=False)
    groups = {"down_blocks": unet.down_blocks, "up_blocks": unet.up_blocks}
    blocks = {f"{name}.{n}": b for name, group in groups.items() for n, b in enumerate(group)}
    blocks["mid_block"] = unet.mid_block
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        block.register_forward_hook(lambda *_: inside.pop() and None)
    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in unet.named_parameters()
        }
        kept |= {w.untyped_storage()._cdata: w.untyped_storage() for w in weights.values()}
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            torch.func.functional_call(unet, weights, (), inputs_of(pixels))
    flops = {n.split(".", 1)[-1]: sum(f.values()) for n, f in counter.get_flop_counts().items()}
    return [
        {
            "block": name,
            "px": pixels,
            "forward TFLOP": flops[name] / 1e12 if name in blocks else None,
            "saved GB": saved[name] / 1e9,
        }
        for name in (*sorted(blocks), "the rest")
    ]


RECOMPUTED = "with checkpointing"


def expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images/s of each card, if it reached that share: counted work by assumed rates."""
    rates_of = []
    for row in rows:
        once = row["forward + backward TFLOP"]
        for how, tflop in (("", once), (RECOMPUTED, once + row["forward TFLOP"])):
            rates = {card: share * peak / 1e12 / tflop for card, (peak, share) in CARDS.items()}
            rates_of.append({"run": f"{row['run']} {how}".strip(), "px": row["px"], **rates})
    return rates_of


@click.command()
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Tables of estimates."""
    tables = {
        "memory": memory(),
        "saved": [row for pixels in (512, 1024) for row in saved(pixels)],
        "operations": [row for pixels in (512, 1024) for row in operations(pixels)],
        "blocks": by_block(1024),
    }
    tables["expected"] = expected(tables["operations"])
    show("images/s EXPECTED of counted work at the shares of peak above", tables["expected"])
    show("peak allocated, batch 1, bf16: ESTIMATED on fake tensors, not measured", tables["memory"])
    show("what autograd saves of one image", tables["saved"])
    show("operations of one image", tables["operations"])
    show("a LoRA's forward pass by block", tables["blocks"])
    keep(out / "estimates.json", {"machine": machine(), **tables})


if __name__ == "__main__":
    main()
