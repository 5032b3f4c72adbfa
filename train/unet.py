"""The UNet of a run, made ready to train."""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from runtime.devices import Precision
from sdxl.load import load_unet
from train.adapters import add_adapter, spare_casts
from train.config import TrainConfig
from train.distributed import World
from train.quantize import quantize

COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": True}
MOST_GRAPHS = 64
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)  # what FSDP gathers at a time


def build_unet(
    config: TrainConfig, precision: Precision, world: World, checkpoint: Path | None = None
) -> Any:
    """The base's UNet on this rank's device: adapters on it, or all of it trained. ``checkpoint``
    is what the run resumes from.

    A frozen base stands in the forward's dtype; what is trained is fp32, or bf16 with
    ``pure_bf16``. A full fine-tune over several ranks is sharded over them (FSDP2).
    """
    unet: Any = load_unet(config.base, weight_dtype(config, precision))
    if config.base_quant != "none":
        quantize(unet, config.base_quant, precision.dtype, world.device)
    if config.full:
        unet.requires_grad_(True)
    else:
        add_adapter(unet, config, checkpoint)
    if precision.autocast:
        _keep_norms_in_half(unet)
        spare_casts(unet)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if uses_checkpointing(config, world.device):
        unet.enable_gradient_checkpointing()
    if config.full and world.size > 1:
        _shard(unet, precision, world)
    else:
        unet.to(world.device)
    if config.compile:
        _compile(unet)
    return unet.train()


def weight_dtype(config: TrainConfig, precision: Precision) -> torch.dtype:
    """Of the base's weights as they are kept."""
    if not config.full:
        return precision.dtype
    return torch.bfloat16 if config.pure_bf16 else torch.float32


def uses_checkpointing(config: TrainConfig, device: torch.device) -> bool:
    asked = config.gradient_checkpointing
    return device.type == "cuda" if asked is None else asked


def _keep_norms_in_half(unet: Any) -> None:
    """Norms with half-precision weights compute in it, as they do when diffusers draws (their
    statistics are fp32 inside).

    CUDA's autocast would take input, weight and bias to fp32 each time: three more kernels a norm,
    and what backward keeps of it twice as large.
    """
    for module in unet.modules():
        if isinstance(module, NORMS) and module.weight.dtype != torch.float32:
            norm: Any = module
            norm.forward = MethodType(_norm_without_autocast, norm)


def _norm_without_autocast(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        normed: torch.Tensor = type(norm).forward(norm, hidden.to(norm.weight.dtype))
        return normed


def _shard(unet: Any, precision: Precision, world: World) -> None:
    # The inputs keep their dtype: crop coordinates above 256 are no bf16 numbers.
    policy = MixedPrecisionPolicy(
        param_dtype=precision.dtype if precision.autocast else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in unet.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(unet, mesh=mesh, mp_policy=policy)


def reshard(unet: Any) -> None:
    """Drop what FSDP has gathered, so that it sees weights that were changed in place."""
    for module in unet.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _compile(unet: Any) -> None:
    """Each transformer block, when it is first run.

    One graph serves all buckets, as sizes are symbols in it; there are more for a batch of one, for
    no gradients, and for blocks of other widths. ``fullgraph``: what cannot be compiled, or would
    be compiled for ever anew, is an error, and never falls back to eager in silence.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    unet.compile_repeated_blocks(**COMPILE)
