"""The models in one ``.safetensors`` file (a base, a UNet or a VAE), read from its header.
Imports no torch, and reads no tensor.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.safe_parsing import open_regular, parse_json, read_json_object
from sdxl import BaseError
from sdxl.checks import (
    check_channels,
    check_config,
    check_context,
    check_names,
    describe_foreign_file,
)
from sdxl.original_names import PREFIXES, OriginalNames, modern_name

CONFIGS = Path(__file__).with_name("configs")  # SDXL's own
CONFIGS_KEY = "shardtune.configs"  # in a file's metadata: configs of models of other sizes
V_PRED, ZERO_SNR = "v_pred", "ztsnr"  # bare keys for the prediction type and schedule
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
TITLES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder 1 (CLIP-L)",
    "text_encoder_2": "text encoder 2 (OpenCLIP bigG)",
}
_DTYPE_BITS = dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
_DTYPE_BITS |= dict.fromkeys(("F32", "I32", "U32"), 32)
_DTYPE_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
_DTYPE_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8)
_FP8 = ("F8_E4M3", "F8_E5M2")
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", *_FP8)
# Beside fp8 weights: their scales, and tensors that only computing in fp8 needs.
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_FP8_EXTRAS = re.compile(
    r"(.+\.)?(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant)"
)


@dataclass(frozen=True)
class Layout:
    """How a model's tensors are named in a file: names begin with ``prefix``, and then one of
    ``starts`` where other models' tensors have no prefix."""

    prefix: str
    is_diffusers: bool
    starts: tuple[str, ...] = ("",)


_VAE_STARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_UNET_STARTS = (
    *("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb."),
    *("out.0.", "out.2."),
)
_DIFFUSERS_STARTS = (
    *("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "conv_norm_out."),
    *("time_embedding.", "add_embedding."),
)
_UNET_PREFIXES = (PREFIXES["unet"], "diffusion_model.", "unet.")  # the first: of whole models


def sdxl_config(component: str) -> dict[str, Any]:
    """SDXL's own config of a model or of the scheduler."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return dict(json.loads((CONFIGS / component / name).read_bytes()))


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry in a header; its data are the bytes ``begin`` to ``end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
        BaseError: no whole safetensors file, or one whose header contradicts itself.
    """
    if path.is_file() and path.suffix.lower() in PICKLES:
        raise BaseError(f"{path}: a pickle: never loaded; convert it to safetensors")
    head = b""
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            head = file.read(24)
            (length,) = struct.unpack("<Q", head[:8])
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError
            file.seek(8)
            header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in [*metadata.keys(), *metadata.values()]):
            raise TypeError
        if not all(map(_is_name, header)):
            raise ValueError
        tensors = {name: _tensor(fields, 8 + length) for name, fields in header.items()}
    except FileNotFoundError:
        raise BaseError(f"{path}: no such file") from None
    except OSError as error:
        raise BaseError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        content = describe_foreign_file(head) or (
            "not a regular file" if "regular file" in str(error) else ""
        )
        more = f" ({content})" if content else ""
        raise BaseError(f"{path}: not a whole safetensors file{more}") from None
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise BaseError(f"{path}: truncated: {name} ends at {tensor.end} of {size} bytes")
        bits = _DTYPE_BITS.get(tensor.dtype, 0)
        if bits and math.prod(tensor.shape) * bits != 8 * (tensor.end - tensor.begin):
            reason = (
                f"{tensor.end - tensor.begin} bytes are not {list(tensor.shape)} in {tensor.dtype}"
            )
            raise BaseError(f"{path}: damaged: {name}: {reason}")
    return tensors, metadata


def _is_name(text: Any) -> bool:
    """Whether a text is usable as the name of a tensor or dtype: messages show it."""
    return isinstance(text, str) and len(text) <= 500 and text.isprintable()


def _tensor(fields: dict[str, Any], start: int) -> Tensor:
    """A tensor's entry from its JSON; data begin at ``start``.

    Raises:
        ValueError, TypeError, KeyError: no description of a tensor.
    """
    shape, (begin, end) = fields["shape"], fields["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or begin > end:
        raise ValueError
    if not _is_name(fields["dtype"]):
        raise TypeError
    return Tensor(fields["dtype"], tuple(shape), start + begin, start + end)


class SingleFile:
    """One file with some or all of SDXL's models, in the original layout; or with a UNet or a VAE
    alone, its names with or without a prefix, in the original layout or that of diffusers.

    Raises:
        BaseError: no whole safetensors file, or one of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.metadata = read_header(path)
        check_names(path, self.tensors)
        if self.holds("unet"):
            self._check_unet()

    def _check_unet(self) -> None:
        shapes = {key: self.tensors[full].shape for key, full in self.keys("unet").items()}
        for key in ("input_blocks.0.0.weight", "conv_in.weight"):
            if len(shapes.get(key, ())) == 4:
                check_channels(self.path, shapes[key][1])
        check_context(self.path, shapes, self.config("unet").get("cross_attention_dim"))
        if not shapes.keys() & {"label_emb.0.0.weight", "add_embedding.linear_1.weight"}:
            raise BaseError(
                f"{self.path}: no SDXL, or damaged: its UNet has no label_emb, which takes SDXL's "
                "sizes and pooled embedding"
            )

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        """The layout of each model's tensors; for a model that is missing, the usual one."""
        layouts = {name: Layout(prefix, False) for name, prefix in PREFIXES.items()}
        if "encoder.conv_in.weight" in self.tensors:
            layouts["vae"] = Layout("", self._has("encoder.down_blocks."), _VAE_STARTS)
        for prefix in _UNET_PREFIXES:
            if self._has(prefix):
                layouts["unet"] = Layout(prefix, self._has(f"{prefix}down_blocks."))
                return layouts
        for starts in (_UNET_STARTS, _DIFFUSERS_STARTS):
            if self._has(starts[0]):
                layouts["unet"] = Layout("", starts is _DIFFUSERS_STARTS, starts)
        return layouts

    def _has(self, start: str) -> bool:
        return any(key.startswith(start) for key in self.tensors)

    def holds(self, component: str) -> bool:
        return bool(self.keys(component))

    def keys(self, component: str) -> dict[str, str]:
        """The tensors of a model: the names in the file by those without the prefix."""
        layout = self._layouts[component]
        starts = tuple(layout.prefix + start for start in layout.starts)
        return {
            key.removeprefix(layout.prefix): key
            for key in self.tensors
            if key.startswith(starts) and not _FP8_EXTRAS.fullmatch(key)
        }

    def config(self, component: str) -> dict[str, Any]:
        """A model's config: the one in the file's metadata (see ``write_original``); else, for a
        file with one model alone, the config.json beside it; else SDXL's own.

        Raises:
            BaseError: it does not hold that model, or its metadata is damaged.
        """
        if not self.holds(component):
            raise BaseError(self._missing(component))
        try:
            configs = parse_json(self.metadata.get(CONFIGS_KEY, "{}"))
            config = dict(configs[component]) if component in configs else None
        except (ValueError, TypeError):
            raise BaseError(f"{self.path}: its metadata {CONFIGS_KEY} is damaged") from None
        if config is not None:
            check_config(f"{self.path}, {CONFIGS_KEY}", component, config)
            return config
        if not self._layouts[component].prefix and (beside := self._config_beside(component)):
            return beside
        return sdxl_config(component)

    def _missing(self, component: str) -> str:
        """The message that the file has no such model, and which models it has."""
        titles = [TITLES[name] for name in PREFIXES if self.holds(name)]
        if titles == [TITLES["unet"]]:
            return (
                f"{self.path}: holds no {TITLES[component]}: it is a UNet alone, which train takes "
                "as --base; encode and generate need a base with all models"
            )
        prefix, beside = PREFIXES[component], f"; it holds {', '.join(titles)}" if titles else ""
        return f"{self.path}: holds no {TITLES[component]}: no tensor of it ({prefix}*){beside}"

    def _config_beside(self, component: str) -> dict[str, Any] | None:
        """The config.json in the file's folder, if it is for a model of this class."""
        path = self.path.with_name("config.json")
        if not path.is_file():
            return None
        try:
            config = read_json_object(path)
        except (ValueError, OSError) as error:
            raise BaseError(f"{error}") from None
        if config.get("_class_name") != CLASSES[component]:
            return None
        check_config(path, component, config)
        return config

    def tensor_mappings(self, component: str) -> dict[str, "TensorMapping"]:
        """How the model's tensors follow from those of the file, by the names in the file.

        Raises:
            BaseError: they are in a form that cannot be read.
        """
        try:
            names = OriginalNames(component, self.config(component))
        except (KeyError, IndexError, TypeError):  # a field is missing, or too short a list
            raise BaseError(
                f"{self.path}: its {component} has a config that is not whole"
            ) from None
        as_diffusers = self._layouts[component].is_diffusers
        tensor_mappings = {}
        for key, full in self.keys(component).items():
            modern_names = (modern_name(component, key),) if as_diffusers else names.names_of(key)
            scale = self._scale_of(full)
            if modern_names and self.tensors[full].dtype not in _FLOAT_DTYPES:
                raise BaseError(
                    f"{self.path}: {full} is in {self.tensors[full].dtype}, a quantized form that "
                    "cannot be read; use the fp16 file"
                )
            tensor_mappings[full] = TensorMapping(
                key, modern_names, None if as_diffusers else names, scale
            )
        prefix, used = (
            self._layouts[component].prefix,
            {mapping.scale for mapping in tensor_mappings.values()},
        )
        for key in self.tensors:
            if key.startswith(prefix) and key.endswith(_SCALE_SUFFIXES) and key not in used:
                raise BaseError(f"{self.path}: {key} scales no tensor that is known; use fp16")
        return tensor_mappings

    def _scale_of(self, full: str) -> str | None:
        """The tensor that a scaled fp8 weight is to be multiplied by: one number, or one a row.

        Raises:
            BaseError: of another form.
        """
        stem, _, name = full.rpartition(".")
        beside = [stem + suffix for suffix in _SCALE_SUFFIXES if stem + suffix in self.tensors]
        if name != "weight" or not beside:
            return None
        weight, scale = self.tensors[full], self.tensors[beside[0]]
        is_supported = weight.dtype in _FP8 and scale.dtype in ("F32", "F16", "BF16")
        if not is_supported or math.prod(scale.shape) not in (1, *weight.shape[:1]):
            raise BaseError(
                f"{self.path}: {beside[0]} scales {full} in a form that cannot be read; use the "
                "fp16 file"
            )
        return beside[0]

    def scheduler_config(self) -> dict[str, Any]:
        """SDXL's own config, changed by the file's bare keys or metadata."""
        config = sdxl_config("scheduler")
        stated = self.metadata.get("modelspec.prediction_type")
        if V_PRED in self.tensors or stated in ("v", "v_prediction"):
            config["prediction_type"] = "v_prediction"
        if ZERO_SNR in self.tensors:
            # Only at the last timestep is the noise pure, so sampling must start there.
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of a file, ``key`` without its prefix, and diffusers' ``names`` for what it
    becomes: an empty tuple if no layer uses it, None if the model has no such tensor."""

    key: str
    names: tuple[str, ...] | None
    original: OriginalNames | None
    scale: str | None = None  # the tensor of the file that it is to be multiplied by

    def split(self, tensor: Any) -> dict[str, Any]:
        """The tensor (of torch or numpy) by diffusers' names; the parts are views."""
        if self.original is None:
            return dict.fromkeys(self.names or (), tensor)
        return self.original.split(self.key, tensor)
