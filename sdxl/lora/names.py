"""The names of tensors in LoRA files, in every tool's convention, and of the files themselves.

diffusers and peft use the module's own name with a prefix and a suffix. kohya's key is
``lora_unet_`` and the module's name in the original layout, with ``_`` for ``.``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sdxl.original_names import OriginalNames

LORA = "pytorch_lora_weights.safetensors"  # the name load_lora_weights looks for in a folder
KOHYA = "kohya_lora_weights.safetensors"  # beside it, for the UIs
PEFT = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base
SHARDTUNE_PREFIX = "shardtune."  # in that metadata; diffusers looks at a part's own prefix alone
UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PREFIXES = {  # of a tensor's name, longest first where one begins another
    "lora_unet_": UNET,
    "lycoris_": UNET,
    "lora_te1_": TEXT_ENCODERS[0],
    "lora_te2_": TEXT_ENCODERS[1],
    "lora_te_": TEXT_ENCODERS[0],
    "base_model.model.": UNET,
    "model.diffusion_model.": UNET,
    "diffusion_model.": UNET,
    "text_encoders.clip_l.transformer.": TEXT_ENCODERS[0],
    "text_encoders.clip_g.transformer.": TEXT_ENCODERS[1],
    "text_encoder.": TEXT_ENCODERS[0],
    "text_encoder_2.": TEXT_ENCODERS[1],
    "clip_l.": TEXT_ENCODERS[0],
    "clip_g.": TEXT_ENCODERS[1],
    "unet.": UNET,
}
EXTRAS = {  # what tools bundle with a LoRA and no weight of the models is made of
    "bundle_emb.": "bundled embeddings",
    "_aux.": "auxiliary tensors",
}
TENSORS = {
    "down": r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.\w+)?\.weight",
    "up": r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)(\.\w+)?\.weight",
    "mid": r"\.lora_mid\.weight",
    "magnitude": r"\.lora_magnitude_vector(\.\w+)?(\.weight)?",
}
NUMBERS = frozenset({"alpha", "scalar", "on_input"})
OLD_NAMES = (  # diffusers before peft kept attention's in its processors
    (r"\.processor\.to_out_lora\.", r".to_out.0.lora."),
    (r"\.processor\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.self_attn\.to_out_lora\.", r".self_attn.out_proj.lora."),
    (r"\.self_attn\.to_([qkv])_lora\.", r".self_attn.\1_proj.lora."),
)
UNSUPPORTED = {  # what is known by name only
    r"\.oft_R\b|\.boft_[Rs]\b": "an OFT in peft's form",
    r"\.bias_(indices|values|size)$": "a LoRA with sparse differences",
    r"\.([qp]_layer\.weight|lambda_layer)$": "a T-LoRA",
    r"\.(set_weight|reshape_weight)$": "weights that replace the base's",
    r"\.vera_lambda_": "a VeRA",
    r"\.lokr_t1$": "a LoKr with a core in its first factor",
    r"^(clip_[lg]|emb_params|string_to_param.*)$": "an embedding and no LoRA",
}

KEY = "lora_unet_"
TEXT_KEYS = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def kohya_keys(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The kohya key of each module of a UNet, by diffusers' name. ``config`` is the UNet's."""
    original = OriginalNames("unet", dict(config))
    keys = {name: original.key_of(f"{name}.weight") for name in names}
    return {
        name: KEY + key.removesuffix(".weight").replace(".", "_")
        for name, key in keys.items()
        if key is not None
    }


def kohya_text_keys(names: Iterable[str], part: str) -> dict[str, str]:
    """The kohya key of each module of a text encoder."""
    return {n: TEXT_KEYS[part] + long_name(n).replace(".", "_") for n in names}


def key_table(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The modules of a UNet by their kohya keys without ``lora_unet_``; and by diffusers' own
    names with ``_``, which some trainers write."""
    keys = kohya_keys(names, config)
    own = {name.replace(".", "_"): name for name in keys}
    return own | {key.removeprefix(KEY): name for name, key in keys.items()}


def long_name(name: str) -> str:
    """A text encoder's module with the level of names that transformers 5.6 dropped and files of
    LoRAs keep."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
