"""The UNet of a run, made ready to train: adapters, quantization, checkpointing, sharding."""

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import regex
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch.nn.functional import group_norm, layer_norm
from torch.utils.checkpoint import checkpoint

from runtime.devices import Precision
from sdxl.base import Base
from sdxl.load import load_unet, model_without_weights
from sdxl.lora.apply import load_lora, read_lora
from sdxl.lora.names import LORA
from train.config import TrainConfig
from train.distributed import DistContext, is_fsdp
from train.fast_forwards import use_direct_forwards
from train.quantize import quantize

# Adapters: LoRA and its relatives on the UNet, through peft.

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

    Some patterns take practically endless time on a short name. Python's ``re`` cannot be stopped;
    ``regex``, which reads the same patterns, has a timeout.

    Raises:
        ValueError: no regex, or one that takes too long.
    """
    shown = f"--targets {pattern[:100]}"
    end = time.monotonic() + MATCH_SECONDS
    try:
        compiled = regex.compile(pattern)
        return [
            name
            for name in names
            if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 0.001))
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

    A resumed run adapts the layers that its checkpoint adapts, even if the settings would now
    select others.

    Raises:
        ValueError: the settings or the LoRA file do not fit this UNet.
    """
    source = config.init_lora if checkpoint is None else checkpoint / LORA
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


def trainable(unet: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name."""
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


# The UNet itself: loaded, cast, checkpointed, sharded, compiled.

COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": True}
MAX_GRAPHS = 256
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)  # compiled; what FSDP gathers at a time


def build_unet(
    config: TrainConfig,
    base: Base,
    precision: Precision,
    world: DistContext,
    checkpoint: Path | None = None,
) -> Any:
    """The base's UNet on this rank's device: adapters on it, or all of it trained. ``checkpoint``
    is what the run resumes from.

    A frozen base has the forward's dtype; trained weights are fp32, or bf16 with ``pure_bf16``. A
    full fine-tune over several ranks is sharded over them (FSDP2).
    """
    dtype, is_sharded = weight_dtype(config, precision), config.full and world.size > 1
    unet: Any = (
        model_without_weights("unet", base.unet.config).to(dtype)
        if is_sharded
        else load_unet(base.unet, dtype)
    )
    if config.base_quant != "none":
        quantize(unet, config.base_quant, precision.dtype, world.device)
    if config.full:
        unet.requires_grad_(True)
    else:
        add_adapter(unet, config, checkpoint)
    if precision.autocast:
        keep_norms_in_half(unet)
    use_direct_forwards(unet)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if uses_checkpointing(config, world.device):
        unet.enable_gradient_checkpointing(_checkpointed(unet))
    if is_sharded:
        _shard(unet, precision, world)
        _fill(unet, base, dtype, world)
    else:
        unet.to(world.device)
    if config.compile:
        compile_blocks(unet)
    return unet.train()


def weight_dtype(config: TrainConfig, precision: Precision) -> torch.dtype:
    """The dtype in which the base's weights are kept."""
    if not config.full:
        return precision.dtype
    return torch.bfloat16 if config.pure_bf16 else torch.float32


def uses_checkpointing(config: TrainConfig, device: torch.device) -> bool:
    choice = config.gradient_checkpointing
    return device.type == "cuda" if choice is None else choice


def _checkpointed(unet: Any) -> Callable[..., Any]:
    """Checkpointing: runs a block and keeps only its inputs. Nothing in SDXL is random, so the
    state of the generators, which would be read from the GPU at each block, need not be kept."""
    is_random = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in unet.modules())
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=is_random)


def keep_norms_in_half(unet: Any) -> None:
    """Norms give autocast's dtype, and compute in it too, as they do when diffusers draws (their
    statistics are fp32 inside); but group norms with fp32 weights compute in fp32.

    CUDA's autocast would take input, weight and bias to fp32 each time: three more kernels a norm,
    and what it gives, and what backward keeps of it, twice as large.

    Of a group norm, weights that are rounded to bf16 make the error of gradients larger by a
    quarter, of a layer norm they do not (docs/benchmarks.md). CUDA has no group norm of a half
    input and fp32 weights, so its input is taken to fp32, and its output back.
    """
    for module in unet.modules():
        if isinstance(module, NORMS):
            norm: Any = module
            norm.forward = MethodType(_norm_in_half, norm)


def _norm_in_half(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    kind, weight, bias = hidden.device.type, norm.weight, norm.bias
    in_autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if in_autocast else weight.dtype
    with torch.autocast(kind, enabled=False):
        if isinstance(norm, torch.nn.GroupNorm):
            hidden = hidden.to(weight.dtype)
            return group_norm(hidden, norm.num_groups, weight, bias, norm.eps).to(dtype)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
        return layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps)


def _shard(unet: Any, precision: Precision, world: DistContext) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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


def _fill(unet: Any, base: Base, dtype: torch.dtype, world: DistContext) -> None:
    """Give a sharded UNet the base's weights: the main rank reads them and hands all ranks their
    parts, tensor by tensor. (A UNet in fp32 takes 10.3 GB of main memory: not once a rank.)"""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    weights = load_unet(base.unet, dtype).state_dict() if world.is_main else {}
    world.wait()  # the main rank may read for long
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(unet, weights, options=options)


def reshard(unet: Any) -> None:
    """Drop what FSDP has gathered, so that it sees weights that were changed in place."""
    for module in unet.modules():
        if is_fsdp(module):
            module.reshard()


def compile_blocks(unet: Any) -> None:
    """Compile each transformer and ResNet block when it is first run.

    One graph serves all buckets, as sizes are symbols in it; there are more for a batch of one, for
    no gradients, and for blocks of other widths. ``fullgraph``: what cannot be compiled, or would
    be compiled for ever anew, is an error, and never falls back to eager in silence.
    """
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for module in unet.modules():
        if isinstance(module, BLOCKS):
            module.compile(**COMPILE)
