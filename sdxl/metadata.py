"""Metadata beside or inside weights: noise schedule, caption length, base, license, buckets.

A LoRA file has all of it in its metadata. A UNet folder has its schedule in a ``scheduler/``
beside it, and the rest in a file of its own. Imports no torch.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.safe_parsing import parse_json, read_json_object
from sdxl.base import Base, read_config

SCHEDULER_CONFIG = "scheduler_config.json"
AVERAGE = "ema"  # in a checkpoint: the averaged weights, in a folder like the checkpoint itself


def weights_folder(path: Path, average: bool | None = None) -> Path:
    """Which folder's weights are meant by a checkpoint: those of its moving average, where it has
    one, for they are what was evaluated and previewed; with False those that were averaged.

    A file, and any other folder, is itself.

    Raises:
        ValueError: the average is asked for, and there is none.
    """
    if (path / AVERAGE).is_dir():
        return path if average is False else path / AVERAGE
    if average:
        raise ValueError(
            f"--ema: {path} has no {AVERAGE}/; give the checkpoint of a run with an average (what "
            "such a run ends with is averaged already)"
        )
    return path


@dataclass(frozen=True)
class Schedule:
    """A fine-tune's prediction type and zero-SNR schedule; None means the base's."""

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


def write_schedule(base: Base, schedule: Schedule, folder: Path) -> None:
    """Write the base's scheduler config, changed by ``schedule``, to ``folder/scheduler/``, beside
    ``unet/`` as in any diffusers folder."""
    config = {**base.scheduler_config, **schedule.to_config()}
    if schedule.zero_snr:
        config["timestep_spacing"] = "trailing"
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / SCHEDULER_CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n"
    )


def schedule_beside(unet: Path) -> Schedule:
    """The schedule in the ``scheduler/`` beside a UNet's folder; empty if there is none."""
    folder = unet.parent / "scheduler"
    if not (folder / SCHEDULER_CONFIG).is_file():
        return Schedule()
    return Schedule.of_config(read_config(folder))


# The number of chunks of 77 tokens that captions had in training: prompts are encoded likewise.
# Without a note it is 1.

LONG_CAPTIONS_KEY = "long_captions"
NOTES_FILE = "shardtune.json"  # beside the weights; diffusers ignores it


def write_long_captions(unet: Path, num_chunks: int) -> None:
    """Note the number of chunks in a UNet's folder, if it is not 1."""
    if num_chunks > 1:
        (unet / NOTES_FILE).write_text(json.dumps({LONG_CAPTIONS_KEY: num_chunks}) + "\n")


def read_long_captions(unet: Path) -> int:
    """The number of chunks that a UNet's folder notes, else 1.

    Raises:
        ValueError: the file is not what ``write_long_captions`` wrote.
    """
    try:
        return check_long_captions(read_json_object(unet / NOTES_FILE)[LONG_CAPTIONS_KEY])
    except FileNotFoundError:
        return 1
    except (ValueError, KeyError):
        raise ValueError(
            f"{unet / NOTES_FILE}: damaged; without it captions have one chunk"
        ) from None


def check_long_captions(value: object) -> int:
    """Check a number of chunks from a file.

    Raises:
        ValueError: not a number of chunks.
    """
    if type(value) is not int or not 1 <= value <= 32:
        raise ValueError(f"{LONG_CAPTIONS_KEY} must be from 1 to 32, not {value!r}")
    return value


# What a file of weights records about itself in its metadata.

KEY = "shardtune"  # of the metadata; its value is JSON
ARCHITECTURE = "stable-diffusion-xl-v1-base"  # of the ModelSpec standard
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # its words


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """What weights are and what they were made from; None means unknown."""

    name: str | None = None
    base: str | None = None  # its name, never its path
    license: str | None = None  # of the base
    caches: tuple[str, ...] = ()  # digests of the caches trained on
    buckets: tuple[tuple[int, int, int], ...] = ()  # (width, height, samples an epoch)
    steps: int | None = None  # of the optimizer
    rank: int | None = None
    alpha: float | None = None
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None
    long_captions: int | None = None  # chunks of 77 tokens that captions have, if more than one

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "ModelMetadata":
        """The reverse of ``to_dict``; a field of another type is ignored."""
        values = {field.name: record.get(field.name) for field in fields(cls)}
        texts = ("name", "base", "license", "prediction_type")
        kept: dict[str, Any] = {
            name: values[name] for name in texts if isinstance(values[name], str)
        }
        for name in ("steps", "rank", "long_captions"):
            if isinstance(values[name], int):
                kept[name] = values[name]
        if isinstance(values["alpha"], int | float):
            with suppress(OverflowError):
                kept["alpha"] = float(values["alpha"])
        if isinstance(values["rescale_betas_zero_snr"], bool):
            kept["rescale_betas_zero_snr"] = values["rescale_betas_zero_snr"]
        if isinstance(values["caches"], list | tuple):
            kept["caches"] = tuple(str(cache) for cache in values["caches"])
        with suppress(ValueError, TypeError, OverflowError):
            kept["buckets"] = tuple(
                (int(w), int(h), int(num)) for w, h, num in values["buckets"] or ()
            )
        return cls(**kept)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.prediction_type, self.rescale_betas_zero_snr)

    def to_dict(self) -> dict[str, Any]:
        """The known fields as plain JSON."""
        return {n: v for n, v in asdict(self).items() if v is not None and v != ()}

    def to_metadata(self) -> dict[str, str]:
        return {KEY: json.dumps(self.to_dict(), sort_keys=True)}

    def modelspec(self, architecture: str, resolution: int) -> dict[str, str]:
        """The fields of the ModelSpec standard, which UIs and sites read; ``resolution`` is the
        base's, in pixels a side."""
        stated = {
            "modelspec.license": self.license,
            "modelspec.prediction_type": PREDICTIONS.get(self.prediction_type or ""),
        }
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": architecture,
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": self.name or "shardtune",
            "modelspec.resolution": f"{resolution}x{resolution}",
            **{name: value for name, value in stated.items() if value is not None},
        }


def read_model_metadata(metadata: Mapping[str, str]) -> ModelMetadata:
    """The model metadata in a file's metadata; an empty one in other tools' files."""
    try:
        return ModelMetadata.of(dict(parse_json(metadata.get(KEY, "{}"))))
    except (ValueError, TypeError):
        return ModelMetadata()
