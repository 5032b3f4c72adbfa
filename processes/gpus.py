"""``--gpus``: how many processes a command is to have. Imports no torch until it must count."""

import os
import re

LEAST_ON_CPU = 4  # processes that any machine may try


def check_gpus(gpus: str | None) -> None:
    """Refuse what is neither a number from 1 on nor ``auto``; None is one process.

    Raises:
        ValueError: names the value.
    """
    is_count = gpus is not None and re.fullmatch("[0-9]{1,6}", gpus) and int(gpus) > 0
    if gpus not in (None, "auto") and not is_count:
        raise ValueError(f"--gpus takes a number from 1 on, or auto, not {gpus}")


def num_processes(gpus: str | None, device: str) -> int:
    """How many processes this one should start: 1 where it is to do the work itself.

    Raises:
        ValueError: more than there are GPUs.
    """
    if gpus is None or "RANK" in os.environ:
        return 1
    import torch

    there = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus == "auto":
        return max(1, there)
    asked = int(gpus)
    if there and asked > there:
        raise ValueError(f"--gpus {asked}: this machine has {there}")
    if not there and asked > (cores := os.cpu_count() or 1) and asked > LEAST_ON_CPU:
        raise ValueError(f"--gpus {asked}: this machine has no GPU, and {cores} CPU cores")
    return asked
