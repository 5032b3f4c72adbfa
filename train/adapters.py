"""LoRA and its kin on the UNet, through peft."""

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import regex
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from sdxl.lora.apply import load_lora, read_lora
from train.config import TrainConfig

_ATTENTION = r"attn\d\.(to_k|to_q|to_v|to_out\.0)"
TARGETS = {
    "attention": rf".*\.{_ATTENTION}",
    "attention-out": r".*\.to_out\.0",
    "all": rf".*\.({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)",
}
# Not conv_in and conv_out: sd-scripts has no place for them. A regex for --targets can name them.
CONVOLUTIONS = r".*\.(conv1|conv2|conv_shortcut|conv)"
MATCH_SECONDS = 3.0  # for all names together; a sensible pattern takes milliseconds
ADAPTED = (torch.nn.Linear, torch.nn.Conv2d)


def adapter_config(unet: Any, config: TrainConfig) -> LoraConfig:
    """peft's settings of a new adapter.

    Raises:
        ValueError: ``--targets`` is no regex, or matches nothing that can be adapted.
    """
    pattern = TARGETS.get(config.targets or "attention", config.targets)
    assert pattern is not None
    if config.conv:
        pattern = f"{pattern}|{CONVOLUTIONS}"
    modules = dict(unet.named_modules())
    names = [n for n in _matching(pattern, modules) if isinstance(modules[n], ADAPTED)]
    if not names:
        raise ValueError(
            f"--targets {config.targets}: matches no linear or convolution of the UNet; their "
            "names look like down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        )
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(names),
        use_rslora=config.adapter == "rslora",
        use_dora=config.adapter == "dora",
    )


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that all of a user's ``pattern`` matches.

    There are patterns that take time without end on a short name. Python's own ``re`` cannot be
    told to stop; ``regex``, which reads the same patterns, can.

    Raises:
        ValueError: no regex, or one that takes too long.
    """
    shown = f"--targets {pattern[:100]}"
    end = time.monotonic() + MATCH_SECONDS
    try:
        wanted = regex.compile(pattern)
        return [
            name
            for name in names
            if wanted.fullmatch(name, timeout=max(end - time.monotonic(), 0.001))
        ]
    except TimeoutError:
        raise ValueError(
            f"{shown}: takes more than {MATCH_SECONDS:g} seconds on the names of the UNet's "
            "modules; write it without repetitions inside repetitions"
        ) from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown}: no regex: {error}") from None


def add_adapter(unet: Any, config: TrainConfig, checkpoint: Path | None = None) -> None:
    """Put an adapter on ``unet``, its weights in fp32: that of the ``checkpoint`` a run resumes
    from, that of ``--init-lora``, or a new one drawn from the run's seed whose output is zero.

    A resumed run adapts what its checkpoint adapts, whatever the settings mean today.

    Raises:
        ValueError: the settings or the LoRA file do not fit this UNet.
    """
    source = checkpoint or config.init_lora
    if source is not None:
        load_lora(unet, source)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("lora_" in name)
    else:
        torch.manual_seed(config.seed)
        unet.add_adapter(adapter_config(unet, config))
    for name, parameter in trainable(unet).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name and source is None:
            # again in fp32: peft drew it in the base's precision
            torch.nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    if source is not None:
        read_lora(unet, source)  # again in fp32: it was read in the base's precision


def spare_casts(unet: Any) -> None:
    """For runs under autocast, which takes a LoRA's input to its own dtype: peft would take it to
    fp32 before, and autograd would keep a copy for each LoRA. The numbers are the same.

    DoRA computes norms in its input's dtype, and stays as it is.
    """
    for module in unet.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False


def trainable(unet: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name."""
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}
