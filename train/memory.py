"""Estimates how much memory a run will take, by part, and how many operations, before it is tried.

Weights, gradients and optimizer state are counted. Activations are what autograd saves in a pass
of the real UNet over fake tensors, which have shapes and no data: attention's are those of a fused
kernel. What kernels use for themselves is a guess, so a peak is an estimate.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime.devices import DTYPES
from sdxl.base import Base
from sdxl.lora.apply import num_lora_parameters
from shards.buckets import Size
from train.config import TrainConfig, check_processes
from train.cuda_graphs import why_no_graphs
from train.distributed import DistContext
from train.fast_forwards import use_direct_forwards
from train.quantize import is_quantized
from train.unet import BLOCKS, add_adapter, keep_norms_in_half, trainable

QUANT_BYTES = {"int8": 1.01, "nf4": 0.57}  # a weight, with its scales
FREE_SHARE = 0.9  # of what a card has free, that an estimate may take
# A forward and a backward pass, in forward passes (counted: docs/benchmarks.md): the frozen weights
# of a LoRA's base need no gradients.
LORA_PASSES, FULL_PASSES = 2.1, 3.0
# Dense bf16 FLOP/s with fp32 accumulation that the makers state, and the share of it that published
# UNet runs reached: MLPerf Training 4.0's log of SD2 at 512 px on an H100, 127.4 images/s, is 31 %
# (derived); MosaicML's 36.3 on an A100 is 28 %. For a 4090 none is published.
CARDS = {"RTX 4090": (165.2e12, 0.31), "A100": (312e12, 0.28), "H100 SXM": (989e12, 0.31)}
WORKING_TENSORS = 4  # of the largest activation's size, in use beside what is saved


def size_text(num_bytes: float) -> str:
    """E.g. 5.44 GB, or 12.3 MB."""
    if num_bytes < 1e8:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.2f} GB"


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that autograd saves for one sample."""

    total: int  # without checkpointing
    checkpointed: int  # with it, and the largest block being recomputed
    largest: int  # of the tensors


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one process at the peak."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    working: int

    @property
    def peak(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.average
            + self.activations
            + self.working
        )


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Parameters of a UNet, counted."""

    quantizable: int  # of the base, in the layers that --base-quant packs
    other: int  # of the base
    largest: int  # of the tensors
    trained: list[torch.Size]


class Estimator:
    """Estimates for one base on a CUDA card (or ``device``), under differing settings."""

    def __init__(self, base: Base, tokens: int, device: str = "cuda", num: int = 1) -> None:
        self.num = num  # processes, over which a full fine-tune is sharded
        self.unet_config = base.unet.config
        self.tokens, self.on_cuda = tokens, device.startswith("cuda")
        self._memo: dict[Any, Any] = {}

    def num_trained(self, config: TrainConfig) -> int:
        """Parameters that the run trains."""
        if config.init_lora is not None:
            return num_lora_parameters(config.init_lora)
        return sum(shape.numel() for shape in self._sizes(config).trained)

    def estimate(self, config: TrainConfig, bucket: Size) -> Estimate:
        """The peak of the run: in the backward pass of a batch of ``bucket``."""
        sizes, dtype = self._sizes(config), self._dtype(config)
        trained = self.num_trained(config)
        weight_bytes = dtype.itemsize if not config.full or config.pure_bf16 else 4
        base = sizes.quantizable * QUANT_BYTES.get(config.base_quant, weight_bytes)
        base += sizes.other * weight_bytes
        lora = 0 if config.full else 4 * trained
        # Autocast keeps a half-precision copy of what is trained in fp32 for the forward pass.
        casts = 0 if config.pure_bf16 or dtype == torch.float32 else dtype.itemsize * trained
        state = state_bytes(config.optimizer, sizes.trained)
        if config.init_lora is not None:  # the shapes are of another LoRA than that of the file
            state = state * trained // sum(shape.numel() for shape in sizes.trained)
        per_grad = 2 if config.pure_bf16 else 4
        saved = self.activations(config, bucket)
        samples = config.batch_size * (
            saved.checkpointed if self._checkpoints(config) else saved.total
        )
        # Graphs keep the memory of the largest pass; sizes without a graph need theirs beside it.
        num_passes = 2 if self._has_graphs(config) else 1
        shares = self.num if config.full else 1
        return Estimate(
            weights=round((base + lora + casts) / shares),
            gradients=per_grad
            * (3 * sizes.largest if config.fused_backward else trained)
            // shares,
            optimizer=state // shares,
            average=0 if config.ema_on_cpu or not config.ema else 4 * trained // shares,
            activations=num_passes * samples,
            working=num_passes * WORKING_TENSORS * config.batch_size * saved.largest,
        )

    def activations(self, config: TrainConfig, bucket: Size) -> Activations:
        """What autograd saves for one sample of ``bucket``, by a pass over fake tensors."""
        dtype = self._dtype(config)
        trained_dtype = dtype if config.pure_bf16 else torch.float32  # of what is trained
        key = self._key(config), trained_dtype, min(bucket), max(bucket)
        if key not in self._memo:
            self._memo[key] = _measure(
                self._unet(config), bucket, self.tokens, dtype, trained_dtype
            )
        activations: Activations = self._memo[key]
        return activations

    def flops(self, config: TrainConfig, bucket: Size) -> float:
        """Floating-point operations of one sample of ``bucket``, forward and backward: counted in a
        forward pass over fake tensors, times what a backward pass and recomputing are of it."""
        unet, dtype = self._unet(config), self._dtype(config)
        with FakeTensorMode(), torch.no_grad(), _autocast(dtype):
            tensors, inputs = _stand_ins(unet, bucket, self.tokens, dtype, dtype)
            # The fused kernels of a CPU are not counted.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                torch.func.functional_call(unet, tensors, (), inputs)
        passes = FULL_PASSES if config.full else LORA_PASSES
        return float(counter.get_total_flops() * (passes + self._checkpoints(config)))

    def advice(self, config: TrainConfig, bucket: Size) -> list[tuple[str, int]]:
        """Flags that would lower the peak, with the bytes that each saves, most first."""
        peak = self.estimate(config, bucket).peak
        savings = []
        for text, changes in _MEMORY_SAVERS:
            if text.startswith("--batch-size"):
                if config.batch_size == 1:
                    continue
                half = config.batch_size // 2
                text, changes = f"--batch-size {half}", {"batch_size": half}
            try:
                other = replace(config, **changes)
                check_processes(other, self.num)
            except ValueError:
                continue  # does not go with the rest
            if (saved := peak - self.estimate(other, bucket).peak) > peak // 50:
                savings.append((text, saved))
        return sorted(savings, key=lambda saving: -saving[1])

    def _key(self, config: TrainConfig) -> tuple[Any, ...]:
        adapter = config.adapter, config.lora_rank, config.targets, config.conv
        return config.full, *(() if config.full else adapter), self._dtype(config)

    def _sizes(self, config: TrainConfig) -> _Sizes:
        key = "sizes", *self._key(config)
        if key not in self._memo:
            unet, quantizable, other = self._unet(config), 0, 0
            for name, module in unet.named_modules():
                is_linear = is_quantized(name.removesuffix(".base_layer"), module)
                for part, parameter in module.named_parameters(recurse=False):
                    if "lora_" not in name and part == "weight" and is_linear:
                        quantizable += parameter.numel()
                    elif "lora_" not in name:
                        other += parameter.numel()
            self._memo[key] = _Sizes(
                quantizable=quantizable,
                other=other,
                largest=max(parameter.numel() for parameter in unet.parameters()),
                trained=[parameter.shape for parameter in trainable(unet).values()],
            )
        sizes: _Sizes = self._memo[key]
        return sizes

    def _unet(self, config: TrainConfig) -> Any:
        """The UNet on the meta device, with the run's adapter."""
        key = self._key(config)
        if key not in self._memo:
            with torch.device("meta"):
                unet: Any = UNet2DConditionModel.from_config(self.unet_config)
                if config.full:
                    unet.requires_grad_(True)
                else:
                    unet.requires_grad_(False)
                    add_adapter(unet, replace(config, init_lora=None))
                use_direct_forwards(unet)
                if self._dtype(config) != torch.float32:
                    keep_norms_in_half(unet)
            self._memo[key] = unet.train()
        return self._memo[key]

    def _dtype(self, config: TrainConfig) -> torch.dtype:
        name = config.precision
        if not self.on_cuda and not config.allow_cpu_bf16:
            name = "fp32"
        return DTYPES["bf16" if name == "auto" else name]

    def _checkpoints(self, config: TrainConfig) -> bool:
        choice = config.gradient_checkpointing
        return self.on_cuda if choice is None else choice

    def _has_graphs(self, config: TrainConfig) -> bool:
        device = "cuda" if self.on_cuda else "cpu"
        return config.cuda_graphs and why_no_graphs(config, device, self.num) is None


def choose_checkpointing(
    config: TrainConfig, base: Base, bucket: Size, tokens: int, world: DistContext
) -> TrainConfig:
    """The settings with ``gradient_checkpointing`` decided, where the user has not: off where a
    card has room for all that autograd saves of the largest bucket, and elsewhere on; off without
    a card. All ranks decide alike.
    """
    if config.gradient_checkpointing is not None:
        return config
    fits = world.device.type != "cuda"
    if not fits:
        estimator = Estimator(base, tokens, num=world.size)
        without = replace(config, gradient_checkpointing=False)
        free, _ = torch.cuda.mem_get_info(world.device)
        fits = estimator.estimate(without, bucket).peak < FREE_SHARE * free
    votes = world.gather(["fits" if fits else "does not fit"])
    return replace(config, gradient_checkpointing="does not fit" in votes)


_MEMORY_SAVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--gradient-checkpointing", {"gradient_checkpointing": True}),
    ("--batch-size", {}),
    ("--no-cuda-graphs", {"cuda_graphs": False}),
    ("--base-quant int8", {"base_quant": "int8"}),
    ("--base-quant nf4", {"base_quant": "nf4"}),
    ("--fused-backward", {"fused_backward": True}),
    ("--pure-bf16", {"pure_bf16": True}),
    ("--optimizer adafactor", {"optimizer": "adafactor"}),
    ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}),
    ("--ema-on-cpu", {"ema_on_cpu": True}),
)


# What optimizers keep of a parameter: bytes by its shape. In fp32, but for the 8-bit one.

_BLOCK_8BIT = 256  # values with one fp32 scale
_SMALL_8BIT = 4096  # below so many values bitsandbytes keeps fp32


def _adafactor_bytes(shape: torch.Size) -> int:
    """torch's keeps a mean over each of the last two dimensions: of a 3x3 convolution two thirds of
    its size."""
    numel = shape.numel()
    return 4 * (numel // shape[-1] + numel // shape[-2] if len(shape) > 1 else numel)


def _adamw8bit_bytes(shape: torch.Size) -> int:
    numel = shape.numel()
    return 8 * numel if numel < _SMALL_8BIT else 2 * (numel + 4 * -(-numel // _BLOCK_8BIT))


_STATE_BYTES: dict[str, Callable[[torch.Size], int]] = {
    "adamw": lambda shape: 8 * shape.numel(),
    "adamw8bit": _adamw8bit_bytes,
    "adafactor": _adafactor_bytes,
    "prodigy": lambda shape: 16 * shape.numel(),
}


def state_bytes(optimizer: str, shapes: Iterable[torch.Size]) -> int:
    """Bytes of the state that ``--optimizer`` keeps for parameters of these shapes, after a
    step."""
    return sum(map(_STATE_BYTES[optimizer], shapes))


def _measure(
    unet: Any, bucket: Size, tokens: int, dtype: torch.dtype, trained_dtype: torch.dtype
) -> Activations:
    with FakeTensorMode():
        tensors, inputs = _stand_ins(unet, bucket, tokens, dtype, trained_dtype)
        parameters = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
        with _autocast(dtype), _saved(unet, parameters) as seen:
            torch.func.functional_call(unet, tensors, (), inputs)
    return Activations(
        total=seen.total,
        checkpointed=seen.total
        - sum(seen.blocks)
        + seen.block_inputs
        + max(seen.blocks, default=0),
        largest=seen.largest,
    )


def _stand_ins(
    unet: Any, bucket: Size, tokens: int, dtype: torch.dtype, trained_dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights of the UNet, and inputs of one sample, to be made under ``FakeTensorMode``."""
    config = unet.config
    added = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    tensors = {
        name: torch.empty(
            p.shape,
            dtype=trained_dtype if p.requires_grad else dtype,
            requires_grad=p.requires_grad,
        )
        for name, p in unet.named_parameters()
    }
    width, height = bucket[0] // 8, bucket[1] // 8
    inputs = {
        "sample": torch.empty(1, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.empty(1, tokens, config.cross_attention_dim, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(1, added, dtype=dtype),
            "time_ids": torch.empty(1, 6),
        },
        "return_dict": False,
    }
    return tensors, inputs


def _autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


class _Seen:
    total = largest = block_inputs = 0

    def __init__(self) -> None:
        self.blocks: list[int] = []


@contextmanager
def _saved(unet: Any, parameters: set[int]) -> Iterator[_Seen]:
    """Count the storages that autograd saves, and those that each checkpointed block does."""
    seen, storages, starts = _Seen(), {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in storages:
            storages[storage._cdata] = storage  # held, so that its address is not used again
            seen.total += storage.nbytes()
            seen.largest = max(seen.largest, storage.nbytes())
        return tensor

    def before(module: Any, args: Any) -> None:
        starts.append(seen.total)
        seen.block_inputs += sum(a.nbytes for a in args if isinstance(a, torch.Tensor))

    def after(module: Any, args: Any, output: Any) -> None:
        seen.blocks.append(seen.total - starts.pop())

    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    handles = [block.register_forward_pre_hook(before) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def advice(
    config: TrainConfig, base: Base, bucket: Size, tokens: int, num: int, error: Exception
) -> str:
    """One line for an out-of-memory error of ``num`` processes: which flag saves how much."""
    reason = " ".join(str(error).split()).split(". ")[0]
    line = (
        f"out of memory; the largest bucket is {bucket[0]}x{bucket[1]}, at batch size "
        f"{config.batch_size}"
    )
    flags = Estimator(base, tokens, num=num).advice(config, bucket)
    if flags:
        offers = [f"{text} (about {size_text(size)})" for text, size in flags]
        line += f"; what would save memory: {', '.join(offers)}"
    return f"{line} ({reason})"
