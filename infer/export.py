"""Exports weights to files that other tools read: a LoRA, or a whole model.

What was written is read back and compared with what it was made from, before it gets its name.
"""

import math
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infer.export_files import locked_output, new_file
from infer.export_model import export_model
from infer.export_settings import ExportSettings
from runtime.devices import DTYPES
from runtime.files import write_durable
from sdxl.base import Base, open_base
from sdxl.load import model_without_weights
from sdxl.lora.apply import match_to_model
from sdxl.lora.names import UNET
from sdxl.lora.read import LoraFile, read_lora_file
from sdxl.lora.weights import LoraWeights
from sdxl.lora.write import Parts, diffusers_bytes, kohya_bytes
from sdxl.metadata import ModelMetadata, weights_folder
from sdxl.single_file import sdxl_config
from sdxl.tensor_files import check_written


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    description: str
    num_bytes: int


def export(settings: ExportSettings) -> Exported:
    """Write a LoRA, or a whole UNet, in another form.

    Raises:
        ValueError: the weights or the base cannot be used, or something is at OUT already.
        OSError: what was read back is not what was written.
    """
    unet = unet_folder(settings.weights)
    if unet is not None and settings.merge:
        raise ValueError(f"{settings.weights}: a whole UNet; --merge takes a LoRA")
    with locked_output(settings, unet):
        if unet is None and not settings.merge:
            description = _export_lora(settings)
        else:
            dtype = DTYPES.get(settings.dtype, torch.float16)
            description = export_model(settings, unet, dtype)
    files = [settings.out] if settings.is_file else settings.out.glob("unet/*")
    return Exported(settings.out, description, sum(path.stat().st_size for path in files))


def unet_folder(path: Path) -> Path | None:
    """The folder of a whole UNet that ``path`` is or has; None: it must be a LoRA."""
    path = weights_folder(path)
    if (path / "unet" / "config.json").is_file():
        return path / "unet"
    return path if (path / "config.json").is_file() and any(path.glob("diffusion*")) else None


def _export_lora(settings: ExportSettings) -> str:
    file = read_lora_file(settings.weights)
    file.check_adapter()
    kind = settings.format
    if kind == "auto":
        kind = "diffusers" if file.kind == "kohya" else "kohya"
    base = None if settings.base is None else open_base(settings.base)
    models = {part: _model(base, part) for part in file.parts}
    parts = _in_dtype(_match_parts(file, models, base), settings.dtype, file.path)
    model_metadata = _model_metadata(settings, file, parts)
    if kind == "kohya":
        if any(adapter.magnitude is not None for adapter in parts.get(UNET, {}).values()):
            warnings.warn(
                "this is a DoRA, which ComfyUI, A1111, InvokeAI and sd-scripts apply "
                "otherwise than it was trained; they read the model that --merge writes",
                stacklevel=2,
            )
        config = models[UNET].config if UNET in models else sdxl_config(UNET)
        data = kohya_bytes(parts, config, model_metadata)
    else:
        data = diffusers_bytes(parts, model_metadata)
    with new_file(settings, len(data)) as partial:
        write_durable(partial, data)
        check_written(partial, settings.out)
        _compare(_match_parts(read_lora_file(partial), models, base), parts, settings.out)
    every = [adapter for adapters in parts.values() for adapter in adapters.values()]
    alphas = {adapter.kohya_alpha if kind == "kohya" else adapter.alpha for adapter in every}
    ranks = {adapter.rank for adapter in every}
    return (
        f"{kind} LoRA of {len(every)} modules, rank {_range_of(ranks)}, alpha {_range_of(alphas)}"
    )


def _range_of(values: set[Any]) -> str:
    """One value, or the range of several."""
    ends = sorted({min(values), max(values)})
    return " to ".join(f"{value:g}" for value in ends)


def _model(base: Base | None, part: str) -> Any:
    """The model that a part of a LoRA changes, without weights: module names and shapes."""
    return model_without_weights(
        part, sdxl_config(part) if base is None else base.model(part).config
    )


def _match_parts(
    file: LoraFile, models: dict[str, Any], base: Base | None
) -> dict[str, dict[str, LoraWeights]]:
    try:
        return {part: match_to_model(file, part, model) for part, model in models.items()}
    except ValueError as error:
        if base is not None:
            raise
        raise ValueError(f"{error}; --base says what it is of, where that is not SDXL") from None


def _in_dtype(
    parts: dict[str, dict[str, LoraWeights]], dtype: str, path: Path
) -> dict[str, dict[str, LoraWeights]]:
    kind = DTYPES.get(dtype)  # None: as they are
    cast = {
        part: {
            name: adapter if kind is None else adapter.to(kind)
            for name, adapter in adapters.items()
        }
        for part, adapters in parts.items()
    }
    for adapters in cast.values():
        for name, adapter in adapters.items():
            factors = [
                adapter.down,
                adapter.up,
                *([] if adapter.magnitude is None else [adapter.magnitude]),
            ]
            if not all(factor.float().isfinite().all() for factor in factors):
                how = "; try --dtype fp32" if dtype == "fp16" else ""
                raise ValueError(f"{path}: its weights on {name} are not finite{how}")
    return cast


def _model_metadata(settings: ExportSettings, file: LoraFile, parts: Parts) -> ModelMetadata:
    """The file's own metadata, or what another tool's metadata has of it; rank and alpha are those
    of most adapters."""
    model_metadata, metadata = file.model_metadata, file.metadata
    every = [adapter for adapters in parts.values() for adapter in adapters.values()]
    (rank, alpha), _ = Counter((adapter.rank, adapter.alpha) for adapter in every).most_common(1)[0]
    steps = metadata.get("ss_steps", "")
    return replace(
        model_metadata,
        name=settings.title,
        license=model_metadata.license or metadata.get("modelspec.license"),
        steps=model_metadata.steps or (int(steps) if steps.isdecimal() else None),
        rank=rank,
        alpha=alpha,
    )


def _compare(read_back: Parts, expected: Parts, path: Path) -> None:
    """Check that what was read back changes each weight alike: equal factors, to the bit, and equal
    scales. Comparing their products would be no stricter, and far slower at full size.

    Raises:
        OSError: they differ.
    """
    is_equal = {part: modules.keys() for part, modules in read_back.items()} == {
        part: modules.keys() for part, modules in expected.items()
    }
    for part in expected if is_equal else ():
        is_equal = is_equal and all(
            _same(read_back[part][n], adapter) for n, adapter in expected[part].items()
        )
    if not is_equal:
        raise OSError(f"{path}: what was read back is not what was written; nothing is kept")


def _same(adapter: LoraWeights, other: LoraWeights) -> bool:
    factors = torch.equal(adapter.down, other.down) and torch.equal(adapter.up, other.up)
    if adapter.magnitude is None or other.magnitude is None:
        rows = adapter.magnitude is other.magnitude
    else:
        rows = torch.equal(adapter.magnitude, other.magnitude)
    return factors and rows and math.isclose(adapter.scale, other.scale, rel_tol=1e-6)
