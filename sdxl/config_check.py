"""The configs of SDXL's parts, checked before a library believes them. Imports no torch.

The libraries check hardly anything: a number that is text fails somewhere in a layer, and a count
of a billion builds layers until memory is out.
"""

from pathlib import Path
from typing import Any

from sdxl import BaseError

MOST = 1_000_000  # no number in any of these configs is larger
MOST_LAYERS = 256
MOST_DEPTH = 6  # lists in lists: a UNet has at most two of them
_LAYERS = (
    "layers_per_block",
    "num_hidden_layers",
    "reverse_transformer_layers_per_block",
    "transformer_layers_per_block",
)
_SIZE, _NUMBER, _TEXT = "a positive whole number", "a number", "text"
_SIZES, _TEXTS = "a list of positive whole numbers", "a list of texts"
_BLOCKS = {"block_out_channels": _SIZES, "down_block_types": _TEXTS, "up_block_types": _TEXTS}
_CLIP = dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers"), _SIZE)
_CLIP |= dict.fromkeys(("intermediate_size", "max_position_embeddings", "vocab_size"), _SIZE)
_KINDS: dict[str, dict[str, str]] = {
    "unet": {
        **dict.fromkeys(("in_channels", "out_channels", "sample_size"), _SIZE),
        **dict.fromkeys(("addition_time_embed_dim", "cross_attention_dim"), _SIZE),
        "projection_class_embeddings_input_dim": _SIZE,
        **_BLOCKS,
    },
    "vae": {
        **dict.fromkeys(("in_channels", "latent_channels", "out_channels"), _SIZE),
        "scaling_factor": _NUMBER,
        **_BLOCKS,
    },
    "text_encoder": _CLIP,
    "text_encoder_2": {**_CLIP, "projection_dim": _SIZE},
    "scheduler": {
        "_class_name": _TEXT,
        "beta_end": _NUMBER,
        "beta_schedule": _TEXT,
        "beta_start": _NUMBER,
        "num_train_timesteps": _SIZE,
        "prediction_type": _TEXT,
    },
}


def check_config(where: str | Path, component: str, config: dict[str, Any]) -> None:
    """Refuse a config with values that no SDXL has. What it does not say is the library's to say.

    Raises:
        BaseError: names ``where`` and the field.
    """
    for name, value in config.items():
        if not _is_plain(value, MOST_LAYERS if name in _LAYERS else MOST):
            raise BaseError(f"{where}: its {name[:60]} holds numbers or lists that no SDXL has")
    for name, kind in _KINDS[component].items():
        value = config.get(name)
        if value is not None and not _is_of(value, kind):
            raise BaseError(f"{where}: its {name} must be {kind}, not {_shown(value)}")


def _is_plain(value: Any, most: int, depth: int = MOST_DEPTH) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | list | dict):
        return True
    if isinstance(value, int | float):
        return -most <= value <= most  # false of NaN too
    parts = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_plain(part, most, depth - 1) for part in parts)


def _is_of(value: Any, kind: str) -> bool:
    if kind in (_SIZES, _TEXTS):
        one = _SIZE if kind == _SIZES else _TEXT
        return isinstance(value, list) and bool(value) and all(_is_of(part, one) for part in value)
    if kind == _TEXT:
        return isinstance(value, str)
    whole = type(value) is int and value > 0
    return whole if kind == _SIZE else type(value) in (int, float)


def _shown(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | None) else "a list or table"
