"""What the generate stage can be told. Imports no torch: ``--help`` is made from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdxl.base import BASE_HELP, TOKENIZERS_HELP


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Settings of one generate run."""

    base: str = field(metadata={"help": BASE_HELP})
    out: Path = field(metadata={"help": "The folder for the pictures."})
    prompts: Path | None = _option(
        None, "Prompt file: one a line; # comments; --n --w --h --d --s --l."
    )
    prompt: str | None = _option(None, "One prompt, with the same options in it.")
    vae: str | None = _option(None, "Another VAE: its folder or file, or a base with it.")
    tokenizers: Path | None = _option(None, TOKENIZERS_HELP)
    lora: Path | None = _option(None, "A LoRA file, or a run or checkpoint folder with one.")
    unet: Path | None = _option(None, "A UNet folder as train --full writes it.")
    num_images: int | None = _option(
        None, "Pictures in all, prompts in rotation; default: one each."
    )
    size: str | None = _option(None, "N or WxH in pixels; default: the base's own.")
    num_steps: int = _option(30, "Denoising steps.")
    guidance_scale: float = _option(5.0, "Classifier-free guidance; 1 or less: none.")
    negative: str | None = _option(None, "Negative prompt; default: the base's unconditional.")
    seed: int = _option(0, "Of the first picture; each next one has one more.")
    batch_size: int = _option(4, "Pictures drawn at a time.")
    device: str = _option("auto", "auto, cuda, cuda:N, mps or cpu.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _option(
        "auto", "auto: fp16 on CUDA, else fp32. The VAE is always in fp32."
    )

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("give the prompts: either --prompts FILE or --prompt TEXT")
        if self.lora is not None and self.unet is not None:
            raise ValueError("--lora and --unet exclude each other")
        for name in ("num_images", "num_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.num_steps > 1000:
            raise ValueError(f"--num-steps must be at most 1000, not {self.num_steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"--guidance-scale must be at least 0, not {self.guidance_scale}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be from 0 to {2**63 - 1}, not {self.seed}")
        self.pixels  # noqa: B018 (raises)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(width, height) asked for."""
        if self.size is None:
            return None
        parts = self.size.lower().split("x")
        sides = [int(part) for part in parts if part.isdecimal()]
        if len(sides) != len(parts) or len(sides) > 2 or any(s < 8 or s % 8 for s in sides):
            raise ValueError(f"--size must be N or WxH, multiples of 8, not {self.size!r}")
        return sides[0], sides[-1]
