"""Chooses the device, the precision and the number of threads; the one table of dtypes."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from runtime.workers import rank_info

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # options' names


def exact_fp32() -> None:
    """Make fp32 mean fp32 on NVIDIA cards: cuDNN's convolutions are TF32 (10 bits) by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    """Compute what is started here in TF32 where it is fp32 on CUDA, if ``allowed``."""
    products: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [kind.allow_tf32 for kind in products]
    for kind in products:
        kind.allow_tf32 = allowed
    try:
        yield
    finally:
        for kind, was in zip(products, before, strict=True):
            kind.allow_tf32 = was


def has_tf32(device: torch.device) -> bool:
    """Whether ``device`` is a GPU that computes in TF32: from compute capability 8.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def check_tf32(option: str, device: torch.device) -> None:
    """Refuse TF32 where there is none; it would be fp32, by another name.

    Raises:
        ValueError: names ``option`` and what to give instead.
    """
    if not has_tf32(device):
        raise ValueError(
            f"{option}: only NVIDIA GPUs of compute capability 8.0 or more have TF32, and this is "
            f"{_describe(device)}; use fp32"
        )


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return {"cpu": "a CPU", "mps": "an Apple GPU"}.get(device.type, device.type)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU; of several processes each has a GPU of its own.

    Raises:
        ValueError: there is no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    match = re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name)
    if not match or not available[match[1]]:
        raise ValueError(f"--device {name}: torch finds no such device here; doctor says why")
    info = rank_info()
    if match[1] == "cuda" and info.size > 1:
        if match[2]:
            raise ValueError(f"--device {name} is one GPU for several processes; give cuda")
        # A launcher that shows each process one GPU alone counts its processes nevertheless.
        name = f"cuda:{info.local_rank % max(1, torch.cuda.device_count())}"
    # Off by default, and not to be switched on by a library: the algorithms that it tries on each
    # new size can double the peak of memory.
    torch.backends.cudnn.benchmark = False
    return torch.device(name)


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of a CUDA device; None for another."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``; the host does not wait where that is safe: on CUDA, from pinned
    memory.

    From other memory a copy that is not waited for reads what may be freed and used again by then:
    on MPS batches would be wrong in silence. No other file of the product uses ``non_blocking``.
    """
    is_safe = device.type == "cuda" and tensor.is_pinned()
    return tensor.to(device, non_blocking=is_safe)


def start_copy_to_host(
    sources: Mapping[str, torch.Tensor], pinned: Mapping[str, torch.Tensor]
) -> torch.Event:
    """Copy tensors of a GPU into pinned ones of the same names; the event tells when they have
    arrived.

    Work that is queued on the device afterwards may change the sources; the copies come first.
    """
    for name, source in sources.items():
        pinned[name].copy_(source, non_blocking=True)
    arrived = torch.Event(next(iter(sources.values())).device)
    arrived.record()
    return arrived


def fetch(tensors: Mapping[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    """Start to copy tensors of one device to the host; what is returned waits until they are there.

    On CUDA the host does not wait before that, and the device may be given more work meanwhile.
    """
    if next(iter(tensors.values())).device.type != "cuda":
        copied = {name: tensor.cpu() for name, tensor in tensors.items()}
        return lambda: copied
    pinned = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        for name, tensor in tensors.items()
    }
    arrived = start_copy_to_host(tensors, pinned)

    def wait() -> dict[str, torch.Tensor]:
        arrived.synchronize()
        return pinned

    return wait


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` computes in bf16 by itself; a GPU does from compute capability 8.0 on.

    ``torch.cuda.is_bf16_supported`` counts emulation: there are no bf16 convolutions below 8.0.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def check_bf16(option: str, device: torch.device) -> None:
    """Refuse bf16 where the GPU has none.

    Raises:
        ValueError: names ``option`` and what to give instead.
    """
    if not has_bf16(device):
        name, (major, minor) = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
        )
        raise ValueError(
            f"{option}: {name} has no bf16 (compute capability {major}.{minor}; it takes 8.0); "
            "use fp16 or fp32"
        )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """``dtype`` of the forward pass; with ``autocast`` under ``torch.autocast``."""

    dtype: torch.dtype
    autocast: bool
    scaler: bool  # GradScaler: fp16 gradients underflow without it


def pick_precision(
    name: str, device: torch.device, allow_cpu: bool = False, quiet: bool = False
) -> Precision:
    """``auto`` is bf16 on CUDA (fp16 on a GPU without bf16), else fp32. A CPU computes in fp32
    unless ``allow_cpu``.

    Raises:
        ValueError: bf16 on a GPU that has none.
    """
    if name == "auto" and device.type == "cuda":
        name = "bf16" if has_bf16(device) else "fp16"
    elif name == "auto":
        name = "fp32"
    elif name == "bf16":
        check_bf16("--precision bf16", device)
    if device.type == "cpu" and name != "fp32" and not allow_cpu:
        if not quiet:
            warnings.warn(f"--precision {name} on a CPU: computing in fp32 instead", stacklevel=2)
        name = "fp32"
    half = name != "fp32"
    return Precision(dtype=DTYPES[name], autocast=half, scaler=name == "fp16")


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """While entered, compute with ``num`` threads, whatever the environment or a launcher sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
