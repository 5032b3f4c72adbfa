"""What a run makes, in its final formats: a LoRA file, or a UNet folder."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import set_peft_model_state_dict

from sdxl.lora_files import PREFIX, lora_bytes
from shards.durable import fsync_folder, write_durable

LORA = "pytorch_lora_weights.safetensors"  # the name load_lora_weights looks for in a folder
UNET = "unet"
ONE_FILE = "100GB"  # save_pretrained splits at 10 GB by default, and SDXL's UNet is 10.3


def write_weights(unet: Any, full: bool, folder: Path) -> Path:
    """Write the trained weights in fp32; returns the LoRA file or the UNet's folder."""
    if not full:
        write_durable(folder / LORA, lora_bytes(unet))
        return folder / LORA
    unet.save_pretrained(folder / UNET, max_shard_size=ONE_FILE)
    return folder / UNET


def read_weights(unet: Any, full: bool, folder: Path) -> None:
    """Put what ``write_weights`` wrote back on a UNet of the same making, bit for bit."""
    if full:
        state: dict[str, torch.Tensor] = {}
        for path in sorted((folder / UNET).glob("*.safetensors")):
            state |= safetensors.torch.load_file(path)
        unet.load_state_dict(state)
        return
    state = safetensors.torch.load_file(folder / LORA)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    missing = set_peft_model_state_dict(unet, state)
    assert not missing.unexpected_keys, missing.unexpected_keys


def publish(unet: Any, full: bool, run: Path) -> Path:
    """The run's result. A UNet comes as fp32 and fp16 files, and is in fp16 afterwards."""
    if not full:
        return write_weights(unet, full, run)
    partial = run / f"{UNET}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    unet.save_pretrained(partial, max_shard_size=ONE_FILE)
    unet.to(torch.float16)
    if not all(bool(tensor.isfinite().all()) for tensor in unet.state_dict().values()):
        warnings.warn("some weights are beyond fp16: use the fp32 file", stacklevel=2)
    unet.save_pretrained(partial, max_shard_size=ONE_FILE, variant="fp16")
    sync_files(partial)
    replaced = run / f"{UNET}.replaced.partial"
    shutil.rmtree(replaced, ignore_errors=True)
    if (run / UNET).exists():
        os.replace(run / UNET, replaced)
    os.replace(partial, run / UNET)
    fsync_folder(run)
    shutil.rmtree(replaced, ignore_errors=True)
    return run / UNET


def sync_files(folder: Path) -> None:
    """All files below ``folder``, on disk for good."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
