"""Names of tensors in SDXL's original layout and in diffusers', converted both ways. No torch.

Most shared files have the original layout. One file holds all models, each under a prefix, by the
names of Stability's code (UNet and VAE), of transformers (text encoder 1) and of open_clip (text
encoder 2). Three things differ in more than the name: open_clip joins q, k and v to one tensor, and
keeps its projection transposed; the attention of the VAE is a 1x1 convolution there and a linear
layer in diffusers.
"""

import re
from collections.abc import Sequence
from typing import Any

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
LOGIT_SCALE = PREFIXES["text_encoder_2"] + "logit_scale"  # of CLIP's training: no layer uses it
# CLIP's training scale, position numbers, and parts of the VAE's training: no layer uses them.
_UNUSED_KEY = re.compile(r"logit_scale|(.+\.)?position_ids|(loss|model_ema)\..+")
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_POSITION_EMBEDDING = ("text_model.embeddings.position_embedding.weight", "positional_embedding")
_TEXT_PROJECTION = ("text_projection.weight", "text_projection")
_JOINT_QKV = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_SEPARATE_QKV = re.compile(
    r"text_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)"
)
_VAE_CONVOLUTION = re.compile(r"(?:en|de)coder\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight")

_OLD_ATTENTION = re.compile(r"(.+\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)")


class OriginalNames:
    """The names of one model's tensors in both layouts; keys are without the model's prefix.

    ``config`` is the model's, as diffusers or transformers have it: the names of a level's blocks
    depend on how many there are.
    """

    def __init__(self, component: str, config: dict[str, Any]) -> None:
        self.component = component
        make = {"unet": _unet_modules, "vae": _vae_modules, "text_encoder_2": _text_modules}
        self._modules = make[component](config) if component in make else None
        self._modern_names = {
            original: modern for modern, original in (self._modules or {}).items()
        }

    def key_of(self, name: str) -> str | None:
        """The original tensor that is, or contains, diffusers' tensor ``name``; None if there is
        none."""
        if self._modules is None:
            return name.removeprefix("text_model.")
        if self.component == "text_encoder_2":
            if match := _SEPARATE_QKV.fullmatch(name):
                return f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
            for modern, original in (_POSITION_EMBEDDING, _TEXT_PROJECTION):
                if name == modern:
                    return original
        return _renamed(name, self._modules)

    def names_of(self, key: str) -> tuple[str, ...] | None:
        """diffusers' names for the tensor ``key``: one, or three for a joined q, k and v, or none
        if no layer uses it. None if it is no tensor of this model."""
        if _UNUSED_KEY.fullmatch(key):
            return ()
        if self._modules is None:
            return (key,)
        if self.component == "text_encoder_2":
            if match := _JOINT_QKV.fullmatch(key):
                layer = f"text_model.encoder.layers.{match[1]}.self_attn"
                return tuple(f"{layer}.{projection}_proj.{match[2]}" for projection in "qkv")
            for modern, original in (_POSITION_EMBEDDING, _TEXT_PROJECTION):
                if key == original:
                    return (modern,)
        name = _renamed(key, self._modern_names)
        return None if name is None else (name,)

    def is_transposed(self, key: str) -> bool:
        return self.component == "text_encoder_2" and key == _TEXT_PROJECTION[1]

    def is_convolution(self, key: str) -> bool:
        """Whether the original has a 1x1 convolution where diffusers has a linear layer."""
        return self.component == "vae" and bool(_VAE_CONVOLUTION.fullmatch(key))

    def split(self, key: str, tensor: Any) -> dict[str, Any]:
        """An original tensor (of torch or numpy) as diffusers has it, by name; the parts are views.

        Raises:
            ValueError: it cannot be split that way.
        """
        names = self.names_of(key) or ()
        if self.is_transposed(key):
            tensor = tensor.T
        elif self.is_convolution(key) and tensor.ndim == 4:
            tensor = tensor.reshape(tensor.shape[:2])
        if len(names) < 2:
            return dict.fromkeys(names, tensor)
        rows, left = divmod(tensor.shape[0], len(names))
        if left:
            raise ValueError(f"{key}: {tensor.shape[0]} rows are not q, k and v")
        return {name: tensor[n * rows : (n + 1) * rows] for n, name in enumerate(names)}


def modern_name(component: str, name: str) -> str:
    """The present name of a tensor that older libraries saved under another name."""
    if component == "text_encoder":
        return name.removeprefix("text_model.")
    if component == "vae" and (match := _OLD_ATTENTION.fullmatch(name)):
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        return f"{match[1]}.{new[match[2]]}.{match[3]}"
    return name


def _renamed(name: str, modules: dict[str, str]) -> str | None:
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if renamed := modules.get(".".join(parts[:end])):
            return ".".join([renamed, *parts[end:]])
    return None


def _submodules(modern: str, original: str, names: dict[str, str]) -> dict[str, str]:
    return {
        f"{modern}.{modern_part}": f"{original}.{original_part}"
        for modern_part, original_part in names.items()
    }


def _layers(config: dict[str, Any], num_levels: int) -> Sequence[int]:
    layers = config["layers_per_block"]
    return [layers] * num_levels if isinstance(layers, int) else list(layers)


def _unet_modules(config: dict[str, Any]) -> dict[str, str]:
    """Modules of a UNet by diffusers' names. The original counts blocks through all levels, and
    samplers are blocks of their own on the way down, and parts of the last one on the way up."""
    downs, ups = config["down_block_types"], config["up_block_types"]
    layers = _layers(config, len(downs))
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for number in (0, 1):
        original = f"middle_block.{2 * number}"
        modules |= _submodules(f"mid_block.resnets.{number}", original, _UNET_RESNET)
    block = 1
    for level, kind in enumerate(downs):
        modern = f"down_blocks.{level}"
        for number in range(layers[level]):
            modules |= _submodules(
                f"{modern}.resnets.{number}", f"input_blocks.{block}.0", _UNET_RESNET
            )
            if "CrossAttn" in kind:
                modules[f"{modern}.attentions.{number}"] = f"input_blocks.{block}.1"
            block += 1
        if level < len(downs) - 1:
            modules[f"{modern}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0
    for level, kind in enumerate(ups):
        modern, has_attention = f"up_blocks.{level}", "CrossAttn" in kind
        for number in range(layers[-1 - level] + 1):
            modules |= _submodules(
                f"{modern}.resnets.{number}", f"output_blocks.{block}.0", _UNET_RESNET
            )
            if has_attention:
                modules[f"{modern}.attentions.{number}"] = f"output_blocks.{block}.1"
            block += 1
        if level < len(ups) - 1:
            position = 2 if has_attention else 1
            modules[f"{modern}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{position}.conv"
    return modules


def _vae_modules(config: dict[str, Any]) -> dict[str, str]:
    """Modules of a VAE by diffusers' names. The original counts the decoder's levels backwards."""
    num_levels = len(config["block_out_channels"])
    layers = _layers(config, num_levels)[0]
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for part, direction, sampler in (
        ("encoder", "down", "downsample"),
        ("decoder", "up", "upsample"),
    ):
        modules |= {f"{part}.conv_in": f"{part}.conv_in", f"{part}.conv_out": f"{part}.conv_out"}
        modules[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        middle = f"{part}.mid_block"
        modules |= _submodules(f"{middle}.attentions.0", f"{part}.mid.attn_1", _VAE_ATTENTION)
        for number in (0, 1):
            original = f"{part}.mid.block_{number + 1}"
            modules |= _submodules(f"{middle}.resnets.{number}", original, _VAE_RESNET)
        for level in range(num_levels):
            modern = f"{part}.{direction}_blocks.{level}"
            original_level = level if direction == "down" else num_levels - 1 - level
            original = f"{part}.{direction}.{original_level}"
            for number in range(layers + (direction == "up")):
                block = f"{original}.block.{number}"
                modules |= _submodules(f"{modern}.resnets.{number}", block, _VAE_RESNET)
            modules[f"{modern}.{sampler}rs.0.conv"] = f"{original}.{sampler}.conv"
    return modules


def _text_modules(config: dict[str, Any]) -> dict[str, str]:
    """Modules of text encoder 2 by transformers' names, but for those that ``OriginalNames`` splits
    or transposes itself."""
    modules = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    for layer in range(config["num_hidden_layers"]):
        modern, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        modules |= _submodules(modern, original, _TEXT_LAYER)
    return modules
