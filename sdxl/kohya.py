"""kohya's names for the modules of SDXL's UNet: ``lora_unet_`` and the original layout's, with
``_`` for ``.``."""

import re
from collections.abc import Iterable

KEY = "lora_unet_"
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def key_table(names: Iterable[str]) -> dict[str, str]:
    """The modules ``names`` of a UNet (diffusers' names) by their kohya keys without
    ``lora_unet_``, and by their own names with ``_``, as some trainers write them."""
    names = list(names)
    table = {name.replace(".", "_"): name for name in names}
    return table | {original.replace(".", "_"): n for n, original in _originals(names).items()}


def kohya_keys(names: Iterable[str]) -> dict[str, str]:
    """The kohya key of each module of a UNet, by diffusers' name."""
    return {n: KEY + original.replace(".", "_") for n, original in _originals(names).items()}


def _originals(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    layers = 1 + max(
        (int(m[1]) for m in (re.match(r"down_blocks\.\d+\.resnets\.(\d+)", n) for n in names) if m),
        default=0,
    )
    return {name: _original(name, layers, names) for name in names}


def _original(name: str, layers: int, names: list[str]) -> str:
    if name in _TOP:
        return _TOP[name]
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, number, *inner = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, *inner = rest
        start = int(block) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{1 + start + layers}.0.op"
        if kind == "upsamplers":
            attends = any(n.startswith(f"up_blocks.{block}.attentions") for n in names)
            return f"output_blocks.{start + layers}.{1 + attends}.conv"
        at = start + int(number)
        place = f"input_blocks.{1 + at}" if side == "down_blocks" else f"output_blocks.{at}"
        place += ".1" if kind == "attentions" else ".0"
    if kind == "resnets":
        inner = [_RESNET.get(inner[0], inner[0])]
    return ".".join([place, *inner])
