"""Writes a base as one file in the original layout, tensor by tensor."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.files import durable_file
from sdxl.fingerprint import config_digest
from sdxl.metadata import Schedule
from sdxl.original_names import LOGIT_SCALE, PREFIXES, OriginalNames
from sdxl.single_file import CONFIGS_KEY, V_PRED, ZERO_SNR, sdxl_config
from sdxl.tensor_files import (
    DTYPES,
    KEY,
    METADATA_KEY,
    TensorDigest,
    metadata_digest,
    tensor_bytes,
)

CLIP_SCALE = math.log(100)  # where CLIP's training stops it


@dataclass(frozen=True, eq=False)
class Component:
    """One model to be written: its config, and its tensors by diffusers' or transformers' names."""

    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Entry:
    key: str  # with its prefix
    names: OriginalNames
    sources: tuple[torch.Tensor, ...]
    dtype: torch.dtype

    def tensor(self, device: str | None = None) -> torch.Tensor:
        """The tensor as it is written; on "meta" its shape alone."""
        key = self.key.removeprefix(PREFIXES[self.names.component])
        return join(
            self.names, key, [source.detach().to(device or "cpu") for source in self.sources]
        )


def write_original(
    path: Path,
    parts: Mapping[str, Component],
    *,
    schedule: Schedule | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the ``parts`` (by component: unet, vae, text_encoder, text_encoder_2) as one file that
    appears complete or not at all. All tensors are written in ``dtype``, or in their own if it is
    None.

    Configs that are not SDXL's own are stored too, so that a small model can be read again.
    The library's writer would hold all bytes at once, and shuffle the metadata; this one holds one
    tensor, and the same tensors give the same bytes.

    Raises:
        ValueError: a tensor has no place in that layout.
    """
    entries = sorted(_entries(parts, dtype), key=lambda entry: (-entry.dtype.itemsize, entry.key))
    schedule = schedule or Schedule()
    metadata = {"format": "pt", **(metadata or {}), **configs_metadata(parts)}
    metadata[METADATA_KEY] = metadata_digest(metadata, [*metadata])
    digest = TensorDigest()
    with durable_file(path) as file:
        # The digest is known when all is written; until then a placeholder of its length is in the
        # header.
        file.write(_header(entries, schedule, metadata | {KEY: digest.text}))
        for entry in entries:
            tensor = entry.tensor().to(entry.dtype).contiguous()
            data = tensor_bytes(tensor)
            digest.add(entry.key, DTYPES[entry.dtype], tensor.shape, data)
            file.write(data)
        for flag in _flags(schedule):
            digest.add(flag, DTYPES[torch.float32], [0], memoryview(b""))
        file.seek(0)
        file.write(_header(entries, schedule, metadata | {KEY: digest.text}))


def _header(entries: list[_Entry], schedule: Schedule, metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: eight bytes of length, JSON, spaces up to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for entry in entries:
        shape = list(entry.tensor("meta").shape)
        begin, end = end, end + math.prod(shape) * entry.dtype.itemsize
        header[entry.key] = _tensor_info(entry.dtype, shape, begin, end)
    for flag in _flags(schedule):
        header[flag] = _tensor_info(torch.float32, [0], end, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def original_shapes(parts: Mapping[str, Component]) -> dict[str, list[int]]:
    """The tensors that ``write_original`` writes, by name."""
    return {entry.key: list(entry.tensor("meta").shape) for entry in _entries(parts, None)}


def configs_metadata(parts: Mapping[str, Component]) -> dict[str, str]:
    """The configs that are not SDXL's own, under one key; empty if all are."""
    other = {
        component: {name: v for name, v in part.config.items() if name != "_name_or_path"}
        for component, part in parts.items()
        if config_digest(part.config) != config_digest(sdxl_config(component))
    }
    return {CONFIGS_KEY: json.dumps(other, sort_keys=True)} if other else {}


def _tensor_info(dtype: torch.dtype, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}


def _flags(schedule: Schedule) -> list[str]:
    flags = [V_PRED] if schedule.prediction_type == "v_prediction" else []
    return flags + [ZERO_SNR] * bool(schedule.zero_snr)


def _entries(parts: Mapping[str, Component], dtype: torch.dtype | None) -> Iterator[_Entry]:
    for component, part in parts.items():
        names, prefix = OriginalNames(component, part.config), PREFIXES[component]
        sources: dict[str, list[str]] = {}
        for name in part.tensors:
            if name.endswith("position_ids"):
                continue
            key = names.key_of(name)
            if key is None:
                raise ValueError(f"{component}: {name} has no place in an original-layout file")
            sources.setdefault(key, []).append(name)
        for key, source_names in sources.items():
            expected = names.names_of(key) or ()
            short = [name.removeprefix("text_model.") for name in expected]
            by_short = {name.removeprefix("text_model."): name for name in source_names}
            if missing := [name for name in short if name not in by_short]:
                raise ValueError(f"{component}: {missing[0]} is missing")
            tensors = tuple(part.tensors[by_short[name]] for name in short)
            yield _Entry(prefix + key, names, tensors, dtype or tensors[0].dtype)
        if component == "text_encoder_2":
            scale = torch.tensor(CLIP_SCALE)
            yield _Entry(LOGIT_SCALE, names, (scale,), dtype or scale.dtype)


def join(names: OriginalNames, key: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The reverse of ``OriginalNames.split``."""
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if names.is_transposed(key):
        return tensor.T
    if names.is_convolution(key) and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor
