"""The UNet of a run, and whether a cache was made for it."""

import warnings
from pathlib import Path
from typing import Any

import torch

from sdxl.base import ENCODERS, component_folder, model_config, read_config
from sdxl.fingerprint import encoder_digests_elsewhere
from sdxl.load import load_unet
from shards.reader import Cache
from train.adapters import add_lora
from train.config import TrainConfig
from train.objective import PREDICTION_TYPES


def build_unet(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The base's UNet on ``device``, ready to train: adapters on it, or all of it in fp32.

    A frozen base stands in the forward's ``dtype``; what is trained is always fp32.
    """
    unet = load_unet(config.base, torch.float32 if config.full else dtype)
    if config.full:
        unet.requires_grad_(True)
    else:
        add_lora(unet, config)
    checkpointing = config.gradient_checkpointing
    if device.type == "cuda" if checkpointing is None else checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(device).train()


def scheduler_config(base: str) -> dict[str, Any]:
    """The base's noise schedule."""
    return read_config(component_folder(base, "scheduler"))


def prediction_type(config: TrainConfig, scheduler: dict[str, Any]) -> str:
    """What the run asks for, else what the base says.

    Raises:
        ValueError: the base says something else than epsilon or v_prediction.
    """
    kind = config.prediction_type or scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"the base's prediction_type is {kind}; known: {', '.join(PREDICTION_TYPES)}"
        )
    return str(kind)


def check_cache(cache: Cache, base: str) -> None:
    """Refuse a cache of another shape than the base's UNet takes.

    Raises:
        ValueError: names the cache, what it holds, and what the UNet takes.
    """
    folder, unet = model_config(base, "unet")
    text, latents = cache.manifest["text"], cache.manifest.get("latents", {})
    added = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    for what, held, taken in (
        ("prompt embeddings of width", text["depth"], unet["cross_attention_dim"]),
        ("pooled embeddings of width", text["pooled"], added),
        ("latent channels:", latents.get("channels"), unet["in_channels"]),
    ):
        if held is not None and held != taken:
            raise ValueError(
                f"{cache.folder}: holds {what} {held}, but {folder} takes {taken}: "
                "encode the data set with this base"
            )


def check_encoders(cache: Cache, base: str) -> None:
    """Refuse a cache made with other encoders than the base holds; say what cannot be compared.

    The base's files are hashed in a process of their own (and remembered): no file of an encoder
    is opened here.
    """
    recipe, missing = cache.manifest["recipe"], []
    theirs = encoder_digests_elsewhere(base)
    for name in ENCODERS:
        if theirs[name] is None:
            missing.append(name)
        elif name == "vae" and not recipe["vae"]["of_base"]:
            continue  # encoded with --vae: meant to be another one
        elif theirs[name] != recipe[name]["digest"]:
            raise ValueError(
                f"{cache.folder}: made with another {name} than {base} holds; encode the data set "
                "with this base, or train from the base it was made with"
            )
    if missing:
        warnings.warn(
            f"{base} has no {', '.join(missing)}: whether {cache.folder} was made with this base's "
            "cannot be checked",
            stacklevel=2,
        )


def open_cache(path: Path, part: str) -> Cache:
    """The cache at ``path``, or its ``train`` or ``val`` where it is split in two."""
    if not (path / "manifest.json").exists() and (path / part).is_dir():
        return Cache(path / part)
    return Cache(path)


def open_val(config: TrainConfig, train: Cache) -> Cache | None:
    """The validation cache: the one named, else the one beside the training cache, else none.

    Raises:
        ValueError: it was made with other encoders than the training cache.
    """
    if config.val is not None:
        val = open_cache(config.val, "val")
    elif train.folder != config.cache and (config.cache / "val").is_dir():
        val = Cache(config.cache / "val")
    else:
        if config.eval_every:
            warnings.warn("--eval-every: there is no validation cache, so no eval", stacklevel=2)
        return None
    for name in ENCODERS:
        if val.manifest["recipe"][name]["digest"] != train.manifest["recipe"][name]["digest"]:
            raise ValueError(f"{val.folder}: made with another {name} than {train.folder}")
    return val if val.manifest["num_samples"] else None
