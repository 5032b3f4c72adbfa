"""What ``export`` can be told. Imports no torch: ``--help`` is made from it."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from runtime.options import option
from sdxl.base import BASE_HELP

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of one export."""

    PANELS: ClassVar[dict[str, str]] = {
        "Essentials": "out base merge",
        "Form": "format dtype weight vae name overwrite",
    }

    weights: Path
    out: Path = option(
        MISSING,
        "The .safetensors file to write; with --merge it may be a folder.",
        metavar="PATH",
    )
    base: str | None = option(
        None,
        f"{BASE_HELP} Needed for a UNet and for --merge. Default for a LoRA: SDXL.",
        metavar="BASE",
    )
    format: Literal["auto", "kohya", "diffusers"] = option(
        "auto",
        "LoRA output format. auto writes kohya, or diffusers when the input is kohya.",
    )
    merge: bool = option(
        False,
        "Merge the LoRA into the base: OUT.safetensors becomes a whole model, a folder OUT "
        "gets the UNet.",
    )
    weight: float = option(
        1.0,
        "Strength of the LoRA with --merge.",
    )
    vae: str | None = option(
        None,
        "Use another VAE in a whole model: its folder or file, or a base that contains it.",
        metavar="PATH",
    )
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = option(
        "auto",
        "Precision to write. auto is fp16; a LoRA file keeps its own.",
    )
    name: str | None = option(
        None,
        "Title in the metadata. Default: the name of OUT.",
        metavar="TEXT",
    )
    overwrite: bool = option(
        False,
        "Replace what is at OUT.",
    )

    def __post_init__(self) -> None:
        if self.merge and self.base is None:
            raise ValueError("--merge needs --base: the base to put the LoRA in")
        if self.weight != 1 and not self.merge:
            raise ValueError("--weight is of --merge")
        if not abs(self.weight) < float("inf"):
            raise ValueError(f"--weight must be a finite number, not {self.weight}")
        if not self.merge and not self.is_file:
            raise ValueError(f"--out {self.out}: must end in {SUFFIX}")
        if self.out.resolve() == self.weights.resolve():
            raise ValueError(f"--out {self.out}: is what is to be exported; give another")

    @property
    def is_file(self) -> bool:
        """Whether OUT is one file."""
        return self.out.suffix == SUFFIX

    @property
    def title(self) -> str:
        return self.name or (self.out.stem if self.is_file else self.out.name)
