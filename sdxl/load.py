"""Load one component of a base alone. Missing, surplus or misshapen tensors are refused."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from safetensors import SafetensorError

from sdxl.base import (
    BaseError,
    base_path,
    component_folder,
    find_weights,
    model_config,
    read_config,
)


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
    path = base_path(base)
    if (path / "config.json").is_file():
        return path
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


def load_scheduler(
    base: str, prediction_type: str | None = None, zero_snr: bool | None = None
) -> Any:
    """The sampling scheduler that the base names, as diffusers' pipeline would take it; or told
    what a fine-tune of it predicts, and on which schedule (None: the base's word).

    With ``zero_snr`` sampling starts at the last timestep ("trailing"): only there is the noise
    pure (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 3.3).

    Raises:
        BaseError: the base names no sampler that diffusers knows.
    """
    import diffusers

    folder = component_folder(base, "scheduler")
    name = str(read_config(folder).get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known:
        raise BaseError(f"{folder}: unknown scheduler {name}")
    scheduler: Any = kind.from_pretrained(str(folder))
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if zero_snr is not None:
        changes["rescale_betas_zero_snr"] = zero_snr
    if zero_snr:
        changes["timestep_spacing"] = "trailing"
    takes = inspect.signature(kind.__init__).parameters
    if deaf := sorted(name for name in changes if name not in takes and changes[name]):
        warnings.warn(
            f"pictures are drawn without {', '.join(deaf)}: the base's {kind.__name__} does not "
            "know it",
            stacklevel=2,
        )
    kept = {name: value for name, value in changes.items() if name in takes}
    return kind.from_config(scheduler.config, **kept) if kept else scheduler


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
