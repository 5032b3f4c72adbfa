"""What a fine-tune predicts, and on which noise schedule: carried beside its weights.

A LoRA has it in its metadata (``sdxl.lora_files``), a UNet folder in a ``scheduler/`` beside it.
Imports no torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl.base import read_config, scheduler_config

CONFIG = "scheduler_config.json"


@dataclass(frozen=True)
class Schedule:
    """What ``load_scheduler`` is told; None: what the base says."""

    prediction_type: str | None = None
    zero_snr: bool | None = None

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> "Schedule":
        """From a scheduler's config, or a LoRA's metadata."""
        kind, zero = config.get("prediction_type"), config.get("rescale_betas_zero_snr")
        return cls(
            kind if isinstance(kind, str) else None, zero if isinstance(zero, bool) else None
        )

    def to_config(self) -> dict[str, Any]:
        return {
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.zero_snr,
        }


def write_schedule(base: str, schedule: Schedule, folder: Path) -> None:
    """The base's scheduler, told ``schedule``, as ``folder/scheduler/``: with ``unet/`` beside it
    a diffusers folder says what it is."""
    config = {**scheduler_config(base), **schedule.to_config()}
    if schedule.zero_snr:
        config["timestep_spacing"] = "trailing"
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def schedule_beside(unet: Path) -> Schedule:
    """What the ``scheduler/`` beside a UNet's folder says; nothing where there is none."""
    folder = unet.parent / "scheduler"
    if not (folder / CONFIG).is_file():
        return Schedule()
    return Schedule.of_config(read_config(folder))
