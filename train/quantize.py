"""Stores the frozen base of a LoRA in 8 or 4 bits: int8 by a layer below, nf4 by bitsandbytes."""

import re
from typing import Any

import torch
from torch.nn.functional import linear

_LINEARS = re.compile(r".*\.(transformer_blocks\..*|proj_in|proj_out)")
INT8_LEVELS = 255  # -128 to 127


def is_quantized(name: str, module: torch.nn.Module) -> bool:
    """Whether a module of the UNet is among those that ``quantize`` replaces."""
    return isinstance(module, torch.nn.Linear) and bool(_LINEARS.fullmatch(name))


def quantize(unet: Any, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the linears of the transformers: ``int8`` per output channel, or ``nf4`` in blocks of
    64 (bitsandbytes). ``dtype`` is the forward's. What is packed as nf4 is moved to ``device``.

    Raises:
        ValueError: the package that packs nf4 is not installed.
    """
    make = Int8Linear if kind == "int8" else _nf4_maker(dtype, device)
    for name, module in list(unet.named_modules()):
        if is_quantized(name, module):
            unet.set_submodule(name, make(module))


def _nf4_maker(dtype: torch.dtype, device: torch.device) -> Any:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ValueError(
            f"--base-quant nf4 needs a package more: pip install '.[nf4]' ({error})"
        ) from error

    def make(module: torch.nn.Linear) -> Any:
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
        return packed.to(device)  # the move packs it

    return make


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer whose weight W [out, in] is an int8 matrix Q times a scale per row:
    scale = max |W| / 127.5 and Q = round(W / scale), symmetric, without a zero point.

    (torchao's layer rounds the same way, but keeps each weight in half precision for the backward
    pass: without checkpointing that is a second base in memory.)
    """

    def __init__(self, module: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.dtype = module.weight.dtype
        wide = module.weight.detach().float()
        scale = wide.abs().amax(dim=1, keepdim=True) * 2 / INT8_LEVELS
        scale = torch.where(scale > 0, scale, 1.0)
        levels = (wide / scale).round().clamp(-128, 127).to(torch.int8)
        # Parameters, and not buffers, which DDP would send around at each step.
        self.levels = torch.nn.Parameter(levels, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)  # [out, 1]
        self.bias = module.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """W in the dtype that it had: DoRA takes norms of it."""
        return _weight(self.levels, self.scale, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in autocast's dtype or else the input's."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        product: torch.Tensor = _Int8Product.apply(input, self.levels, self.scale)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T for a frozen int8 W. Backward keeps nothing of its own: it multiplies Q out again."""

    @staticmethod
    def forward(input: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return linear(input, _weight(levels, scale, input.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, levels, scale = inputs
        ctx.save_for_backward(levels, scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        levels, scale = ctx.saved_tensors
        return grad @ _weight(levels, scale, grad.dtype), None, None


def _weight(levels: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W [out, in], rounded once: the product is of fp32."""
    return (levels * scale).to(dtype)
