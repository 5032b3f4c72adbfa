"""The settings of export and push. Imports no torch: ``--help`` is made from them."""

import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from infer.settings import NO_WEIGHTS
from runtime.options import option
from runtime.path_kinds import WEIGHTS, check_kind
from sdxl.base import BASE_HELP, check_base

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
        MISSING, "The .safetensors file to write; with --merge it may be a folder.", metavar="PATH"
    )
    base: str | None = option(
        None,
        f"{BASE_HELP} Needed for a UNet and for --merge. A LoRA needs "
        "none: SDXL's own module names are assumed.",
        metavar="BASE",
    )
    format: Literal["auto", "kohya", "diffusers"] = option(
        "auto", "LoRA output format. auto writes kohya, or diffusers when the input is kohya."
    )
    merge: bool = option(
        False,
        "Merge the LoRA into the base: OUT.safetensors becomes a whole model, a folder OUT "
        "gets the UNet.",
    )
    weight: float = option(1.0, "Strength of the LoRA with --merge.")
    vae: str | None = option(
        None,
        "Use another VAE in a whole model: its folder or file, or a base that contains it.",
        metavar="PATH",
    )
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = option(
        "auto", "Precision to write. auto is fp16; a LoRA file keeps its own."
    )
    name: str | None = option(
        None, "Title in the metadata. Default: the name of OUT.", metavar="TEXT"
    )
    overwrite: bool = option(False, "Replace what is at OUT.")

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

    def check_inputs(self) -> None:
        """Refuse files and folders that are something else, before anything is loaded.

        Raises:
            ValueError: says what it is.
        """
        _check_weights(self.weights, self.base)

    @property
    def is_file(self) -> bool:
        """Whether OUT is one file."""
        return self.out.suffix == SUFFIX

    @property
    def title(self) -> str:
        return self.name or (self.out.stem if self.is_file else self.out.name)


_REPOSITORY = re.compile(r"(?=[^/]{1,96}/[^/]{1,96}$)\w[\w.-]*/\w[\w.-]*(?<![.-])", re.ASCII)
_CHECKPOINT = re.compile(r"best|last|[0-9]{1,15}")


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """Settings of one push."""

    PANELS: ClassVar[dict[str, str]] = {
        "Essentials": "public dry_run out checkpoint",
        "Model card": "base license instance_prompt previews",
    }

    weights: Path
    repository: str
    public: bool = option(
        False,
        "Create a public repository. Default: a private one. One that is there stays as it is.",
    )
    dry_run: bool = option(
        False, "Write what would be sent into a folder, without asking the hub, then exit."
    )
    out: Path | None = option(
        None, "Folder of --dry-run. Default: NAME-hub in the current one.", metavar="PATH"
    )
    checkpoint: str | None = option(
        None,
        "Push this checkpoint of the run: its step, best (lowest eval loss) or last. Default: "
        "the weights that the run ended with.",
        metavar="STEP|best|last",
    )
    base: str | None = option(
        None,
        f"{BASE_HELP} Default: the base that the weights name, if it is a hub id. With the UNet of "
        "train --full, a whole model for user interfaces is made and sent too.",
        metavar="BASE",
    )
    license: str | None = option(
        None,
        "License as the hub writes it, for example openrail++. Default: the base's own.",
        metavar="ID",
    )
    instance_prompt: str | None = option(
        None, "Words that call up what was learned, such as 'photo of ohwx man'.", metavar="TEXT"
    )
    previews: bool = option(
        True, "Show the run's newest previews up to the weights' step, with their prompts."
    )

    def __post_init__(self) -> None:
        if not _REPOSITORY.fullmatch(self.repository) or re.search(r"--|\.\.", self.repository):
            raise ValueError(
                f"{self.repository!r}: no repository of the hub; give OWNER/NAME, of letters, "
                "digits, '-', '_' and '.'"
            )
        if self.out is not None and not self.dry_run:
            raise ValueError("--out does nothing without --dry-run")
        if self.checkpoint is not None and not _CHECKPOINT.fullmatch(self.checkpoint):
            raise ValueError(f"--checkpoint takes a step, best or last, not {self.checkpoint!r}")
        if self.license is not None and not re.fullmatch(r"[\w.+-]{1,100}", self.license):
            raise ValueError(f"--license takes an id such as openrail++, not {self.license!r}")

    def check_inputs(self) -> None:
        """Refuse files and folders that are something else, before anything is loaded.

        Raises:
            ValueError: says what it is.
        """
        _check_weights(self.weights, self.base)

    @property
    def name(self) -> str:
        """Of the repository, without its owner."""
        return self.repository.partition("/")[2]


def _check_weights(weights: Path, base: str | None) -> None:
    check_kind(weights, WEIGHTS, NO_WEIGHTS)
    if base is not None:
        check_base(base)
