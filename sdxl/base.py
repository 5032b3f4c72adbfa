"""Where the parts of a base model lie, and whether they are SDXL's. Imports no torch."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.documents import read_json_object
from sdxl import BaseError
from sdxl.checks import check_channels, check_config
from sdxl.hub import fetch_component
from sdxl.single_file import CLASSES, PICKLES, SingleFile, sdxl_config

MINIATURE = "miniature"  # names the base that comes with the checkout
MINIATURE_FOLDER = Path(__file__).parents[1] / "assets" / "miniature-sdxl"
BASE_HELP = "SDXL base: a diffusers folder, one .safetensors file, a hub id, or miniature."
TOKENIZERS_HELP = (
    "Folder with tokenizer/ and tokenizer_2/, or with one CLIP tokenizer; default: the base's, and "
    "for a single file SDXL's from the hub's local cache, or the hub."
)
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
_REQUIRED_KEYS = (
    "addition_embed_type",
    "addition_time_embed_dim",
    "cross_attention_dim",
    "in_channels",
    "projection_class_embeddings_input_dim",
    "sample_size",
)
_WEIGHTS_STEM = r"(?:diffusion_pytorch_model|model)"
_WEIGHTS_NAME = re.compile(
    rf"{_WEIGHTS_STEM}(?:\.(?P<whole>(?!\S+-\d+-of-\d)[\w-]+))?\.safetensors"
    rf"|{_WEIGHTS_STEM}\.safetensors\.index(?:\.(?P<pieces>[\w-]+))?\.json"
)
_PIECE = re.compile(r"[^/\\\0]+\.safetensors")
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
        SingleFile(folder).config(component)  # or it has none
        return folder
    if not folder.exists():
        folder = fetch_component(base, component)
    if not (folder / component).is_dir():
        names = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else []
        raise BaseError(f"{base}: no SDXL base: it has no {component}/ (found: {_listing(names)})")
    return folder / component


def is_file(base: str) -> bool:
    """Whether a base is one file, there or not."""
    path = base_path(base)
    looks = path.suffix.lower() in (".safetensors", *PICKLES)
    return path.is_file() or (looks and not path.is_dir())


def _listing(names: list[str]) -> str:
    return ", ".join(names) or "nothing"


def read_config(folder: Path, component: str | None = None) -> dict[str, Any]:
    """A component's JSON config; ``component`` says which where the folder's name does not.

    Raises:
        BaseError: missing, unreadable, or with values that no SDXL has.
    """
    component = component or folder.name
    path = folder / _CONFIGS.get(component.removesuffix("_2"), "config.json")
    try:
        config = read_json_object(path)
    except FileNotFoundError:
        raise BaseError(f"{path}: missing; is this a whole diffusers folder?") from None
    except ValueError as error:
        raise BaseError(str(error)) from None
    if component in (*CLASSES, "scheduler"):
        check_config(path, component, config)
    return config


def model_config(base: str, component: str) -> tuple[Path, dict[str, Any]]:
    """Where a model lies (its folder, or the single file) and its config, refused where it is not
    of SDXL's architecture.

    Raises:
        BaseError: says what was found.
    """
    path = component_path(base, component)
    config = config_at(path, component)
    stated = config.get("_class_name") or config.get("architectures") or "nothing"
    class_name = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    if path.is_dir() and class_name != CLASSES[component]:  # a file says it by its tensors' names
        raise BaseError(f"{path}: no SDXL: a {class_name}, where SDXL has {CLASSES[component]}")
    if component == "unet":
        if missing := [key for key in _REQUIRED_KEYS if key not in config]:
            raise BaseError(f"{path}: no SDXL: its config has no {', '.join(missing)}")
        addition, channels = config.get("addition_embed_type"), config.get("in_channels")
        if addition != "text_time":
            raise BaseError(
                f"{path}: no SDXL: its addition_embed_type is {addition} (SDXL: text_time) and "
                f"its cross_attention_dim {config.get('cross_attention_dim')} (SDXL: 2048)"
            )
        check_channels(path, channels)
        if channels != config.get("out_channels"):
            raise BaseError(f"{path}: takes {channels} channels and gives another number")
    return path, config


def config_at(path: Path, component: str) -> dict[str, Any]:
    """The config of a model in its folder, or in a single file."""
    return read_config(path, component) if path.is_dir() else SingleFile(path).config(component)


def vae_config(source: str) -> tuple[Path, dict[str, Any]]:
    """As ``model_config``, of the VAE of a base, or of a VAE alone: its folder, or its file.

    Raises:
        BaseError: there is no VAE of SDXL's kind.
    """
    path = base_path(source)
    if not (path / "config.json").is_file():
        return model_config(source, "vae")
    config = read_config(path, "vae")
    if config.get("_class_name") != CLASSES["vae"]:
        raise BaseError(f"{path}: no SDXL VAE: a {config.get('_class_name')}")
    return path, config


def scheduler_config(base: str) -> dict[str, Any]:
    """The base's noise schedule, and what its UNet predicts; SDXL's own where a folder has none."""
    path = base_path(base)
    if is_file(base):
        return SingleFile(path).scheduler_config()
    is_local = path.exists()
    folder = path if is_local else fetch_component(base, "scheduler")
    is_base = (folder / "unet").is_dir() or not is_local  # of a hub id only this part is fetched
    if is_base and not (folder / "scheduler").exists():
        warnings.warn(
            f"{base}: has no scheduler/: SDXL's own is used, which predicts epsilon",
            stacklevel=2,
        )
        return sdxl_config("scheduler")
    return read_config(component_path(base, "scheduler"), "scheduler")


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
        return bool(read_json_object(index).get("force_zeros_for_empty_prompt", True))
    except ValueError as error:
        raise BaseError(f"{error}; it should be a pipeline's") from None


@dataclass(frozen=True)
class Weights:
    """The safetensors files of one model, and the ``variant`` that names them."""

    variant: str | None
    files: tuple[Path, ...]


def find_weights(folder: Path) -> Weights:
    """The files that loading takes: the plain ones, else the fp16 ones, else those of the only
    other variant there is (``diffusion_pytorch_model.non_ema.safetensors``); never a pickle.

    Raises:
        BaseError: there are none, or several variants and no plain one.
    """
    if not folder.is_dir():
        raise BaseError(f"{folder}: no such folder")
    variants: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _WEIGHTS_NAME.fullmatch(path.name):
            variants.setdefault(match["whole"] or match["pieces"] or "", path)
    if not variants:
        raise BaseError(f"{folder}: {_instead_of_weights(folder)}")
    known = [variant for variant in ("", "fp16") if variant in variants]
    if not known and len(variants) > 1:
        names = _listing([path.name for path in variants.values()])
        raise BaseError(f"{folder}: several variants of its weights and no plain one: {names}")
    variant = known[0] if known else next(iter(variants))
    path = variants[variant]
    files = (path,) if path.suffix == ".safetensors" else _pieces(path)
    return Weights(variant or None, files)


def _pieces(listing: Path) -> tuple[Path, ...]:
    """The files that an index names."""
    try:
        names = read_json_object(listing)["weight_map"].values()
        pieces = sorted(set(names))
        if not pieces or not all(_PIECE.fullmatch(name) for name in pieces):
            raise ValueError(f"{listing}: its weight_map names no .safetensors files beside it")
    except (KeyError, AttributeError, TypeError):
        raise BaseError(f"{listing}: has no weight_map from tensors to files") from None
    except ValueError as error:
        raise BaseError(str(error)) from None
    if missing := [name for name in pieces if not (listing.parent / name).is_file()]:
        raise BaseError(f"{listing.parent}: {missing[0]} is missing, which {listing.name} names")
    return tuple(listing.parent / name for name in pieces)


def _instead_of_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith((*PICKLES, ".msgpack", ".h5"))]:
        return f"only {pickles[0]}, a pickle: never loaded; convert it to safetensors"
    others = [name for name in names if name.endswith(".safetensors")]
    if any(re.search(r"-\d+-of-\d+\.", name) for name in others):
        return f"{others[0]} is a piece, and the .safetensors.index.json that lists them is missing"
    if others:
        return f"no weights under a name that diffusers knows (found: {_listing(others[:8])})"
    return "no .safetensors file"
