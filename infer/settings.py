"""The settings of generate. Imports no torch: ``--help`` is made from them."""

import math
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from runtime.options import option, parse_memory
from runtime.path_kinds import BASE, CACHE, CHECKPOINTS, IMAGES, WEIGHTS, check_kind, missing
from runtime.workers import check_gpus
from sdxl.base import BASE_HELP, TOKENIZERS_HELP, check_base
from sdxl.prompt_files import MAX_PIXELS, MAX_SIDE, MAX_STEPS

Size = tuple[int, int]  # pixels: width and height, or left and top

NO_WEIGHTS = {  # what to do with a path that is no weights, by its kind
    CACHE: "give the run that was trained on it",
    IMAGES: "give a file of weights, or a run or checkpoint folder",
}


@dataclass(frozen=True)
class LoraUse:
    """A LoRA and how strongly it is used: ``FILE[,WEIGHT]``."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoraUse":
        """Raises ValueError where the weight is no number."""
        path, comma, weight = text.rpartition(",")
        if not text:
            raise ValueError("must be FILE or FILE,WEIGHT, not empty")
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


def digits(value: float) -> str:
    """All digits of a number, so that different ones have different texts."""
    return str(value) if isinstance(value, int) else repr(value).removesuffix(".0")


@dataclass(frozen=True)
class GridAxis:
    """What a grid varies: ``checkpoint`` (all, or steps), ``weight`` or ``guidance``."""

    NAMES: ClassVar[tuple[str, ...]] = ("checkpoint", "weight", "guidance")

    name: str
    values: tuple[float, ...]  # none: all checkpoints

    @classmethod
    def parse(cls, text: str) -> "GridAxis":
        """Raises ValueError for anything else than AXIS=VALUE,VALUE..."""
        name, _, listed = text.partition("=")
        if name not in cls.NAMES:
            raise ValueError(f"{text[:60]!r} is no axis; known: {', '.join(cls.NAMES)}")
        if name == "checkpoint" and listed in ("", "all"):
            return cls(name, ())
        try:
            values = tuple(map(int if name == "checkpoint" else float, listed.split(",")))
        except ValueError:
            raise ValueError(
                f"{text[:60]!r}: give {name}=VALUE,VALUE... with numbers, such as {name}="
                + {"checkpoint": "500,1000 or checkpoint=all"}.get(name, "0.5,1")
            ) from None
        if not all(math.isfinite(value) for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{text[:60]!r}: each value must be a finite number, and there once")
        if name == "guidance" and min(values) < 0:
            raise ValueError(f"{text[:60]!r}: guidance must be at least 0")
        return cls(name, values)

    def __str__(self) -> str:
        return f"{self.name}={','.join(map(digits, self.values)) or 'all'}"


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Settings of one generate run."""

    PANELS: ClassVar[dict[str, str]] = {
        "Essentials": "base out prompts prompt lora unet",
        "Images": "num_images size seed num_steps guidance_scale negative sampler "
        "guidance_rescale original_size crop",
        "Weights": "compare grid ema vae tokenizers",
        "Output": "format",
        "Memory and speed": "batch_size device gpus precision fit low_memory vae_tiling window",
    }

    base: str = option(
        MISSING, BASE_HELP, metavar="BASE", aliases="--pretrained-model-name-or-path --ckpt"
    )
    out: Path = option(
        MISSING, "Folder for the images.", metavar="PATH", aliases="--outdir --output-dir"
    )
    prompts: Path | None = option(
        None,
        "Prompt file: .txt with one prompt per line, # comments and the options --n --w --h "
        "--d --s --l --ss --n-images --ow --oh --cl --ct; or .jsonl, .json, .toml.",
        metavar="FILE",
        aliases="--prompt-file --from-file",
    )
    prompt: str | None = option(
        None, "A single prompt, which may contain the same options.", metavar="TEXT"
    )
    vae: str | None = option(
        None, "Use another VAE: its folder or file, or a base that contains it.", metavar="PATH"
    )
    tokenizers: Path | None = option(None, TOKENIZERS_HELP, metavar="FOLDER")
    lora: tuple[LoraUse, ...] = option(
        (),
        "LoRA file, or a run or checkpoint folder with one; FILE,WEIGHT sets its strength. "
        "May be given several times.",
        aliases="--network-weights",
    )
    unet: Path | None = option(
        None,
        "UNet folder as train --full writes it, or a run or checkpoint folder with one.",
        metavar="PATH",
    )
    ema: bool | None = option(
        None,
        "Use the averaged weights of a checkpoint, or those that were averaged. Default: the "
        "average where the checkpoint has one, as evals and previews do.",
    )
    compare: bool = option(
        False, "Generate each prompt without the LoRA or UNet too, and show both side by side."
    )
    grid: tuple[GridAxis, ...] = option(
        (),
        "Generate each prompt over all values of an axis: checkpoint=all (or steps), "
        "weight=0,0.5,1 (of the LoRA; 0 is without it), guidance=3,5,7. May be given several "
        "times; the first is the columns of grid.png and grid.html.",
    )
    num_images: int | None = option(
        None,
        "Total number of images; prompts are used in rotation. Default: one per prompt, or "
        "its --n-images.",
    )
    size: str | None = option(
        None, "N or WxH in pixels. Default: the size of the base.", metavar="N|WxH"
    )
    original_size: str | None = option(
        None,
        "N or WxH: original size that SDXL is conditioned on. Default: the size of the image.",
        metavar="N|WxH",
    )
    crop: str = option(
        "0,0", "LEFT,TOP in pixels: crop position that SDXL is conditioned on.", metavar="LEFT,TOP"
    )
    sampler: Literal["euler", "euler-a", "ddim", "ddpm", "dpm++2m"] | None = option(
        None, "Sampler. Default: that of the base."
    )
    num_steps: int = option(
        30, "Number of denoising steps.", aliases="--steps --num-inference-steps"
    )
    guidance_scale: float = option(
        5.0, "Scale of classifier-free guidance; 1 or less disables it.", aliases="--cfg-scale"
    )
    guidance_rescale: float = option(
        0.0, "From 0 to 1: reduces overexposure by guidance, for example 0.7 for zero-SNR bases."
    )
    negative: str | None = option(
        None,
        "Negative prompt. Default: zeros or the encoded empty prompt, as the base's config says.",
        metavar="TEXT",
        aliases="--negative-prompt",
    )
    seed: int = option(0, "Random seed of the first image; each further image adds 1.")
    format: Literal["simple", "coco"] = option(
        "simple",
        "simple writes images and captions.jsonl; coco writes images/ and annotations.json.",
    )
    batch_size: int = option(4, "Number of images generated at a time.")
    window: int = option(
        512,
        "Number of images between two changes of model on a card that cannot hold them all. A "
        "larger window means fewer changes, and more CPU memory.",
    )
    low_memory: bool | None = option(
        None, "Keep one model at a time on the card. Default: if they do not all fit."
    )
    fit: str | None = option(
        None,
        "Stay within this much GPU memory, for example 8GB: one model at a time on the card and "
        "fewer images at a time where it must be. auto, the default: what the card has free.",
        metavar="SIZE|auto",
    )
    vae_tiling: bool | None = option(
        None, "Decode in tiles, which takes less memory. Default: above 1536 x 1536 pixels."
    )
    device: str = option(
        "auto", "Device to generate on: auto, cuda, cuda:N, mps or cpu.", metavar="DEVICE"
    )
    gpus: str | None = option(
        "auto",
        "Number of processes to start, one per GPU of this machine, or auto for all.",
        metavar="N|auto",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "Precision of the UNet and the text encoders. auto is fp16 on CUDA, else fp32. The "
        "VAE runs in fp16 if it is safe in that, else in TF32 where the GPU has it, else in fp32; "
        "with fp32 always in fp32.",
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
        self._check_grid()
        if self.fit is not None:
            parse_memory(self.fit)
        check_gpus(self.gpus)
        self.pixels, self.original_pixels, self.crop_pixels  # noqa: B018 (they raise)

    def _check_grid(self) -> None:
        names = [axis.name for axis in self.grid]
        if len(set(names)) < len(names):
            raise ValueError("--grid: an axis is given twice; list all its values in one")
        if "weight" in names and len(self.lora) != 1:
            raise ValueError(f"--grid weight: needs one --lora, not {len(self.lora)}")
        if "checkpoint" in names and len(self.lora) + (self.unet is not None) != 1:
            raise ValueError("--grid checkpoint: needs the run as --lora or --unet, and one alone")
        for name, is_given in (
            ("--compare", self.compare),
            ("--num-images", self.num_images is not None),
            ("--format coco", self.format != "simple"),
        ):
            if names and is_given:
                raise ValueError(f"{name} does not go with --grid (weight=0,1 compares)")

    def check_inputs(self) -> None:
        """Refuse files and folders that are something else, before anything is loaded.

        Raises:
            ValueError: says what it is.
        """
        check_base(self.base)
        for folder in (self.out.resolve(), *self.out.resolve().parents):
            if folder.name == CHECKPOINTS and (folder.parent / "metrics.jsonl").is_file():
                raise ValueError(
                    f"--out {self.out}: lies in the checkpoints of a run; give another"
                )
        for use in self.lora:
            check_kind(use.path, WEIGHTS, NO_WEIGHTS | {BASE: "give it as --base, or as --unet"})
        if self.unet is not None:  # a checkpoint of --full has the form of a base
            check_kind(self.unet, WEIGHTS, NO_WEIGHTS)
        if self.prompts is not None and not self.prompts.exists():
            hint = "" if self.prompts.suffix else "; --prompt TEXT is a prompt itself"
            raise ValueError(missing(self.prompts) + hint)

    @property
    def pixels(self) -> Size | None:
        """(width, height) asked for."""
        return _parse_size("size", self.size, 8)

    @property
    def original_pixels(self) -> Size | None:
        """(width, height) before resizing, for SDXL's size conditioning."""
        return _parse_size("original-size", self.original_size, 1)

    @property
    def crop_pixels(self) -> Size:
        """(left, top), for SDXL's size conditioning."""
        match = re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})", self.crop)
        if match is None:
            raise ValueError(f"--crop must be LEFT,TOP in pixels, not {self.crop!r}")
        return int(match[1]), int(match[2])


def _parse_size(name: str, text: str | None, multiple: int) -> Size | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text.lower())
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    limit = MAX_SIDE if multiple > 1 else MAX_PIXELS
    if any(not multiple <= side <= limit or side % multiple for side in sides):
        condition = f", multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(f"--{name} must be N or WxH{condition}, up to {limit}, not {text!r}")
    return sides
