"""The recipe of a cache: every setting and model that changes the encoded tensors."""

from typing import Any

from precompute.settings import EncodeSettings
from runtime.files import content_digest
from sdxl.base import Base
from sdxl.fingerprint import config_digest, tokenizer_digest, weights_digest

VAE_CONFIG = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def read_recipe(settings: EncodeSettings, base: Base) -> dict[str, Any]:
    """Everything that decides the tensors besides images and captions, by the cause that a rerun
    names when it has changed."""
    vae_config = base.vae.config
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
            "digest": weights_digest(base.vae),
            "config": config_digest(vae_config),
            "of_base": settings.vae is None,
            "dtype": settings.vae_dtype,
            **{name: vae_config.get(name) for name in VAE_CONFIG},
        },
        "storage": {"dtype": settings.dtype, "mean_only": settings.mean_only},
    }
    if settings.long_captions > 1:
        recipe["long_captions"] = settings.long_captions
    return recipe | read_text_recipe(base)


def read_text_recipe(base: Base) -> dict[str, dict[str, str]]:
    """The part of the recipe that decides embeddings: each text encoder with its tokenizer."""
    recipe = {}
    for name in ("text_encoder", "text_encoder_2"):
        encoder = base.model(name)
        tokenizer = base.tokenizer(name.replace("text_encoder", "tokenizer"))
        recipe[name] = {
            "digest": weights_digest(encoder),
            "config": config_digest(encoder.config),
            "tokenizer": tokenizer_digest(tokenizer),
        }
    return recipe


def text_recipe_digest(recipe: dict[str, Any]) -> str:
    """A digest of everything but the text that decides a stored embedding."""
    parts = [recipe["text_encoder"], recipe["text_encoder_2"], recipe["storage"]["dtype"]]
    if "long_captions" in recipe:
        parts.append(recipe["long_captions"])
    return content_digest(parts)
