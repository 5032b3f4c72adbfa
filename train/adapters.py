"""LoRA on the UNet's transformers, through peft."""

import math
from typing import Any

import torch
from peft import LoraConfig

from train.config import TrainConfig

_ATTENTION = ["to_k", "to_out.0", "to_q", "to_v"]
TARGETS = {
    "attention": _ATTENTION,
    "attention-out": ["to_out.0"],
    "all": [*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
}


def add_lora(unet: Any, config: TrainConfig) -> None:
    """Put an adapter on ``unet``: its weights in fp32, drawn from the run's seed, output zero."""
    torch.manual_seed(config.seed)
    unet.add_adapter(
        LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS[config.targets])
    )
    for name, parameter in trainable(unet).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:  # again in fp32: peft drew it in the base's precision
            torch.nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


def trainable(unet: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name."""
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}
