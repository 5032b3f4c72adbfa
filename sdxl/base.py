"""Where the parts of a base model lie, and whether they are SDXL's. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl import BaseError
from sdxl.hub import fetch_component
from sdxl.single_file import PICKLES, TITLES, SingleFile

MINIATURE = "miniature"  # names the base that comes with the checkout
MINIATURE_FOLDER = Path(__file__).parents[1] / "assets" / "miniature-sdxl"
BASE_HELP = "SDXL base: a diffusers folder, one .safetensors file, a hub id, or miniature."
TOKENIZERS_HELP = (
    "Folder with tokenizer/ and tokenizer_2/, or with one CLIP tokenizer; default: the base's, and "
    "for a single file SDXL's from the hub's local cache, or the hub."
)
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_NEEDED = (
    "addition_embed_type",
    "addition_time_embed_dim",
    "cross_attention_dim",
    "in_channels",
    "projection_class_embeddings_input_dim",
    "sample_size",
)
_CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}


def base_path(base: str) -> Path:
    """Where a base would lie on this machine; of a hub id there is nothing at this path."""
    return MINIATURE_FOLDER if base == MINIATURE else Path(base)


def component_path(base: str, component: str) -> Path:
    """The folder of one component of a diffusers folder, of a hub id, or of ``miniature``; of a
    single file the file itself.

    Of a hub id only this component is downloaded, as safetensors and configs, or taken from the
    local hub cache.

    Raises:
        BaseError: no such base, or it has no such component.
    """
    if not base:
        raise BaseError("--base: empty; give a diffusers folder, a file, a hub id, or miniature")
    folder = base_path(base)
    if is_file(base):
        if not SingleFile(folder).holds(component):
            raise BaseError(f"{base}: holds no {TITLES[component]}")
        return folder
    if not folder.exists():
        folder = fetch_component(base, component)
    if not (folder / component).is_dir():
        found = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else []
        raise BaseError(f"{base}: no SDXL base: it has no {component}/ (found: {_listing(found)})")
    return folder / component


def is_file(base: str) -> bool:
    """Whether a base is one file, there or not."""
    path = base_path(base)
    looks = path.suffix.lower() in (".safetensors", *PICKLES)
    return path.is_file() or (looks and not path.is_dir())


def _listing(names: list[str]) -> str:
    return ", ".join(names) or "nothing"


def read_config(folder: Path) -> dict[str, Any]:
    """A component's JSON config.

    Raises:
        BaseError: missing or unreadable.
    """
    path = folder / _CONFIGS.get(folder.name.removesuffix("_2"), "config.json")
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BaseError(f"{path}: missing; is this a whole diffusers folder?") from None
    except ValueError as error:
        raise BaseError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise BaseError(f"{path}: not a JSON object")
    return config


def model_config(base: str, component: str) -> tuple[Path, dict[str, Any]]:
    """Where a model lies (its folder, or the single file) and its config, refused where it is not
    of SDXL's architecture.

    Raises:
        BaseError: says what was found.
    """
    path = component_path(base, component)
    config = config_at(path, component)
    found = config.get("_class_name") or ", ".join(config.get("architectures") or ["nothing"])
    if path.is_dir() and found != _CLASSES[component]:  # a file says it by its tensors' names
        raise BaseError(f"{path}: no SDXL: a {found}, where SDXL has {_CLASSES[component]}")
    if component == "unet":
        if missing := [key for key in _NEEDED if key not in config]:
            raise BaseError(f"{path}: no SDXL: its config has no {', '.join(missing)}")
        addition, channels = config.get("addition_embed_type"), config.get("in_channels")
        if addition != "text_time":
            raise BaseError(
                f"{path}: no SDXL: its addition_embed_type is {addition} (SDXL: text_time) and "
                f"its cross_attention_dim {config.get('cross_attention_dim')} (SDXL: 2048)"
            )
        if channels != config.get("out_channels"):
            raise BaseError(f"{path}: takes {channels} channels: an inpainting UNet?")
    return path, config


def config_at(path: Path, component: str) -> dict[str, Any]:
    """The config of a model in its folder, or in a single file."""
    return read_config(path) if path.is_dir() else SingleFile(path).config(component)


def vae_config(source: str) -> tuple[Path, dict[str, Any]]:
    """As ``model_config``, of the VAE of a base, or of a VAE alone: its folder, or its file.

    Raises:
        BaseError: there is no VAE of SDXL's kind.
    """
    path = base_path(source)
    if not (path / "config.json").is_file():
        return model_config(source, "vae")
    config = read_config(path)
    if config.get("_class_name") != _CLASSES["vae"]:
        raise BaseError(f"{path}: no SDXL VAE: a {config.get('_class_name')}")
    return path, config


def scheduler_config(base: str) -> dict[str, Any]:
    """The base's noise schedule, and what its UNet predicts."""
    if is_file(base):
        return SingleFile(base_path(base)).scheduler_config()
    return read_config(component_path(base, "scheduler"))


def zeros_for_empty_prompt(base: str) -> bool:
    """``force_zeros_for_empty_prompt`` of the base's pipeline; SDXL's is true.

    Raises:
        BaseError: its ``model_index.json`` cannot be read.
    """
    if is_file(base):
        return True
    index = component_path(base, "text_encoder").parent / "model_index.json"
    if not index.is_file():
        return True
    try:
        config = json.loads(index.read_bytes())
        return bool(config.get("force_zeros_for_empty_prompt", True))
    except (ValueError, AttributeError):
        raise BaseError(f"{index}: not a pipeline's JSON") from None


@dataclass(frozen=True)
class Weights:
    """The safetensors files of one model, and the ``variant`` that names them."""

    variant: str | None
    files: tuple[Path, ...]


def find_weights(folder: Path) -> Weights:
    """The files that loading takes: the plain ones, else the fp16 ones; never a pickle.

    Raises:
        BaseError: there are none.
    """
    for variant in (None, "fp16"):
        dot = f".{variant}" if variant else ""
        for stem in ("diffusion_pytorch_model", "model"):
            whole = folder / f"{stem}{dot}.safetensors"
            listing = folder / f"{stem}.safetensors.index{dot}.json"
            if whole.is_file():
                return Weights(variant, (whole,))
            if listing.is_file():
                names = sorted(set(json.loads(listing.read_bytes())["weight_map"].values()))
                missing = [name for name in names if not (folder / name).is_file()]
                if missing:
                    raise BaseError(f"{folder}: {missing[0]} is missing")
                return Weights(variant, tuple(folder / name for name in names))
    pickles = [path.name for path in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
    if pickles:
        raise BaseError(
            f"{folder}: only {pickles[0]}, a pickle: never loaded; convert it to safetensors"
        )
    raise BaseError(f"{folder}: no .safetensors file")
