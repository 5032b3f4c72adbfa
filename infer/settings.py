"""What the generate stage can be told. Imports no torch: ``--help`` is made from it."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.workers import check_gpus
from sdxl.base import BASE_HELP, TOKENIZERS_HELP
from sdxl.prompts import MAX_PIXELS, MAX_SIDE, MAX_STEPS

Size = tuple[int, int]  # pixels: width and height, or left and top


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LoraUse:
    """A LoRA and how strongly it is used: ``FILE[,WEIGHT]``."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoraUse":
        """Raises ValueError where the weight is no number."""
        path, comma, weight = text.rpartition(",")
        if not comma or Path(text).exists():
            return cls(Path(text))
        try:
            use = cls(Path(path), float(weight))
        except ValueError:
            raise ValueError(
                f"{text}: the weight after the comma, {weight!r}, is no number"
            ) from None
        if not (path and math.isfinite(use.weight)):
            raise ValueError(f"{text}: must be FILE or FILE,WEIGHT")
        return use

    def __str__(self) -> str:
        return str(self.path) if self.weight == 1 else f"{self.path},{self.weight:g}"


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Settings of one generate run."""

    base: str = field(metadata={"help": BASE_HELP})
    out: Path = field(metadata={"help": "The folder for the pictures."})
    prompts: Path | None = _option(
        None,
        "Prompt file: .txt, one a line, # comments, options --n --w --h --d --s --l --ss "
        "--n-images --ow --oh --cl --ct; or .jsonl, .json, .toml.",
    )
    prompt: str | None = _option(None, "One prompt, with the same options in it.")
    vae: str | None = _option(None, "Another VAE: its folder or file, or a base with it.")
    tokenizers: Path | None = _option(None, TOKENIZERS_HELP)
    lora: tuple[LoraUse, ...] = _option(
        (), "FILE[,WEIGHT]: a LoRA file, or a run or checkpoint folder with one; several are added."
    )
    unet: Path | None = _option(
        None, "A UNet folder as train --full writes it, or a run or checkpoint with one."
    )
    ema: bool = _option(False, "The averaged weights of a checkpoint of a run with --ema.")
    compare: bool = _option(
        False, "Draw each prompt without the LoRA or the UNet too, side by side."
    )
    num_images: int | None = _option(
        None, "Pictures in all, prompts in rotation; default: one each, or its --n-images."
    )
    size: str | None = _option(None, "N or WxH in pixels; default: the base's own.")
    original_size: str | None = _option(
        None, "N or WxH: the size before resizing that SDXL is told; default: the picture's."
    )
    crop: str = _option("0,0", "LEFT,TOP in pixels: where SDXL is told that the picture was cut.")
    sampler: Literal["euler", "euler-a", "ddim", "ddpm", "dpm++2m"] | None = _option(
        None, "Default: the base's own."
    )
    num_steps: int = _option(30, "Denoising steps.")
    guidance_scale: float = _option(5.0, "Classifier-free guidance; 1 or less: none.")
    guidance_rescale: float = _option(
        0.0, "0 to 1: against overexposure by guidance, e.g. 0.7 for zero-SNR bases."
    )
    negative: str | None = _option(None, "Negative prompt; default: the base's unconditional.")
    seed: int = _option(0, "Of the first picture; each next one has one more.")
    format: Literal["simple", "coco"] = _option(
        "simple", "Pictures and captions.jsonl; or images/ and annotations.json in COCO's layout."
    )
    batch_size: int = _option(4, "Pictures drawn at a time.")
    window: int = _option(512, "Pictures between two changes of model on a small card.")
    low_memory: bool | None = _option(
        None, "One model at a time on the card; default: where they do not all fit."
    )
    vae_tiling: bool | None = _option(
        None, "Decode in tiles, in less memory; default: above 1536x1536 pixels."
    )
    device: str = _option("auto", "auto, cuda, cuda:N, mps or cpu.")
    gpus: str | None = _option("auto", "Processes to start, one a GPU: a number, or auto.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _option(
        "auto",
        "auto: fp16 on CUDA, else fp32. The VAE is in fp32, but where it is safe in fp16.",
    )

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("give the prompts: either --prompts FILE or --prompt TEXT")
        tuned = bool(self.lora) or self.unet is not None
        for name in ("compare", "ema"):
            if getattr(self, name) and not tuned:
                raise ValueError(f"--{name} needs --lora or --unet")
        for name in ("num_images", "num_steps", "batch_size", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.num_steps > MAX_STEPS:
            raise ValueError(f"--num-steps must be at most {MAX_STEPS}, not {self.num_steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"--guidance-scale must be at least 0, not {self.guidance_scale}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"--guidance-rescale must be in 0..1, not {self.guidance_rescale}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed must be from 0 to {2**64 - 1}, not {self.seed}")
        check_gpus(self.gpus)
        self.pixels, self.original_pixels, self.crop_pixels  # noqa: B018 (they raise)

    @property
    def pixels(self) -> Size | None:
        """(width, height) asked for."""
        return _sides("size", self.size, 8)

    @property
    def original_pixels(self) -> Size | None:
        """(width, height) before resizing, as SDXL is told."""
        return _sides("original-size", self.original_size, 1)

    @property
    def crop_pixels(self) -> Size:
        """(left, top), as SDXL is told."""
        found = re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})", self.crop)
        if found is None:
            raise ValueError(f"--crop must be LEFT,TOP in pixels, not {self.crop!r}")
        return int(found[1]), int(found[2])


def _sides(name: str, text: str | None, multiple: int) -> Size | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text.lower())
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    most = MAX_SIDE if multiple > 1 else MAX_PIXELS
    if any(not multiple <= side <= most or side % multiple for side in sides):
        what = f", multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(f"--{name} must be N or WxH{what}, up to {most}, not {text!r}")
    return sides
