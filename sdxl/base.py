"""Opens a base model once: finds its parts and checks that they are SDXL's. Imports no torch."""

import re
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.path_kinds import BASE, CACHE, IMAGES, RUN, check_kind, missing
from runtime.safe_parsing import read_bounded, read_json_object
from sdxl import BaseError
from sdxl.checks import check_channels, check_config
from sdxl.hub import Snapshot, is_hub_id
from sdxl.single_file import CLASSES, PICKLES, SingleFile, sdxl_config
from sdxl.tokenizers import SharedTokenizers, TokenizerFiles, tokenizer_override

MINIATURE = "miniature"  # names the base that comes with the checkout
MINIATURE_FOLDER = Path(__file__).parents[1] / "assets" / "miniature-sdxl"
BASE_HELP = (
    "SDXL base: a diffusers folder, one .safetensors file, a hub id (OWNER/NAME, or "
    "OWNER/NAME@REVISION), or miniature."
)
TOKENIZERS_HELP = (
    "Folder with tokenizer/ and tokenizer_2/, or with one CLIP tokenizer; default: the base's, and "
    "for a single file SDXL's from the hub's local cache, or the hub."
)
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
MAX_README_BYTES = 1_000_000
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


def base_path(name_or_path: str) -> Path:
    """The path of a base on this machine; for a hub id nothing exists at it."""
    return MINIATURE_FOLDER if name_or_path == MINIATURE else Path(name_or_path)


def check_base(name_or_path: str) -> None:
    """Refuse, before anything is loaded, what is no base by its name or kind.

    Raises:
        ValueError: says what it is, or which name is near.
    """
    path = base_path(name_or_path)
    if path.exists():
        remedies = {
            RUN: "give it as --lora or --unet, and as --base what it was trained from",
            CACHE: "give as --base the SDXL model that it was encoded with",
            IMAGES: "give as --base an SDXL model: a folder, a file, a hub id, or miniature",
        }
        check_kind(path, BASE, remedies)
    elif name_or_path and (_is_file_name(path) or not is_hub_id(name_or_path)):
        raise BaseError(missing(path, also=(MINIATURE,)))


def open_base(
    name_or_path: str | Path, *, vae: str | None = None, tokenizers: Path | None = None
) -> "Base":
    """Open a base: a diffusers folder, one file, a hub id, or ``miniature``.

    ``vae`` replaces the base's VAE: a VAE's folder or file, or a base that has one. ``tokenizers``
    replaces its tokenizers. The commit of a hub id is fixed here, and a component is downloaded
    when it is first needed.

    Raises:
        BaseError: there is no such base, its file cannot be read, or it is of something else.
    """
    name_or_path = str(name_or_path)
    if not name_or_path:
        raise BaseError("--base: empty; give a diffusers folder, a file, a hub id, or miniature")
    path = base_path(name_or_path)
    options: dict[str, Any] = {"other_vae": vae, "tokenizers_folder": tokenizers}
    if path.is_file() or (_is_file_name(path) and not path.is_dir()):
        return Base(name_or_path, file=SingleFile(path), **options)
    if path.exists():
        return Base(name_or_path, folder=path, **options)
    return Base(name_or_path, snapshot=Snapshot(name_or_path), **options)


def _is_file_name(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", *PICKLES)


@dataclass(eq=False)
class ModelSource:
    """The files of one of SDXL's models: a base's, or one alone, such as the UNet that
    ``train --full`` saved."""

    component: str  # such as "unet"
    path: Path  # its folder, or the single file that holds it
    file: SingleFile | None = None  # where ``path`` is one

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.

        Raises:
            BaseError: it is missing, or not of SDXL's architecture; says what was found.
        """
        if self.file is not None:
            config = self.file.config(self.component)
        else:
            config = read_config(self.path, self.component)
            stated = config.get("_class_name") or config.get("architectures") or "nothing"
            class_name = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
            expected = CLASSES[self.component]
            if class_name != expected:  # a single file shows it by its tensors' names
                raise BaseError(f"{self.path}: no SDXL: a {class_name}, where SDXL has {expected}")
        if self.component == "unet":
            _check_unet(self.path, config)
        return config


@dataclass(eq=False)
class Base:
    """A base model, opened by ``open_base``; one of ``folder``, ``file`` and ``snapshot`` is set. A
    missing component is an error when it is needed, and not before."""

    name_or_path: str  # the user's name for it; messages begin with it
    folder: Path | None = None
    file: SingleFile | None = None
    snapshot: Snapshot | None = None
    other_vae: str | None = None
    tokenizers_folder: Path | None = None
    _models: dict[str, ModelSource] = field(default_factory=dict, init=False, repr=False)

    def __str__(self) -> str:
        return self.name_or_path

    @property
    def name(self) -> str:
        """Its folder's or file's name, or its hub id; never its path."""
        if self.snapshot is not None:
            return self.snapshot.repo
        path = base_path(self.name_or_path).resolve()
        return path.name if self.file is None else path.stem

    @property
    def pinned(self) -> str:
        """The name by which another process opens the same base: a hub id with its commit."""
        return self.name_or_path if self.snapshot is None else self.snapshot.pinned

    @property
    def unet(self) -> ModelSource:
        return self.model("unet")

    @property
    def vae(self) -> ModelSource:
        """Its VAE, or the one that was given in its place."""
        return self.model("vae")

    @property
    def text_encoder(self) -> ModelSource:
        return self.model("text_encoder")

    @property
    def text_encoder_2(self) -> ModelSource:
        return self.model("text_encoder_2")

    def model(self, component: str) -> ModelSource:
        """One of its models by name.

        Raises:
            BaseError: it has none; says what was found.
        """
        if component not in self._models:
            if component == "vae" and self.other_vae is not None:
                source = open_vae(self.other_vae)
            elif self.file is not None:
                self.file.config(component)  # or it has none
                source = ModelSource(component, self.file.path, self.file)
            else:
                source = ModelSource(component, self._component_folder(component))
            self._models[component] = source
        return self._models[component]

    def _component_folder(self, component: str) -> Path:
        if self.snapshot is not None:
            folder = self.snapshot.fetch(component)
        else:
            assert self.folder is not None
            folder = self.folder / component
        if not folder.is_dir():
            parent = folder.parent
            names = sorted(path.name for path in parent.iterdir())[:12] if parent.is_dir() else []
            raise BaseError(
                f"{self}: no SDXL base: it has no {component}/ (found: {_listing(names)})"
            )
        return folder

    def tokenizer(self, name: str) -> TokenizerFiles:
        """The files of ``tokenizer`` or ``tokenizer_2``: the ones given for it, or its own; SDXL's
        for a single file, which has none.

        Raises:
            BaseError: they cannot be found.
        """
        if self.tokenizers_folder is not None:
            return tokenizer_override(base_path(str(self.tokenizers_folder)), name)
        if self.file is not None:
            return self._shared_tokenizers.find(name)
        return TokenizerFiles(self._component_folder(name))

    @cached_property
    def _shared_tokenizers(self) -> SharedTokenizers:
        return SharedTokenizers(self.name_or_path)

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """Its noise schedule and prediction type; SDXL's own if a folder has none."""
        if self.file is not None:
            return self.file.scheduler_config()
        if self.snapshot is not None:
            folder = self.snapshot.fetch("scheduler")
            is_missing = not folder.exists()
        else:
            assert self.folder is not None
            folder = self.folder / "scheduler"
            is_missing = not folder.exists() and (self.folder / "unet").is_dir()
        if is_missing:
            warnings.warn(
                f"{self}: has no scheduler/: SDXL's own is used, which predicts epsilon",
                stacklevel=2,
            )
            return sdxl_config("scheduler")
        return read_config(self._component_folder("scheduler"), "scheduler")

    @cached_property
    def zeros_for_empty_prompt(self) -> bool:
        """``force_zeros_for_empty_prompt`` of its pipeline; SDXL's is true.

        Raises:
            BaseError: its ``model_index.json`` cannot be read.
        """
        index = None
        if self.file is None:
            index = self._component_folder("text_encoder").parent / "model_index.json"
        if index is None or not index.is_file():
            return True
        try:
            return bool(read_json_object(index).get("force_zeros_for_empty_prompt", True))
        except ValueError as error:
            raise BaseError(f"{error}; it should be a pipeline's") from None

    @cached_property
    def license(self) -> str | None:
        """The license stated in its model card, or in a file's metadata."""
        if self.file is not None:
            return self.file.metadata.get("modelspec.license") or None
        if self.snapshot is not None:
            card = self.snapshot.find_file("README.md")
        else:
            assert self.folder is not None
            card = self.folder / "README.md"
        try:
            text = "" if card is None else read_bounded(card, MAX_README_BYTES).decode()
        except (ValueError, OSError):  # no license is stated
            return None
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        fields = r"^(license(?:_name)?):[ \t]*(\S.*?)\s*$"
        stated = dict(re.findall(fields, front[1] if front else "", re.MULTILINE))
        own_name = stated.get("license_name") if stated.get("license") == "other" else None
        return own_name or stated.get("license")


def open_vae(name_or_path: str) -> ModelSource:
    """Open a VAE: its own folder or file, or the one of a base.

    Raises:
        BaseError: there is no VAE of SDXL's kind.
    """
    path = base_path(name_or_path)
    is_alone = (path / "config.json").is_file()
    return ModelSource("vae", path) if is_alone else open_base(name_or_path).vae


def _check_unet(path: Path, config: dict[str, Any]) -> None:
    """Refuse a UNet whose inputs are not SDXL's."""
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


def _listing(names: list[str]) -> str:
    return ", ".join(names) or "nothing"


@dataclass(frozen=True)
class Weights:
    """The safetensors files of one model, and the ``variant`` that names them."""

    variant: str | None
    files: tuple[Path, ...]


def find_weights(folder: Path) -> Weights:
    """The files to load: the plain ones, else the fp16 ones, else those of the only other variant
    (``diffusion_pytorch_model.non_ema.safetensors``); never a pickle.

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
    preferred = [variant for variant in ("", "fp16") if variant in variants]
    if not preferred and len(variants) > 1:
        names = _listing([path.name for path in variants.values()])
        raise BaseError(f"{folder}: several variants of its weights and no plain one: {names}")
    variant = preferred[0] if preferred else next(iter(variants))
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
