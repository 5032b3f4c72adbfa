"""Exports a fine-tuned UNet, or a base with a LoRA merged into it, as one file or a UNet folder."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from infer.export_files import new_file, new_folder
from infer.export_settings import ExportSettings
from sdxl.base import Base, ModelSource, find_weights, open_base
from sdxl.load import load_text_encoders, load_unet, load_vae
from sdxl.lora.apply import merged_weights
from sdxl.lora.read import read_lora_file
from sdxl.metadata import (
    ARCHITECTURE,
    ModelMetadata,
    Schedule,
    read_long_captions,
    read_model_metadata,
    schedule_beside,
    write_long_captions,
    write_schedule,
)
from sdxl.single_file import read_header
from sdxl.tensor_files import check_written, digest_metadata, sort_metadata
from sdxl.write_original import Component, write_original

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, eq=False)
class Model:
    """The parts that are written, by component: all four, or the UNet alone."""

    parts: dict[str, Component]
    schedule: Schedule
    model_metadata: ModelMetadata


def export_model(settings: ExportSettings, unet: Path | None, dtype: torch.dtype) -> str:
    """Write the UNet in the folder ``unet``, or the base with a LoRA in it; say what was written.

    Raises:
        ValueError: the weights or the base cannot be used, or do not fit in ``dtype``.
        OSError: what was read back is not what was written.
    """
    if settings.base is None:
        raise ValueError("a UNet needs --base: whose VAE and text encoders go with it")
    base = open_base(settings.base, vae=settings.vae)
    model = (
        _merged(settings, base, dtype)
        if unet is None
        else _fine_tuned(settings, base, ModelSource("unet", unet), dtype)
    )
    _check_finite(model.parts, dtype)
    if settings.is_file:
        _write_file(settings, model, dtype)
    else:
        _write_folder(settings, base, model, dtype)
    kind = "original-layout model" if settings.is_file else "UNet folder"
    num = sum(tensor.numel() for part in model.parts.values() for tensor in part.tensors.values())
    return f"{kind} of {num:,} parameters in {str(dtype).removeprefix('torch.')}"


def _fine_tuned(
    settings: ExportSettings, base: Base, unet: ModelSource, dtype: torch.dtype
) -> Model:
    parts = {"unet": Component(_config(unet), load_unet(unet, dtype).state_dict())}
    for component, module in _encoders(base, dtype).items():
        parts[component] = Component(_config(base.model(component)), module.state_dict())
    schedule = _schedule(base, schedule_beside(unet.path))
    model_metadata = read_model_metadata(read_header(find_weights(unet.path).files[0])[1])
    if (num_chunks := read_long_captions(unet.path)) > 1:
        model_metadata = replace(model_metadata, long_captions=num_chunks)
    return Model(parts, schedule, _model_metadata(settings, base, model_metadata, schedule))


def _merged(settings: ExportSettings, base: Base, dtype: torch.dtype) -> Model:
    file = read_lora_file(settings.weights)
    modules: dict[str, Any] = {"unet": load_unet(base.unet, _stored_dtype(base.unet))}
    if settings.is_file:  # in fp32: they may be stored in another dtype than the UNet
        modules |= _encoders(base, torch.float32)
    parts = {}
    for component, module in modules.items():
        state = module.state_dict()
        if component in file.parts:
            changed = merged_weights(module, component, [(file, settings.weight)])
            state |= {key: tensor.to(dtype) for key, tensor in changed}
        cast = {name: tensor.to(dtype) for name, tensor in state.items()}
        parts[component] = Component(_config(base.model(component)), cast)
    if left := [part for part in file.parts if part not in modules]:
        warnings.warn(
            f"{file.path}: what it has for {file.num_text_modules} modules of the text encoders "
            f"({', '.join(left)}) is not in a UNet folder; a .safetensors file takes it",
            stacklevel=2,
        )
    schedule = _schedule(base, file.model_metadata.schedule)
    return Model(parts, schedule, _model_metadata(settings, base, file.model_metadata, schedule))


def _encoders(base: Base, dtype: torch.dtype) -> dict[str, Any]:
    encoders = dict(zip(TEXT, load_text_encoders(base, dtype), strict=True))
    return {"vae": load_vae(base.vae, dtype), **encoders}


def _config(source: ModelSource) -> dict[str, Any]:
    """The model's config without the path that it was once loaded from."""
    return {name: value for name, value in source.config.items() if name != "_name_or_path"}


def _stored_dtype(unet: ModelSource) -> torch.dtype:
    """The dtype that holds a UNet without loss."""
    files = find_weights(unet.path).files if unet.file is None else (unet.path,)
    kinds = {
        tensor.dtype
        for file in files
        for tensor in read_header(file)[0].values()
        if tensor.end > tensor.begin
    }
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}
    return narrow.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _schedule(base: Base, own: Schedule) -> Schedule:
    """The schedule to sample with: the fine-tune's, and where that is silent the base's."""
    base_schedule = Schedule.of_config(base.scheduler_config)
    if own.prediction_type is None:
        return base_schedule
    zero_snr = base_schedule.zero_snr if own.zero_snr is None else own.zero_snr
    return Schedule(own.prediction_type, zero_snr)


def _model_metadata(
    settings: ExportSettings, base: Base, model_metadata: ModelMetadata, schedule: Schedule
) -> ModelMetadata:
    return replace(
        model_metadata,
        name=settings.title,
        base=base.name,
        license=base.license or model_metadata.license,
        prediction_type=schedule.prediction_type,
        rescale_betas_zero_snr=schedule.zero_snr,
    )


def _check_finite(parts: dict[str, Component], dtype: torch.dtype) -> None:
    for component, part in parts.items():
        for name, tensor in part.tensors.items():
            if not tensor.isfinite().all():
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(
                    f"{component}: {name} is not finite in {kind}; --dtype bf16 or fp32 reaches "
                    "further"
                )


def _num_bytes(parts: dict[str, Component], dtype: torch.dtype) -> int:
    tensors = [tensor for part in parts.values() for tensor in part.tensors.values()]
    return sum(tensor.numel() for tensor in tensors) * dtype.itemsize


def _write_file(settings: ExportSettings, model: Model, dtype: torch.dtype) -> None:
    out = settings.out
    kind = model.schedule.prediction_type
    if kind not in (None, "epsilon", "v_prediction"):
        raise ValueError(f"the UNet predicts {kind!r}, which one file cannot say; give a folder")
    side = 8 * int(model.parts["unet"].config["sample_size"])
    own = model.model_metadata
    metadata = own.modelspec(ARCHITECTURE, side) | own.to_metadata()
    with new_file(settings, _num_bytes(model.parts, dtype)) as partial:
        write_original(
            partial, model.parts, schedule=model.schedule, dtype=dtype, metadata=metadata
        )
        check_written(partial, out)
        written = open_base(partial)
        _compare(load_unet(written.unet, dtype), model.parts["unet"], out)
        for component, encoder in _encoders(written, dtype).items():
            _compare(encoder, model.parts[component], out)
        if Schedule.of_config(written.scheduler_config) != _as_bare_keys(model.schedule):
            raise OSError(f"{out}: its schedule was not read back; nothing is kept")


def _as_bare_keys(schedule: Schedule) -> Schedule:
    """The schedule as a single file's bare keys can express it."""
    kind = "v_prediction" if schedule.prediction_type == "v_prediction" else "epsilon"
    return Schedule(kind, True if schedule.zero_snr else None)


def _write_folder(settings: ExportSettings, base: Base, model: Model, dtype: torch.dtype) -> None:
    """``OUT/unet`` and ``OUT/scheduler``, as a full fine-tune leaves them."""
    part = model.parts["unet"]
    with new_folder(settings, _num_bytes({"unet": part}, dtype)) as partial:
        (partial / "unet").mkdir()
        state = {name: tensor.contiguous() for name, tensor in part.tensors.items()}
        metadata = digest_metadata(state, {"format": "pt"} | model.model_metadata.to_metadata())
        safetensors.torch.save_file(state, partial / "unet" / WEIGHTS, metadata=metadata)
        sort_metadata(partial / "unet" / WEIGHTS)
        check_written(partial / "unet" / WEIGHTS, settings.out)
        text = json.dumps(part.config, indent=2, sort_keys=True)
        (partial / "unet" / "config.json").write_text(text + "\n")
        write_long_captions(partial / "unet", model.model_metadata.long_captions or 1)
        write_schedule(base, model.schedule, partial)
        written = ModelSource("unet", partial / "unet")
        _compare(load_unet(written, dtype), part, settings.out)


def _compare(module: Any, part: Component, path: Path) -> None:
    """Check that a model that was read back has the tensors that were written, to the bit.

    Raises:
        OSError: it has not.
    """
    tensors = module.state_dict()
    is_equal = tensors.keys() == part.tensors.keys()
    if not is_equal or any(
        not torch.equal(tensors[n], tensor) for n, tensor in part.tensors.items()
    ):
        raise OSError(f"{path}: what was read back is not what was written; nothing is kept")
