"""Where to compute, and in which precision."""

import os
import re
import warnings
from dataclasses import dataclass

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def exact_fp32() -> None:
    """Make fp32 mean fp32 on NVIDIA cards: cuDNN's convolutions are TF32 (10 bits) by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU; of several processes each has a GPU of its own.

    Raises:
        ValueError: the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    known = re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name)
    if not known or not available[known[1]]:
        raise ValueError(f"--device {name}: torch finds no such device here")
    if known[1] == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if known[2]:
            raise ValueError(f"--device {name} is one GPU for several processes; give cuda")
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(name)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """``dtype`` of the forward pass; with ``autocast`` under ``torch.autocast``."""

    dtype: torch.dtype
    autocast: bool
    scaler: bool  # GradScaler: fp16 gradients underflow without it


def pick_precision(
    name: str, device: torch.device, allow_cpu: bool = False, quiet: bool = False
) -> Precision:
    """``auto`` is bf16 on CUDA, else fp32. A CPU computes in fp32 unless ``allow_cpu``."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if device.type == "cpu" and name != "fp32" and not allow_cpu:
        if not quiet:
            warnings.warn(f"--precision {name} on a CPU: computing in fp32 instead", stacklevel=2)
        name = "fp32"
    half = name != "fp32"
    return Precision(dtype=PRECISIONS[name], autocast=half, scaler=name == "fp16")
