"""Writes and reads the weights of a run: a LoRA file, or a UNet folder as diffusers saves it.

Where there are several ranks, each writes files of its own, of bounded size: tensors are gathered
one by one, and one rank keeps each. What is to be written comes file by file (``Write``), so that
it can be written at once, one file in memory at a time, or be kept in memory and written beside
the next steps.
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
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
    fsync_tree,
    remove_path,
    removed_on_error,
    replace_path,
    writing,
)
from sdxl.base import Base, find_weights
from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.write import PREFIX, lora_bytes
from sdxl.metadata import (
    ModelMetadata,
    Schedule,
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

Write = Callable[[Path], None]  # writes a file, or several small ones, into a folder


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, of which this rank may have a part. Every rank must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def distribute_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A full ``value``, sharded as ``parameter`` is: this rank's part."""
    value = value.to(parameter.device)
    if is_dtensor(parameter) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    return value


def tensor_files(
    stem: str,
    sizes: Mapping[str, int],
    get: Callable[[str], torch.Tensor],
    world: DistContext,
    owners: Iterator[int],
    *,
    variant: str | None = None,
    card: ModelMetadata | None = None,
    convert: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
) -> Iterator[Write]:
    """Safetensors files of bounded size, named ``stem`` as diffusers names them, one after another.

    ``sizes`` are the tensors' bytes by name; ``get`` gives this rank's part of one. Each file is
    for the next rank of ``owners``, which alone keeps its tensors, on the CPU; but all ranks must
    go through all files, as the full tensors are gathered. ``convert`` takes each full tensor, and
    returns what is written; ``card`` is in the metadata.
    """
    metadata = {"format": "pt", **(card.to_metadata() if card else {})}
    dot = f".{variant}" if variant else ""
    parts = _split(sizes)
    files: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        counted = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        file_name = f"{stem}{dot}{counted}.safetensors"
        files |= dict.fromkeys(names, file_name.rpartition("/")[2])
        is_owner = next(owners) == world.rank
        world.wait()  # for the rank that writes the file before this one
        state = {}
        for name in names:
            tensor = full_tensor(get(name).detach())
            if is_owner:
                state[name] = convert(name, tensor.cpu()).contiguous().clone()
        if is_owner:
            yield partial(_write_tensor_file, file_name, state, metadata)
    if world.is_main and len(parts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        yield partial(_write_text_file, f"{stem}.safetensors.index{dot}.json", text)


def _write_tensor_file(
    name: str, state: dict[str, torch.Tensor], metadata: dict[str, str], folder: Path
) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path, metadata=digest_metadata(state, metadata))
    sort_metadata(path)


def _write_text_file(name: str, text: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _split(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, in parts of at most MAX_FILE_BYTES (or one tensor)."""
    parts: list[list[str]] = [[]]
    room = MAX_FILE_BYTES
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = MAX_FILE_BYTES
        parts[-1].append(name)
        room -= size
    return parts


@dataclass(frozen=True)
class WeightsFormat:
    """What the weights are: a LoRA or the whole UNet of ``base``, trained on ``schedule`` and on
    the ``caches`` of these digests, with these ``buckets`` and ``long_captions`` (see
    ``ModelMetadata``); ``license`` is the base's."""

    full: bool
    base: Base
    schedule: Schedule
    caches: tuple[str, ...] = ()
    buckets: tuple[tuple[int, int, int], ...] = ()
    license: str | None = None
    long_captions: int = 1

    @classmethod
    def of(
        cls, config: TrainConfig, base: Base, schedule: Schedule, caches: Sequence[Cache]
    ) -> "WeightsFormat":
        counts: Counter[Size] = Counter()
        for group in groups_of(caches):
            counts[group.bucket] += group.count * group.repeats
        return cls(
            full=config.full,
            base=base,
            license=base.license,  # now: of a hub id it may ask the hub
            schedule=schedule,
            caches=tuple(cache.data_digest for cache in caches),
            buckets=tuple((*bucket, count) for bucket, count in sorted(counts.items())),
            long_captions=caches[0].manifest["recipe"].get("long_captions", 1),
        )

    def card(self, steps: int, name: str | None) -> ModelMetadata:
        """The weights' metadata after ``steps`` steps."""
        return ModelMetadata(
            name=name,
            base=self.base.name,
            license=self.license,
            caches=self.caches,
            buckets=self.buckets,
            steps=steps,
            long_captions=self.long_captions if self.long_captions > 1 else None,
            **self.schedule.to_config(),
        )


def weights_files(
    unet: Any,
    kind: WeightsFormat,
    world: DistContext,
    ema: Ema | None,
    owners: Iterator[int],
    *,
    steps: int,
    name: str | None = None,
) -> Iterator[Write]:
    """The files of the trained weights, or of their average, in the dtype they are kept in; a LoRA
    has a file for diffusers and one for the UIs. ``steps`` and ``name`` are for the metadata. All
    ranks must go through all files, as in ``tensor_files``.
    """
    card = kind.card(steps, name)
    if not kind.full:
        if world.is_main:
            yield partial(_write_lora, lora_bytes(unet, None if ema is None else ema.values, card))
        return
    if world.is_main:
        yield partial(_write_configs, kind, _config_text(unet))
    parameters = dict(unet.named_parameters())
    if ema is None:
        yield from tensor_files(
            f"{UNET}/{STEM}", sizes_of(parameters), parameters.__getitem__, world, owners, card=card
        )
    else:
        stem = f"{UNET}/{STEM}"
        yield from tensor_files(stem, ema.sizes(), ema.tensor, world, owners, card=card)


def _write_lora(files: dict[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # all are written before one has its name, LORA last
        for file_name, data in files.items():
            stack.enter_context(durable_file(folder / file_name)).write(data)
    if KOHYA not in files:  # that of an earlier version, beside newer weights
        (folder / KOHYA).unlink(missing_ok=True)


def _write_configs(kind: WeightsFormat, config: str, folder: Path) -> None:
    """Write the configs beside the tensors of a UNet."""
    folder.mkdir(parents=True, exist_ok=True)
    write_schedule(kind.base, kind.schedule, folder)
    _write_text_file(f"{UNET}/config.json", config, folder)
    write_long_captions(folder / UNET, kind.long_captions)


def _config_text(unet: Any) -> str:
    config = json.loads(unet.to_json_string())
    config["_class_name"] = "UNet2DConditionModel"  # FSDP puts a class of its own in its place
    config.pop("_name_or_path", None)  # the path of the base is private
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def read_weights(unet: Any, full: bool, folder: Path, ema: Ema | None) -> None:
    """Put what ``weights_files`` wrote back, bit for bit: into a UNet that was built alike, or into
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
    before = {name: parameter.detach().clone() for name, parameter in averaged.items()}
    state = safetensors.torch.load_file(folder / LORA)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    adapter = next(iter(unet.peft_config))
    missing = set_peft_model_state_dict(unet, state, adapter_name=adapter)
    assert not missing.unexpected_keys, missing.unexpected_keys
    if ema is not None:
        with torch.no_grad():
            for name, parameter in ema.parameters.items():
                ema.values[name].copy_(parameter)
                parameter.copy_(before[name])


def weights_bytes(unet: Any, kind: WeightsFormat, ema: Ema | None) -> int:
    """The bytes that ``weights_files`` will write, without headers and configs."""
    if kind.full:
        sizes = sizes_of(dict(unet.named_parameters())) if ema is None else ema.sizes()
        return sum(sizes.values())
    return len(LORA_FILES) * sum(4 * parameter.numel() for parameter in trainable(unet).values())


def sizes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The bytes of each full tensor, sharded or not."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def check_space(path: Path, num_bytes: int) -> None:
    """Refuse to write where the disk has no room, before hours of work are spent.

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
    """Write the result of the run: its averaged weights, if it keeps an average. A UNet is written
    in the dtype it was trained in, and in fp16."""
    name, owners = run.resolve().name, cycle(range(world.size))
    size = weights_bytes(unet, kind, ema)
    if not kind.full:
        if world.is_main:
            check_space(run / LORA, size)
        with writing(run / LORA):
            for write in weights_files(unet, kind, world, ema, owners, steps=steps, name=name):
                write(run)
        return run / LORA
    partial_folder = run / f"{UNET}{PARTIAL}"
    if world.is_main:
        remove_path(partial_folder)
        half_bytes = sum(2 * parameter.numel() for parameter in unet.parameters())
        check_space(run / UNET, size + half_bytes)
        partial_folder.mkdir()
    world.wait()  # the others write into it too
    with writing(run / UNET), removed_on_error(partial_folder):
        _publish_unet(unet, kind, partial_folder, world, ema, owners, steps, name)
    return run / UNET


def _publish_unet(
    unet: Any,
    kind: WeightsFormat,
    folder: Path,
    world: DistContext,
    ema: Ema | None,
    owners: Iterator[int],
    steps: int,
    name: str,
) -> None:
    for write in weights_files(unet, kind, world, ema, owners, steps=steps, name=name):
        write(folder)
    beyond: list[str] = []

    def halve(key: str, tensor: torch.Tensor) -> torch.Tensor:
        half = tensor.to(torch.float16)
        if not half.isfinite().all():
            beyond.append(key)
        return half

    parameters = dict(unet.named_parameters())
    get = parameters.__getitem__ if ema is None else ema.tensor
    sizes = {key: 2 * parameter.numel() for key, parameter in parameters.items()}
    card = kind.card(steps, name)
    for write in tensor_files(
        f"{UNET}/{STEM}", sizes, get, world, owners, variant="fp16", card=card, convert=halve
    ):
        write(folder)
    beyond = world.gather(beyond)  # and with it, all have written their files
    if world.is_main:
        if beyond:
            warnings.warn(
                f"{beyond[0]} and {len(beyond) - 1} more weights are beyond fp16: use the fp32 "
                "file",
                stacklevel=2,
            )
        fsync_tree(folder)
        replace_path(folder / "scheduler", folder.with_name("scheduler"))
        replace_path(folder / UNET, folder.with_name(UNET))
        folder.rmdir()
