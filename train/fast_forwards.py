"""Faster forward passes for training: LoRA layers, attention and ResNet blocks.

They compute what those of peft and diffusers do, in fewer operations.

The modules stay peft's and diffusers', and so do names, parameters, loading and saving; only
``forward`` is replaced, and only where it is known to be the plain formula.

Shapes: B batch, N tokens of all images together, r the rank, s the scale of a LoRA (alpha / r, or
alpha / sqrt(r) in rsLoRA).
"""

from types import MethodType
from typing import Any

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
    forward = getattr(layer, "forward", None)
    if getattr(forward, "__func__", None) is not _lora_linear:
        return False
    return not (layer.disable_adapters or layer.merged)


def _lora_linear(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """[..., in] to [..., out]."""
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, inputs)  # type: ignore[no-any-return]
    (name,) = layer.lora_A
    down, up, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    if type(layer.base_layer) is torch.nn.Linear:
        return _adapted((layer,), inputs)[0]
    # A quantized base has its own product. The scale goes to the small factor.
    output: torch.Tensor = layer.base_layer(inputs)
    inputs = inputs.to(output.dtype).flatten(0, -2)
    small = linear(inputs, _scaled(down, scale).to(output.dtype))  # [N, r]
    sum_ = torch.addmm(output.flatten(0, -2), small, up.to(output.dtype).t())
    return sum_.to(output.dtype).view_as(output)


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
    tensors: list[Any] = []
    for layer in layers:
        (name,) = layer.lora_A
        base = layer.base_layer
        tensors += base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight
    scales = tuple(layer.scaling[next(iter(layer.lora_A))] for layer in layers)
    outputs: tuple[torch.Tensor, ...] = _AdaptedLinears.apply(inputs, scales, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def _projected(layers: tuple[Any, ...], inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The outputs of linear layers on one input, together where they can be."""
    if all(_is_direct(layer) and type(layer.base_layer) is torch.nn.Linear for layer in layers):
        return _adapted(layers, inputs)
    return tuple(layer(inputs) for layer in layers)


class _AdaptedLinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for layers i that share x [..., in], with W_i and
    b_i frozen.

    peft has autograd do this: it multiplies [N, out] by s, adds it in another pass, and adds up the
    gradients of x layer by layer. Here s goes into A [r, in], the A_i are one matrix [R, in], and
    what is added to [N, out] or [N, in] is added by the matrix product itself.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, scales: tuple[float, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        weights, biases, downs, ups = (tensors[start::4] for start in range(4))
        flat, dtype = inputs.flatten(0, -2), inputs.dtype
        ranks = [down.shape[0] for down in downs]
        downs = tuple(map(_scaled, downs, scales))
        down = (downs[0] if len(downs) == 1 else torch.cat(downs)).to(dtype)
        ups = tuple(up.to(dtype) for up in ups)
        weights = tuple(weight.to(dtype) for weight in weights)  # they mostly are
        small = flat @ down.t()  # [N, R]
        parts, outputs = torch.split(small, ranks, 1), []
        for weight, bias, part, up in zip(weights, biases, parts, ups, strict=True):
            output = linear(flat, weight, bias).addmm_(part, up.t())
            outputs.append(output.view(*inputs.shape[:-1], -1))
        ctx.scales, ctx.ranks, ctx.grad_dtype = scales, ranks, tensors[2].dtype
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
        down_grad = (small_grad.t() @ flat).to(ctx.grad_dtype)  # [R, in]
        result: list[Any] = [input_grad, None]
        for grad, part, down_part, scale in zip(
            grads,
            torch.split(small, ctx.ranks, 1),
            torch.split(down_grad, ctx.ranks),
            ctx.scales,
            strict=True,
        ):
            up_grad = (grad.t() @ part).to(ctx.grad_dtype)  # [out, r]
            result += None, None, _scaled(down_part, scale), up_grad
        return tuple(result)


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
