"""What ``export`` can be told. Imports no torch: ``--help`` is made from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdxl.base import BASE_HELP

SUFFIX = ".safetensors"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of one export."""

    weights: Path
    out: Path = field(
        metadata={"help": "The .safetensors file to write; with --merge also a folder."}
    )
    base: str | None = _option(
        None, f"{BASE_HELP} Needed for a UNet and for --merge; for a LoRA's names: SDXL itself."
    )
    format: Literal["auto", "kohya", "diffusers"] = _option(
        "auto", "Of a LoRA; auto: kohya, and of a kohya file diffusers."
    )
    merge: bool = _option(
        False,
        "Put the LoRA in the base: OUT.safetensors is a whole model, a folder OUT has its UNet.",
    )
    weight: float = _option(1.0, "--merge: the LoRA's strength.")
    vae: str | None = _option(None, "Another VAE for a whole model: its folder, file or base.")
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = _option(
        "auto", "auto: fp16; a LoRA file as it is."
    )
    name: str | None = _option(None, "In the metadata; default: the name of OUT.")
    overwrite: bool = _option(False, "Replace what is at OUT.")

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
