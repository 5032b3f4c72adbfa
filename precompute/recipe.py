"""All that decides the tensors besides pictures and captions, by cause."""

from typing import Any

from precompute.settings import EncodeSettings
from sdxl.base import component_folder, model_config, read_config
from sdxl.fingerprint import config_digest, tokenizer_digest, weights_digest
from sdxl.load import vae_folder

VAE_CONFIG = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def read_recipe(settings: EncodeSettings) -> dict[str, Any]:
    """All that decides the tensors besides pictures and captions, by cause."""
    vae = vae_folder(settings.vae or settings.base)
    config = read_config(vae)
    mode = "square" if settings.square else "squash" if settings.squash else "buckets"
    preprocessing: dict[str, Any] = {
        "mode": mode,
        "resolution": settings.resolution,
        "resample": "lanczos",
    }
    if mode == "buckets":
        preprocessing["bucket_step"] = settings.bucket_step
    for name in ("flip", "crops", "mask_from_alpha"):
        if getattr(settings, name):
            preprocessing[name] = getattr(settings, name)
    recipe: dict[str, Any] = {
        "preprocessing": preprocessing,
        "vae": {
            "digest": weights_digest(vae),
            "config": config_digest(config),
            "of_base": settings.vae is None,
            "dtype": settings.vae_dtype,
            **{name: config.get(name) for name in VAE_CONFIG},
        },
        "storage": {"dtype": settings.dtype, "mean_only": settings.mean_only},
    }
    if settings.long_captions > 1:
        recipe["long_captions"] = settings.long_captions
    return recipe | read_text_recipe(settings.base)


def read_text_recipe(base: str) -> dict[str, dict[str, str]]:
    """The part of the recipe that decides embeddings: each text encoder with its tokenizer."""
    recipe = {}
    for name in ("text_encoder", "text_encoder_2"):
        folder, config = model_config(base, name)
        tokenizer = component_folder(base, name.replace("text_encoder", "tokenizer"))
        recipe[name] = {
            "digest": weights_digest(folder),
            "config": config_digest(config),
            "tokenizer": tokenizer_digest(tokenizer),
        }
    return recipe
