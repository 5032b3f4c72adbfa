"""Faster forward passes for training: LoRA layers, attention and ResNet blocks; and one cast of all
LoRA matrices for each pass.

They compute what those of peft and diffusers do, in fewer operations.

The modules stay peft's and diffusers', and so do names, parameters, loading and saving; only
``forward`` is replaced, and only where it is known to be the plain formula.

Shapes: B batch, N tokens of all images together, r the rank, s the scale of a LoRA (alpha / r, or
alpha / sqrt(r) in rsLoRA).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora import Conv2d, LoraLayer
from torch.nn.functional import linear, scaled_dot_product_attention


def use_direct_forwards(unet: Any) -> None:
    """Replace ``forward`` of all modules of ``unet`` that have a direct one here.

    Modules that compute more keep their own: DoRA, LoRAs with dropout or biases, attention with
    norms, blocks that scale their output.
    """
    for module in unet.modules():
        if isinstance(module, LoraLayer) and _is_plain(module):
            forward: Any = _lora_convolution if isinstance(module, Conv2d) else _lora_linear
            module.cast_matrices = None
        elif isinstance(module, Attention) and _has_no_extras(module):
            forward = _attention
        elif isinstance(module, ResnetBlock2D) and _is_sdxls(module):
            forward = _resnet_block
        else:
            continue
        module.forward = MethodType(forward, module)


# LoRA: y = x W^T + b + s (x A^T) B^T


def _is_plain(layer: Any) -> bool:
    """Whether a LoRA layer computes the formula and no more."""
    if not isinstance(layer.base_layer, torch.nn.Linear | torch.nn.Conv2d):
        return False
    names = list(layer.lora_A)
    return (
        len(names) == 1
        and layer.active_adapters == names
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not getattr(layer, "fan_in_fan_out", False)
        and all(isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values())
    )


def _is_direct(layer: Any) -> bool:
    """Whether the layer is a LoRA whose forward is ``_lora_linear``, and is switched on."""
    return _has_forward(layer, _lora_linear) and not (layer.disable_adapters or layer.merged)


def _has_forward(module: Any, function: Any) -> bool:
    return getattr(getattr(module, "forward", None), "__func__", None) is function


def _lora_linear(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """[..., in] to [..., out]."""
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, inputs)  # type: ignore[no-any-return]
    if type(layer.base_layer) is torch.nn.Linear:
        return _adapted((layer,), inputs)[0]
    # A quantized base has its own product.
    output: torch.Tensor = layer.base_layer(inputs)
    down, (up,) = _matrices((layer,), output.dtype)
    small = linear(inputs.to(output.dtype).flatten(0, -2), down)  # [N, r]
    return torch.addmm(output.flatten(0, -2), small, up.t()).to(output.dtype).view_as(output)


def _lora_convolution(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """[B, in, H, W] to [B, out, H', W']."""
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, inputs)  # type: ignore[no-any-return]
    (name,) = layer.lora_A
    output: torch.Tensor = layer.base_layer(inputs)
    small = layer.lora_A[name](inputs)
    added: torch.Tensor = layer.lora_B[name](_scaled(small, layer.scaling[name]))
    return output + added


def _scaled(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return tensor if scale == 1 else tensor * scale


def _adapted(layers: tuple[Any, ...], inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The outputs of LoRA layers on one input, if all are on plain linear layers."""
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        inputs = inputs.to(torch.get_autocast_dtype(kind))
    down, ups = _matrices(layers, inputs.dtype)
    bases = [layer.base_layer for layer in layers]
    tensors = *ups, *(base.weight for base in bases), *(base.bias for base in bases)
    ranks = [up.shape[1] for up in ups]
    outputs: tuple[torch.Tensor, ...] = _AdaptedLinears.apply(inputs, ranks, down, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def _projected(layers: tuple[Any, ...], inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The outputs of linear layers on one input, together where they can be."""
    if _can_join(layers):
        return _adapted(layers, inputs)
    return tuple(layer(inputs) for layer in layers)


def _can_join(layers: tuple[Any, ...]) -> bool:
    return all(_is_direct(layer) and type(layer.base_layer) is torch.nn.Linear for layer in layers)


class _AdaptedLinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for layers i that share x [..., in], with W_i and
    b_i frozen; ``down`` [R, in] is all s_i A_i, one below the other.

    peft has autograd do this: it multiplies [N, out] by s, adds it in another pass, and adds up the
    gradients of x layer by layer. Here s is in A [r, in], the A_i are one matrix, and what is added
    to [N, out] or [N, in] is added by the matrix product itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        ranks: list[int],
        down: torch.Tensor,
        *tensors: Any,  # all B_i [out, r] in the inputs' dtype; all W_i; all b_i, or None
    ) -> tuple[torch.Tensor, ...]:
        num, flat = len(ranks), inputs.flatten(0, -2)
        ups, biases = tensors[:num], tensors[2 * num :]
        weights = [weight.to(inputs.dtype) for weight in tensors[num : 2 * num]]  # they mostly are
        small = flat @ down.t()  # [N, R]
        parts, outputs = torch.split(small, ranks, 1), []
        for weight, bias, part, up in zip(weights, biases, parts, ups, strict=True):
            output = linear(flat, weight, bias).addmm_(part, up.t())
            outputs.append(output.view(*inputs.shape[:-1], -1))
        ctx.ranks = ranks
        ctx.save_for_backward(inputs, small, down, *ups, *weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        inputs, small, down, *rest = ctx.saved_tensors
        num, flat = len(grads), inputs.flatten(0, -2)
        ups, weights = rest[:num], rest[num:]
        grads = tuple(grad.flatten(0, -2) for grad in grads)
        parts = [grad @ up for grad, up in zip(grads, ups, strict=True)]
        small_grad = parts[0] if num == 1 else torch.cat(parts, 1)  # [N, R]
        input_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = small_grad @ down
            for grad, weight in zip(grads, weights, strict=True):
                input_grad.addmm_(grad, weight)
            input_grad = input_grad.view(inputs.shape)
        down_grad = small_grad.t() @ flat  # [R, in]
        up_grads = [
            grad.t() @ part
            for grad, part in zip(grads, torch.split(small, ctx.ranks, 1), strict=True)
        ]
        return input_grad, None, down_grad, *up_grads, *[None] * 2 * num


# The matrices A and B are fp32, and the products are in autocast's dtype.


class Matrices(NamedTuple):
    """Those of LoRA layers that share an input, as their products take them."""

    down: torch.Tensor  # [R, in]: all s_i A_i, one below the other
    ups: tuple[torch.Tensor, ...]  # B_i [out, r]


def _matrices(layers: tuple[Any, ...], dtype: torch.dtype) -> Matrices:
    """Of ``layers`` in ``dtype``: those of a ``LoraCasts`` at hand, or else cast here."""
    casts: Matrices | None = layers[0].cast_matrices
    if casts is not None and len(casts.ups) == len(layers) and casts.down.dtype == dtype:
        return casts
    pairs = [_lora_of(layer) for layer in layers]
    downs = [_scaled(down, scale) for down, _, scale in pairs]
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    return Matrices(down.to(dtype), tuple(up.to(dtype) for _, up, _ in pairs))


def _lora_of(layer: Any) -> tuple[Any, Any, float]:
    """A [r, in], B [out, r] and s."""
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


class LoraCasts:
    """Casts the matrices of all linear LoRA layers that have a direct forward together, in three
    foreach operations a pass, and their gradients back in two. Each layer would take two of its
    own for each matrix. The bits are the same.

    It keeps the parameters that are there when it is made.
    """

    def __init__(self, unet: Any, dtype: torch.dtype) -> None:
        self.dtype, self.groups = dtype, _groups(unet)
        loras = [[_lora_of(layer) for layer in layers] for layers in self.groups]
        self._scales = [scale for group in loras for _, _, scale in group]
        self._ranks = [[down.shape[0] for down, _, _ in group] for group in loras]
        self._weights = [down for group in loras for down, _, _ in group]
        self._weights += [up for group in loras for _, up, _ in group]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the layers use casts of what the weights are on entry. A backward pass
        must come before the exit, as checkpointing computes layers again in it."""
        if not self.groups:
            yield
            return
        cast: Any = _CastMatrices.apply(self.dtype, self._scales, self._ranks, *self._weights)  # type: ignore[no-untyped-call]
        ups = iter(cast[len(self.groups) :])
        for layers, down in zip(self.groups, cast, strict=False):
            layers[0].cast_matrices = Matrices(down, tuple(next(ups) for _ in layers))
        try:
            yield
        finally:
            for layers in self.groups:
                layers[0].cast_matrices = None


def _groups(unet: Any) -> list[tuple[Any, ...]]:
    """All LoRA layers that ask for their ``_matrices``, together where they share an input."""
    joined = []
    for module in unet.modules():
        if _has_forward(module, _attention):
            names = ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v")
            layers = tuple(getattr(module, name) for name in names)
            joined += [layers] if _can_join(layers) else []
    grouped = {layer for layers in joined for layer in layers}
    return joined + [(m,) for m in unet.modules() if _is_direct(m) and m not in grouped]


class _CastMatrices(torch.autograd.Function):
    """All A [r, in], then all B [out, r], to all s A in ``dtype``, joined by group to [R, in], and
    then all B in ``dtype``. ``ranks`` are those of each group."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        scales: list[float],
        ranks: list[list[int]],
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.ranks, ctx.dtype = scales, ranks, weights[0].dtype
        num = len(scales)
        downs = weights[:num]
        joined: list[torch.Tensor] = []
        at = 0
        for group in ranks:
            joined.append(downs[at].new_empty((sum(group), downs[at].shape[1]), dtype=dtype))
            at += len(group)
        ups = [torch.empty_like(weight, dtype=dtype) for weight in weights[num:]]
        if any(scale != 1 for scale in scales):
            downs = tuple(torch._foreach_mul(downs, scales))
        torch._foreach_copy_(_parts(joined, ranks), downs)
        torch._foreach_copy_(ups, weights[num:])
        return *joined, *ups

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        num = len(ctx.ranks)
        grads_in_half = _parts(grads[:num], ctx.ranks) + list(grads[num:])
        present = [half for half in grads_in_half if half is not None]
        cast = [torch.empty_like(half, dtype=ctx.dtype) for half in present]
        if present:
            torch._foreach_copy_(cast, present)
        rest = iter(cast)
        results = [None if half is None else next(rest) for half in grads_in_half]
        scaled = [
            (grad, scale)
            for grad, scale in zip(results, ctx.scales, strict=False)
            if grad is not None and scale != 1
        ]
        if scaled:
            torch._foreach_mul_([grad for grad, _ in scaled], [scale for _, scale in scaled])
        return None, None, None, *results


def _parts(joined: Sequence[Any], ranks: list[list[int]]) -> list[Any]:
    """Rows of joined matrices by layer; None for each layer of a group that is None."""
    return [
        part
        for matrix, group in zip(joined, ranks, strict=True)
        for part in ([None] * len(group) if matrix is None else torch.split(matrix, group))
    ]


# Attention and ResNet blocks: without diffusers' division by a factor that is 1 in SDXL


def _has_no_extras(attention: Any) -> bool:
    """Whether it is attention as in SDXL: projections and nothing else."""
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.rescale_output_factor == 1
        and not attention.residual_connection
        and all(
            getattr(attention, name, None) is None
            for name in ("spatial_norm", "group_norm", "norm_q", "norm_k")
        )
        and not attention.norm_cross
    )


def _attention(
    attention: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **extras: Any,
) -> torch.Tensor:
    """[B, tokens, width] to the same."""
    if attention_mask is not None or extras:
        return type(attention).forward(  # type: ignore[no-any-return]
            attention, hidden_states, encoder_hidden_states, attention_mask, **extras
        )
    layers = attention.to_q, attention.to_k, attention.to_v
    if encoder_hidden_states is None:
        projected = _projected(layers, hidden_states)
    else:
        projected = (layers[0](hidden_states), *_projected(layers[1:], encoder_hidden_states))
    query, key, value = (
        tensor.view(*tensor.shape[:2], attention.heads, -1).transpose(1, 2) for tensor in projected
    )
    mixed = scaled_dot_product_attention(query, key, value)  # [B, heads, tokens, width of a head]
    output = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
    return attention.to_out[1](output)  # type: ignore[no-any-return]


def _is_sdxls(block: Any) -> bool:
    return (
        block.output_scale_factor == 1
        and block.upsample is None
        and block.downsample is None
        and block.time_emb_proj is not None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
    )


def _resnet_block(block: Any, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """[B, in, H, W] and the embedding of the timesteps to [B, out, H, W]."""
    inputs, act = hidden, block.nonlinearity
    hidden = block.conv1(act(block.norm1(hidden)))
    hidden = hidden + block.time_emb_proj(act(time))[:, :, None, None]
    hidden = block.conv2(block.dropout(act(block.norm2(hidden))))
    if block.conv_shortcut is not None:
        # DDP warns of gradients whose strides are not their parameters'.
        inputs = block.conv_shortcut(inputs.contiguous() if block.training else inputs)
    return inputs + hidden
