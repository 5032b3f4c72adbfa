"""Makes a base of SDXL's real architecture with random weights; nothing is downloaded.

    python -m benchmarks.full_base FOLDER [--encoders]

The UNet is bf16 (5.1 GB); the text encoders bf16 (1.6 GB) and the VAE fp32 (0.3 GB) as one would
keep them on a card. Weights repeat a block of random numbers: what they are changes no time.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl.base import MINIATURE_FOLDER

CONFIGS = Path(__file__).parents[1] / "sdxl" / "configs"
STD = 0.02
BLOCK = 1 << 20  # random numbers that all weights are made of


def write_unet(folder: Path) -> None:
    """``unet/`` and ``scheduler/``: all that training takes."""
    _save(UNet2DConditionModel, "unet", folder, torch.bfloat16)
    shutil.copytree(CONFIGS / "scheduler", folder / "scheduler", dirs_exist_ok=True)


def write_encoders(folder: Path) -> None:
    """The rest of a base. The tokenizers are the miniature's: SDXL's encoders take their ids."""
    _save(AutoencoderKL, "vae", folder, torch.float32)
    _save(CLIPTextModel, "text_encoder", folder, torch.bfloat16)
    _save(CLIPTextModelWithProjection, "text_encoder_2", folder, torch.bfloat16)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MINIATURE_FOLDER / name, folder / name, dirs_exist_ok=True)
    shutil.copy(MINIATURE_FOLDER / "model_index.json", folder)


def _save(kind: Any, name: str, folder: Path, dtype: torch.dtype) -> None:
    config = json.loads((CONFIGS / name / "config.json").read_text())
    with torch.device("meta"):
        if name.startswith("text"):
            model = kind(CLIPTextConfig(**config))
        else:
            model = kind.from_config(config)
    model = model.to(dtype).to_empty(device="cpu")
    fill(model)
    model.save_pretrained(folder / name)


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Matrices from one block of noise over and over; of norms, scale 1 and shift 0."""
    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * STD
    for parameter in model.parameters():
        flat = parameter.view(-1)
        if parameter.ndim < 2:
            flat.fill_(0.0)
            continue
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            torch.nn.init.ones_(module.weight)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--encoders", is_flag=True, help="The VAE and the text encoders too.")
def main(folder: Path, encoders: bool) -> None:
    """Write the base."""
    write_unet(folder)
    if encoders:
        write_encoders(folder)


if __name__ == "__main__":
    main()
