"""A base, or a VAE alone, in one ``.safetensors`` file: what it holds, by its header. Imports no
torch, and reads no tensor.
"""

import json
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdxl import BaseError
from sdxl.original import PREFIXES, OriginalNames, modern_name

CONFIGS = Path(__file__).with_name("configs")  # SDXL's own
CONFIGS_KEY = "shardtune.configs"  # in a file's metadata: those of models of other sizes
V_PRED, ZERO_SNR = "v_pred", "ztsnr"  # bare keys that say what a base predicts, on which schedule
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
TITLES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder 1 (CLIP-L)",
    "text_encoder_2": "text encoder 2 (OpenCLIP bigG)",
}
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_FOREIGN = (
    (r"(lora_|lycoris_|.*\.lora_)", "a LoRA, and no base: give it as --lora"),
    (r"cond_stage_model\.", "a Stable Diffusion 1 or 2 file"),
    (r".*\.?(joint_blocks|double_blocks|double_stream_modules)\.", "a file of SD3, Flux or alike"),
    (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner"),
    (r"edm_", "a model with EDM's noise schedule (Playground 2.5, CosXL)"),
    (r"control_model\.|.*controlnet_", "a ControlNet"),
)


def sdxl_config(component: str) -> dict[str, Any]:
    """SDXL's own config of a model or of the scheduler."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return dict(json.loads((CONFIGS / component / name).read_bytes()))


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``begin`` and ``end`` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
        BaseError: no whole safetensors file.
    """
    if path.is_file() and path.suffix.lower() in PICKLES:
        raise BaseError(f"{path}: a pickle: never loaded; convert it to safetensors")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError
            header = json.loads(file.read(length))
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {
            name: Tensor(
                about["dtype"],
                tuple(about["shape"]),
                *(8 + length + n for n in about["data_offsets"]),
            )
            for name, about in header.items()
        }
    except FileNotFoundError:
        raise BaseError(f"{path}: no such file") from None
    except OSError as error:
        raise BaseError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, struct.error):
        raise BaseError(f"{path}: not a whole safetensors file") from None
    for name, one in tensors.items():
        if one.end > size:
            raise BaseError(f"{path}: truncated: {name} ends at {one.end} of {size} bytes")
    return tensors, metadata


class SingleFile:
    """One file with some or all of SDXL's models, in the original layout; or with a VAE alone, its
    names without a prefix, in the original layout or that of diffusers.

    Raises:
        BaseError: no whole safetensors file, or one of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.metadata = read_header(path)
        for pattern, what in _FOREIGN:
            if any(re.match(pattern, key) for key in self.tensors):
                raise BaseError(f"{path}: no SDXL base: {what}")
        found = [key for key in self.tensors if key.startswith(PREFIXES["unet"])]
        if found and PREFIXES["unet"] + "label_emb.0.0.weight" not in self.tensors:
            raise BaseError(
                f"{path}: no SDXL, or damaged: its UNet has no label_emb, which takes SDXL's sizes "
                "and pooled embedding"
            )

    @cached_property
    def vae_prefix(self) -> str:
        """Of the VAE's names; a VAE alone has none."""
        alone = "encoder.conv_in.weight" in self.tensors
        return "" if alone else PREFIXES["vae"]

    @property
    def is_diffusers_vae(self) -> bool:
        return any(key.startswith("encoder.down_blocks.") for key in self.tensors)

    def holds(self, component: str) -> bool:
        return bool(self.keys(component))

    def keys(self, component: str) -> dict[str, str]:
        """The tensors of a model: the names in the file by those without the prefix."""
        prefix = self.vae_prefix if component == "vae" else PREFIXES[component]
        starts = (prefix,) if prefix else _VAE_PARTS
        return {key.removeprefix(prefix): key for key in self.tensors if key.startswith(starts)}

    def config(self, component: str) -> dict[str, Any]:
        """Of a model the file holds: what its metadata says (``write_original``), else SDXL's own;
        of a VAE alone also what the config.json beside it says.

        Raises:
            BaseError: it does not hold that model, or its metadata is damaged.
        """
        if not self.holds(component):
            prefix = PREFIXES[component]
            raise BaseError(
                f"{self.path}: holds no {TITLES[component]}: no tensor of it ({prefix}*)"
            )
        try:
            configs = json.loads(self.metadata.get(CONFIGS_KEY, "{}"))
            if component in configs:
                return dict(configs[component])
        except (ValueError, TypeError):
            raise BaseError(f"{self.path}: its metadata {CONFIGS_KEY} is damaged") from None
        if component == "vae" and not self.vae_prefix and (beside := self._config_beside()):
            return beside
        return sdxl_config(component)

    def _config_beside(self) -> dict[str, Any] | None:
        """Of a VAE alone: what a config.json in its folder says, where that is of a VAE."""
        path = self.path.with_name("config.json")
        if not path.is_file():
            return None
        try:
            config = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise BaseError(f"{path}: not valid JSON") from None
        return config if config.get("_class_name") == "AutoencoderKL" else None

    def pieces(self, component: str) -> dict[str, "Piece"]:
        """How the model's tensors are made from those of the file, by the file's names."""
        names = OriginalNames(component, self.config(component))
        as_diffusers = component == "vae" and self.is_diffusers_vae
        found = {}
        for key, full in self.keys(component).items():
            here = (modern_name("vae", key),) if as_diffusers else names.names_of(key)
            found[full] = Piece(key, here, None if as_diffusers else names)
        return found

    def scheduler_config(self) -> dict[str, Any]:
        """SDXL's own, with what the file's bare keys say, or its metadata."""
        config = sdxl_config("scheduler")
        stated = self.metadata.get("modelspec.prediction_type")
        if V_PRED in self.tensors or stated in ("v", "v_prediction"):
            config["prediction_type"] = "v_prediction"
        if ZERO_SNR in self.tensors:
            # Only at the last timestep is the noise pure, so sampling must start there.
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, ``key`` without its prefix, and what it becomes: ``names`` of
    diffusers'; none where no layer uses it, None where the model has no such tensor."""

    key: str
    names: tuple[str, ...] | None
    original: OriginalNames | None

    def split(self, tensor: Any) -> dict[str, Any]:
        """The tensor (of torch or numpy) by diffusers' names; the parts are views."""
        if self.original is None:
            return dict.fromkeys(self.names or (), tensor)
        return self.original.split(self.key, tensor)
