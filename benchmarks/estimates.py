"""What a CPU can say of a GPU: memory by fake tensors and operations by the meta device.

The figures are estimates of full-size SDXL, and stand beside the targets until a card measures
them (``benchmarks.gpu``). Nothing is computed and no weights are made.

    python -m benchmarks.estimates [--out benchmark-output]
"""

from pathlib import Path
from typing import Any

import click
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_base import CONFIGS
from benchmarks.report import keep, machine, show
from train.adapters import add_adapter
from train.config import CacheUse, TrainConfig
from train.memory import Estimator

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
    estimator, rows = Estimator(str(CONFIGS), TOKENS), []
    for name, settings, pixels, target in PEAKS:
        config, bucket = config_of(**settings), (pixels, pixels)
        found = estimator.estimate(config, bucket)
        rows.append(
            {
                "run": name,
                "px": pixels,
                "estimated GB": found.peak / 1e9,
                "target GB": target,
                "weights": found.weights / 1e9,
                "gradients": found.gradients / 1e9,
                "optimizer": found.optimizer / 1e9,
                "activations": found.activations / 1e9,
                "working": found.working / 1e9,
            }
        )
    return rows


def saved(pixels: int) -> list[dict[str, Any]]:
    """What autograd keeps of one picture, in GB: in all, with checkpointing, its largest tensor."""
    estimator, rows = Estimator(str(CONFIGS), TOKENS), []
    for name, settings in (("LoRA 4", LORA), ("full", FULL)):
        found = estimator.activations(config_of(**settings), (pixels, pixels))
        rows.append(
            {
                "run": name,
                "px": pixels,
                "saved GB": found.total / 1e9,
                "checkpointed GB": found.checkpointed / 1e9,
                "largest tensor GB": found.largest / 1e9,
            }
        )
    return rows


def operations(pixels: int) -> list[dict[str, Any]]:
    """TFLOP of one picture's forward and backward pass, on the meta device, without recomputing."""
    rows = []
    for name, full in (("LoRA 4", False), ("full", True)):
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(str(CONFIGS / "unet"))
            ).to(torch.bfloat16)
            unet.requires_grad_(full)
            if not full:
                add_adapter(unet, config_of(**LORA))
                unet.to(torch.bfloat16)
            side = pixels // 8
            inputs = {
                "sample": torch.empty(1, 4, side, side, dtype=torch.bfloat16),
                "timestep": torch.zeros(1),
                "encoder_hidden_states": torch.empty(1, TOKENS, 2048, dtype=torch.bfloat16),
                "added_cond_kwargs": {
                    "text_embeds": torch.empty(1, 1280, dtype=torch.bfloat16),
                    "time_ids": torch.empty(1, 6),
                },
            }
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


@click.command()
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Tables of estimates."""
    tables = {
        "memory": memory(),
        "saved": [row for pixels in (512, 1024) for row in saved(pixels)],
        "operations": [row for pixels in (512, 1024) for row in operations(pixels)],
    }
    show("peak allocated, batch 1, bf16: ESTIMATED on fake tensors, not measured", tables["memory"])
    show("what autograd saves of one picture", tables["saved"])
    show("operations of one picture", tables["operations"])
    keep(out / "estimates.json", {"machine": machine(), **tables})


if __name__ == "__main__":
    main()
