"""Load one component of a base alone. Missing, surplus or misshapen tensors are refused."""

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from safetensors import SafetensorError

from sdxl.base import BaseError, component_folder, find_weights, model_config, read_config


def load_unet(base: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a base, on the CPU, in ``dtype``, in eval mode.

    Raises:
        BaseError: missing, damaged, or no SDXL.
    """
    folder, _ = model_config(base, "unet")
    return _load(UNet2DConditionModel, folder, torch_dtype=dtype)


def load_unet_folder(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet saved by ``train --full``: the folder with its config and weights."""
    if not (folder / "config.json").is_file():
        raise BaseError(f"{folder}: no UNet folder (it has no config.json)")
    return _load(UNet2DConditionModel, folder, torch_dtype=dtype)


def load_vae(base: str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a base, or a folder that is a VAE itself."""
    folder = vae_folder(base)
    if read_config(folder).get("_class_name") != "AutoencoderKL":
        raise BaseError(f"{folder}: no SDXL VAE: a {read_config(folder).get('_class_name')}")
    return _load(AutoencoderKL, folder, torch_dtype=dtype)


def vae_folder(base: str) -> Path:
    """Where the VAE of ``base`` lies; ``base`` may be the VAE's own folder."""
    if (Path(base) / "config.json").is_file():
        return Path(base)
    return model_config(base, "vae")[0]


def load_text_encoders(base: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(CLIPTextModel, CLIPTextModelWithProjection) of a base."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    logging.disable_progress_bar()
    first, _ = model_config(base, "text_encoder")
    second, _ = model_config(base, "text_encoder_2")
    return (
        _load(CLIPTextModel, first, dtype=dtype),
        _load(CLIPTextModelWithProjection, second, dtype=dtype),
    )


def load_tokenizers(base: str) -> tuple[Any, Any]:
    """Both tokenizers, refused where their vocabulary is not their encoder's.

    (transformers loads a tokenizer folder without a vocabulary silently, as two tokens.)
    """
    from transformers import CLIPTokenizer

    def load(name: str) -> Any:
        folder = component_folder(base, name)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises anything of a folder it cannot read
            reason = str(error).strip().splitlines()[0]
            raise BaseError(f"{folder}: no tokenizer can be read from it: {reason}") from error
        encoder = name.replace("tokenizer", "text_encoder")
        expected = model_config(base, encoder)[1]["vocab_size"]
        if len(tokenizer) != expected:
            raise BaseError(
                f"{folder}: {len(tokenizer)} tokens, where {encoder} has {expected}: is its "
                "vocab.json missing?"
            )
        return tokenizer

    return load("tokenizer"), load("tokenizer_2")


def load_scheduler(base: str) -> Any:
    """The sampling scheduler that the base names, as diffusers' pipeline would take it."""
    import diffusers

    folder = component_folder(base, "scheduler")
    name = str(read_config(folder).get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known:
        raise BaseError(f"{folder}: unknown scheduler {name}")
    return kind.from_pretrained(str(folder))


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    weights = find_weights(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = kind.from_pretrained(
                str(folder),
                variant=weights.variant,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(
            f"{folder}: its weights do not load as {kind.__name__}: {reason}"
        ) from error
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := [n for n in map(str, info.get(fault, [])) if not n.endswith("position_ids")]:
            what = fault.replace("_keys", "")
            raise BaseError(
                f"{folder}: weights of another model, or damaged: {len(names)} tensors {what}, "
                f"e.g. {sorted(names)[0]}"
            )
    return model.eval().requires_grad_(False)
