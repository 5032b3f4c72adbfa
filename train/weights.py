"""What a run makes, in its final formats: a LoRA file, or a UNet folder as diffusers saves it.

Tensors are gathered one by one from all ranks to the CPU of the main one, into files of bounded
size: no process ever holds a second UNet.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import set_peft_model_state_dict
from safetensors import safe_open

from runtime.files import (
    PARTIAL,
    durable_file,
    format_bytes,
    free_bytes,
    fsync_folder,
    remove_path,
    removed_on_error,
    replace_path,
    writing,
)
from sdxl.base import find_weights
from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.write import PREFIX, lora_bytes
from sdxl.metadata import (
    ModelMetadata,
    Schedule,
    base_license,
    base_name,
    write_long_captions,
    write_schedule,
)
from sdxl.tensor_files import digest_metadata, sort_metadata
from shards.buckets import Size
from shards.reader import Cache, groups_of
from train.config import TrainConfig
from train.distributed import DistContext, is_dtensor
from train.ema import Ema, to_local
from train.unet import trainable

UNET = "unet"
STEM = "diffusion_pytorch_model"
MAX_FILE_BYTES = 4_000_000_000
SMALL_FILES_BYTES = 1_000_000  # headers, configs and states beside tensors
LORA_FILES = (LORA, KOHYA)  # a LoRA is written as each of these


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, whatever part of it this rank has. Every rank must ask."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def distribute_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole ``value`` laid out as ``parameter`` is: this rank's part, where it is sharded."""
    value = value.to(parameter.device)
    if is_dtensor(parameter) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    return value


def write_tensors(
    folder: Path,
    stem: str,
    tensors: dict[str, torch.Tensor],
    world: DistContext,
    *,
    variant: str | None = None,
    card: ModelMetadata | None = None,
    convert: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
) -> None:
    """Write safetensors files as diffusers names them; the main rank does, all must take part.

    ``convert`` gets each whole tensor, and gives what is written; ``card`` is in the metadata.
    """
    metadata = {"format": "pt", **(card.to_metadata() if card else {})}
    dot = f".{variant}" if variant else ""
    parts = _split(tensors)
    files: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        counted = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        state = {}
        for name in names:
            tensor = full_tensor(tensors[name].detach())
            if world.is_main:
                state[name] = convert(name, tensor.cpu()).contiguous().clone()
        if world.is_main:
            path = folder / f"{stem}{dot}{counted}.safetensors"
            safetensors.torch.save_file(state, path, metadata=digest_metadata(state, metadata))
            sort_metadata(path)
            files |= dict.fromkeys(names, path.name)
    if world.is_main and len(parts) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        name = f"{stem}.safetensors.index{dot}.json"
        (folder / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names in order, in parts of at most MAX_FILE_BYTES (or one tensor)."""
    parts: list[list[str]] = [[]]
    room = MAX_FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and parts[-1]:
            parts.append([])
            room = MAX_FILE_BYTES
        parts[-1].append(name)
        room -= size
    return parts


@dataclass(frozen=True)
class WeightsFormat:
    """What the weights are of: a LoRA or the whole UNet of ``base``, trained on ``schedule`` and
    on the ``caches`` of these digests, with these ``buckets`` and ``long_captions`` (see
    ``ModelMetadata``); ``license`` is the base's."""

    full: bool
    base: str
    schedule: Schedule
    caches: tuple[str, ...] = ()
    buckets: tuple[tuple[int, int, int], ...] = ()
    license: str | None = None
    long_captions: int = 1

    @classmethod
    def of(
        cls, config: TrainConfig, schedule: Schedule, caches: Sequence[Cache]
    ) -> "WeightsFormat":
        counts: Counter[Size] = Counter()
        for group in groups_of(caches):
            counts[group.bucket] += group.count * group.repeats
        return cls(
            full=config.full,
            base=config.base,
            schedule=schedule,
            caches=tuple(cache.data_digest for cache in caches),
            buckets=tuple((*bucket, count) for bucket, count in sorted(counts.items())),
            license=base_license(config.base),  # once: of a hub id it may ask the hub
            long_captions=caches[0].manifest["recipe"].get("long_captions", 1),
        )

    def card(self, steps: int, name: str | None) -> ModelMetadata:
        """What the weights say of themselves after so many steps."""
        return ModelMetadata(
            name=name,
            base=base_name(self.base),
            license=self.license,
            caches=self.caches,
            buckets=self.buckets,
            steps=steps,
            long_captions=self.long_captions if self.long_captions > 1 else None,
            **self.schedule.to_config(),
        )


def write_weights(
    unet: Any,
    kind: WeightsFormat,
    folder: Path,
    world: DistContext,
    ema: Ema | None,
    *,
    steps: int,
    name: str | None = None,
) -> None:
    """Write the trained weights, or their average, in the dtype they are kept in: of a LoRA its
    file for diffusers and that for the UIs. ``steps`` are behind them, ``name`` is theirs."""
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    if kind.full:
        if world.is_main:
            write_schedule(kind.base, kind.schedule, folder)
            _write_config(unet, folder / UNET)
            write_long_captions(folder / UNET, kind.long_captions)
        tensors = dict(unet.named_parameters()) if ema is None else ema.tensors()
        write_tensors(folder / UNET, STEM, tensors, world, card=kind.card(steps, name))
    elif world.is_main:
        values = None if ema is None else ema.values
        files = lora_bytes(unet, values, kind.card(steps, name))
        with ExitStack() as stack:  # all are written before one has its name, LORA last
            for file_name, data in files.items():
                stack.enter_context(durable_file(folder / file_name)).write(data)
        if KOHYA not in files:  # that of an earlier version, beside newer weights
            (folder / KOHYA).unlink(missing_ok=True)


def _write_config(unet: Any, folder: Path) -> None:
    config = json.loads(unet.to_json_string())
    config["_class_name"] = "UNet2DConditionModel"  # FSDP puts a class of its own in its place
    config.pop("_name_or_path", None)  # where the base lay is nobody's business
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_weights(unet: Any, full: bool, folder: Path, ema: Ema | None) -> None:
    """Put what ``write_weights`` wrote back, bit for bit: on a UNet of the same making, or in
    ``ema``."""
    if full:
        parameters = dict(unet.named_parameters())
        with torch.no_grad():
            for path in find_weights(folder / UNET).files:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        value = to_local(distribute_like(parameters[name], file.get_tensor(name)))
                        into = to_local(parameters[name]) if ema is None else ema.values[name]
                        into.copy_(value)
        return
    averaged = {} if ema is None else ema.parameters
    kept = {name: parameter.detach().clone() for name, parameter in averaged.items()}
    state = safetensors.torch.load_file(folder / LORA)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    adapter = next(iter(unet.peft_config))
    missing = set_peft_model_state_dict(unet, state, adapter_name=adapter)
    assert not missing.unexpected_keys, missing.unexpected_keys
    if ema is not None:
        with torch.no_grad():
            for name, parameter in ema.parameters.items():
                ema.values[name].copy_(parameter)
                parameter.copy_(kept[name])


def weights_bytes(unet: Any, kind: WeightsFormat) -> int:
    """What ``write_weights`` will take on the disk, but for headers and configs."""
    if kind.full:
        return tensors_bytes(dict(unet.named_parameters()))
    return len(LORA_FILES) * sum(4 * parameter.numel() for parameter in trainable(unet).values())


def tensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Of whole tensors, however they are sharded."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_space(path: Path, num_bytes: int) -> None:
    """Ask before hours of work are written to a disk that has no room for them.

    Raises:
        OSError: names the path, the bytes needed and those that are free.
    """
    needed, free = num_bytes + SMALL_FILES_BYTES, free_bytes(path.parent)
    if needed > free:
        raise OSError(
            f"{path}: cannot be written: it takes about {format_bytes(needed)}, and the disk has "
            f"{format_bytes(free)} left"
        )


def publish(
    unet: Any, kind: WeightsFormat, run: Path, world: DistContext, ema: Ema | None, *, steps: int
) -> Path:
    """The run's result: its averaged weights, where it keeps an average. A UNet comes as files of
    the dtype it was trained in and as fp16 files."""
    name = run.resolve().name
    size = weights_bytes(unet, kind)
    if not kind.full:
        if world.is_main:
            check_space(run / LORA, size)
        with writing(run / LORA):
            write_weights(unet, kind, run, world, ema, steps=steps, name=name)
        return run / LORA
    partial = run / f"{UNET}{PARTIAL}"
    if world.is_main:
        remove_path(partial)
        check_space(run / UNET, size + size // 2)
    with writing(run / UNET), removed_on_error(partial):
        _publish_unet(unet, kind, partial, world, ema, steps, name)
    return run / UNET


def _publish_unet(
    unet: Any,
    kind: WeightsFormat,
    partial: Path,
    world: DistContext,
    ema: Ema | None,
    steps: int,
    name: str,
) -> None:
    if world.is_main:
        partial.mkdir()
    write_weights(unet, kind, partial, world, ema, steps=steps, name=name)
    beyond: list[str] = []

    def halve(key: str, tensor: torch.Tensor) -> torch.Tensor:
        half = tensor.to(torch.float16)
        if not half.isfinite().all():
            beyond.append(key)
        return half

    tensors = dict(unet.named_parameters()) if ema is None else ema.tensors()
    card = kind.card(steps, name)
    write_tensors(partial / UNET, STEM, tensors, world, variant="fp16", card=card, convert=halve)
    if world.is_main:
        if beyond:
            warnings.warn(
                f"{beyond[0]} and {len(beyond) - 1} more weights are beyond fp16: use the fp32 "
                "file",
                stacklevel=2,
            )
        sync_files(partial)
        replace_path(partial / "scheduler", partial.with_name("scheduler"))
        replace_path(partial / UNET, partial.with_name(UNET))
        partial.rmdir()


def sync_files(folder: Path) -> None:
    """All files below ``folder``, on disk for good."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
