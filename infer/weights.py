"""Loads the weights to generate with: the base's, and a LoRA or fine-tuned UNet on top."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from infer.settings import GenerateSettings
from sdxl.base import ENCODERS, Base, ModelSource
from sdxl.fingerprint import config_digest, file_digest, tokenizer_digest, weights_digest
from sdxl.load import load_unet, load_vae
from sdxl.lora.apply import apply_loras, merged_parts, read_num_chunks, read_schedule
from sdxl.lora.names import LORA
from sdxl.lora.read import find_lora
from sdxl.metadata import Schedule, read_long_captions, schedule_beside, weights_folder
from sdxl.sampling import load_sampler


class Weights:
    """The weights of a run: where their files are, and their prediction type and schedule.

    Raises:
        ValueError: a LoRA or a UNet does not exist.
    """

    def __init__(self, settings: GenerateSettings, base: Base) -> None:
        self.settings, self.base = settings, base
        self.loras = [
            (_find_lora_file(use.path, settings.ema), use.weight) for use in settings.lora
        ]
        self.unet = None if settings.unet is None else _open_unet(settings.unet, settings.ema)
        self.schedule = _schedule(self.loras, self.unet)
        self.num_chunks = _num_chunks(base, self.loras, self.unet)

    @property
    def plain_schedule(self) -> Schedule:
        """The schedule of what ``--compare`` compares with: the UNet without LoRAs, or the
        base's."""
        return _schedule([], self.unet if self.loras else None)

    @cached_property
    def merged_parts(self) -> frozenset[str]:
        """The parts that some LoRA is merged into, where ``enable_loras`` cannot switch it off."""
        return merged_parts([path for path, _ in self.loras])

    def load_unet(self, dtype: torch.dtype) -> Any:
        """The UNet with all LoRAs on it, on the CPU."""
        unet = self._load_unet_without_loras(dtype)
        if self.loras:
            apply_loras(unet, self.loras)
            unet.to(dtype=dtype)
        return unet

    def load_plain_unet(self, dtype: torch.dtype) -> Any:
        """What ``--compare`` compares with: the UNet without LoRAs, or the base's own."""
        return (
            self._load_unet_without_loras(dtype) if self.loras else load_unet(self.base.unet, dtype)
        )

    def _load_unet_without_loras(self, dtype: torch.dtype) -> Any:
        """The fine-tuned UNet, or the base's if none is given."""
        return load_unet(self.unet or self.base.unet, dtype)

    def load_vae(self, dtype: torch.dtype) -> Any:
        """The VAE on the CPU, in fp32; in fp16 if the UNet is and the VAE is safe in it."""
        return load_vae(self.base.vae, self.vae_dtype(dtype))

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        safe = self.base.vae.config.get("force_upcast") is False
        return dtype if safe and dtype == torch.float16 else torch.float32

    def digests(self, dtype: torch.dtype, decodes_in_tf32: bool = False) -> dict[str, Any]:
        """Digests of all weights that decide the images, for the record in each image."""
        base, unet = self.base, self.unet or self.base.unet
        digests: dict[str, Any] = {
            "unet": weights_digest(unet),
            "unet_config": config_digest(unet.config),
            "dtype": _name(dtype),
            "num_chunks": self.num_chunks,
            "vae_dtype": "tf32" if decodes_in_tf32 else _name(self.vae_dtype(dtype)),
            "zeros_for_empty_prompt": base.zeros_for_empty_prompt,
        }
        for part in ENCODERS:
            source = base.model(part)
            digests[part] = weights_digest(source)
            digests[f"{part}_config"] = config_digest(source.config)
        for name in ("tokenizer", "tokenizer_2"):
            digests[name] = tokenizer_digest(base.tokenizer(name))
        if self.loras:
            digests["loras"] = [[*_file_digests(file), weight] for file, weight in self.loras]
        if self.settings.compare and not self.loras:
            digests["unet_without"] = weights_digest(base.unet)
        return digests

    @property
    def lora_names(self) -> str:
        """Each LoRA and its weight, as web UIs show them."""
        uses = self.settings.lora
        return ", ".join(f"{use.path.stem}: {use.weight:g}" for use in uses)

    @property
    def title(self) -> str:
        """What draws, in a few words: the LoRAs, the UNet's folder, or the base."""
        uses = self.settings.lora
        names = [f"LoRA {use.path.resolve().name} x {use.weight:g}" for use in uses]
        if self.settings.unet is not None:
            names.insert(0, f"UNet {self.settings.unet.resolve().name}")
        return ", ".join(names) or self.base.name

    def sampler(self, name: str | None, plain: bool = False) -> Any:
        """The sampler for the schedule of the weights; with ``plain`` of those that are compared
        with."""
        schedule = self.plain_schedule if plain else self.schedule
        return load_sampler(self.base, name, schedule)


def enable_loras(model: Any, enabled: bool) -> None:
    """Switch all LoRAs on a model on or off."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


def has_loras(model: Any) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _file_digests(lora: Path) -> list[str]:
    """Digests of a LoRA file, and of peft's settings where they are beside it."""
    beside = lora.with_name("adapter_config.json")
    return [file_digest(lora), *([file_digest(beside)] if beside.is_file() else [])]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _schedule(loras: list[tuple[Path, float]], unet: ModelSource | None) -> Schedule:
    """The prediction type and schedule that the fine-tune names, if any. A LoRA's takes precedence
    over a UNet's, as it was trained last."""
    schedules = {file: read_schedule(file) for file, _ in loras}
    schedules = {
        file: schedule
        for file, schedule in schedules.items()
        if schedule.prediction_type is not None
    }
    if len(set(schedules.values())) > 1:
        file, schedule = next(iter(schedules.items()))
        other_file, other_schedule = next((f, s) for f, s in schedules.items() if s != schedule)
        raise ValueError(
            f"{file} was trained for {schedule.prediction_type} (zero SNR: {schedule.zero_snr}) "
            f"and {other_file} for {other_schedule.prediction_type} "
            f"(zero SNR: {other_schedule.zero_snr}): they do not go together"
        )
    if schedules:
        return next(iter(schedules.values()))
    return Schedule() if unet is None else schedule_beside(unet.path)


def _num_chunks(base: Base, loras: list[tuple[Path, float]], unet: ModelSource | None) -> int:
    """The number of chunks of 77 tokens in a prompt: the most that any of the weights was trained
    on."""
    counts = [read_num_chunks(file) for file, _ in loras]
    if unet is not None:
        counts.append(read_long_captions(unet.path))
    elif base.file is not None:  # it may be an export of what was fine-tuned
        counts.append(read_num_chunks(base.file.path))
    return max([*counts, 1])


def _find_lora_file(path: Path, ema: bool | None) -> Path:
    if not (path / LORA).is_file() and (path / "unet").is_dir():
        raise ValueError(f"{path}: holds a whole UNet and no LoRA; give it as --unet")
    return find_lora(path, ema)


def _open_unet(path: Path, ema: bool | None) -> ModelSource:
    folder = weights_folder(path, ema)
    if (folder / "unet" / "config.json").is_file():
        return ModelSource("unet", folder / "unet")
    if (folder / LORA).is_file():
        raise ValueError(f"{path}: holds a LoRA and no whole UNet; give it as --lora")
    return ModelSource("unet", folder)
