"""A frozen base in 8 or 4 bits: the linears of its transformers, most of SDXL's weights."""

import re
from typing import Any

import torch

_LINEARS = re.compile(r".*\.(transformer_blocks\..*|proj_in|proj_out)")


def is_quantized(name: str, module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and bool(_LINEARS.fullmatch(name))


def quantize(unet: Any, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace weights in place: ``int8`` per output channel (torchao), or ``nf4`` in blocks of 64
    (bitsandbytes). ``dtype`` is the forward's. What is packed as nf4 is moved to ``device``.

    Raises:
        ValueError: the package that does it is not installed.
    """
    try:
        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(unet, Int8WeightOnlyConfig(), filter_fn=lambda m, name: is_quantized(name, m))
            return
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ValueError(
            f"--base-quant {kind} needs a package more: pip install '.[{kind}]' ({error})"
        ) from error
    for name, module in list(unet.named_modules()):
        if is_quantized(name, module):
            packed = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            packed.bias = module.bias
            unet.set_submodule(name, packed.to(device))  # the move packs it
