"""How many chunks of 77 tokens a fine-tune learned its captions in: prompts are encoded so too.

A LoRA has it in its metadata (``sdxl.lora_files``), a UNet folder in a file of its own. Where
nothing is said it is 1. Imports no torch.
"""

import json
from pathlib import Path

from runtime.documents import read_json_object

NAME = "long_captions"
NOTE = "shardtune.json"  # beside the weights; diffusers reads past it


def write_long_captions(unet: Path, num_chunks: int) -> None:
    """Say it of a UNet's folder."""
    if num_chunks > 1:
        (unet / NOTE).write_text(json.dumps({NAME: num_chunks}) + "\n")


def read_long_captions(unet: Path) -> int:
    """What a UNet's folder says.

    Raises:
        ValueError: the file is not what ``write_long_captions`` wrote.
    """
    try:
        return check_long_captions(read_json_object(unet / NOTE)[NAME])
    except FileNotFoundError:
        return 1
    except (ValueError, KeyError):
        raise ValueError(f"{unet / NOTE}: damaged; without it captions have one chunk") from None


def check_long_captions(value: object) -> int:
    """
    Raises:
        ValueError: not a number of chunks.
    """
    if type(value) is not int or not 1 <= value <= 32:
        raise ValueError(f"{NAME} must be from 1 to 32, not {value!r}")
    return value
