"""Reads LoRA files of any tool into one form.

Known are the names of diffusers (of peft's layers and the older ones, with the adapter's settings
or without), of peft's own folders, of kohya's scripts and LyCORIS and of what follows them
(OneTrainer, SimpleTuner, ComfyUI). A module is an adapter that peft can hold (``LoraWeights``), or
a ``Delta`` that can only be merged into the weights. What cannot be read is refused by its name.
"""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError, safe_open

from sdxl.lora.names import (
    EXTRAS,
    LORA,
    METADATA_KEY,
    NUMBERS,
    OLD_NAMES,
    PEFT,
    PEFT_CONFIG,
    PREFIXES,
    SHARDTUNE_PREFIX,
    TENSORS,
    UNET,
    UNSUPPORTED,
)
from sdxl.lora.weights import NAMES, Algorithm, Delta, LoraWeights, find_algorithm
from sdxl.metadata import ModelMetadata, read_model_metadata, weights_folder
from sdxl.tensor_files import check_digest

MAX_LETTERS = 300  # of a tensor's name
PATTERN_SECONDS = 1.0
# GLoRA's tensors: their names end in ``.weight``.
_GLORA_FACTORS = frozenset({"a1", "a2", "b1", "b2", "bm"})
# Tensors whose names in a file are these.
_PLAIN_NAMES = NAMES - _GLORA_FACTORS - TENSORS.keys() - {"weight", "boft_blocks"}
_SUPPORTED = "LoRA, rsLoRA, LoCon, DoRA and LyCORIS can be read"


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The parts of a LoRA file, each by the names of its modules in the file."""

    path: Path
    kind: str  # kohya, peft or diffusers
    parts: dict[str, dict[str, LoraWeights | Delta]]
    metadata: dict[str, str]

    @property
    def num_text_modules(self) -> int:
        """The number of modules of the text encoders that it changes."""
        return sum(len(part) for name, part in self.parts.items() if name != UNET)

    @property
    def model_metadata(self) -> ModelMetadata:
        """The metadata that shardtune wrote; empty in other tools' files."""
        return lora_metadata(self.metadata)

    @property
    def merged_parts(self) -> frozenset[str]:
        """The parts that peft's adapters cannot hold: their difference is merged into the base."""
        return frozenset(name for name, part in self.parts.items() if _merge_reasons(part))

    def check_adapter(self, *parts: str) -> None:
        """Check that peft's adapters can hold these parts, or all parts.

        Raises:
            ValueError: one of them can only be merged.
        """
        several = [self.parts.get(part, {}) for part in parts or self.parts]
        if reasons := {why for part in several for why in _merge_reasons(part)}:
            raise ValueError(
                f"{self.path}: holds {', '.join(sorted(reasons))}, which can be neither trained on "
                "nor converted: `export --merge` puts it into a base, `generate --lora` uses it"
            )


def _merge_reasons(part: Mapping[str, LoraWeights | Delta]) -> set[str]:
    """The features of a part that peft's adapters cannot have; empty if there are none."""
    kinds = {adapter.title for adapter in part.values() if isinstance(adapter, Delta)}
    adapters = [adapter for adapter in part.values() if isinstance(adapter, LoraWeights)]
    if len({adapter.magnitude is None for adapter in adapters}) > 1:
        kinds.add("DoRA on some modules only")
    return kinds


def lora_metadata(metadata: dict[str, str]) -> ModelMetadata:
    """The model metadata in a LoRA file's metadata, if shardtune wrote it; else an empty one."""
    settings = _read_settings(metadata)
    own = {
        n.removeprefix(SHARDTUNE_PREFIX): v
        for n, v in settings.items()
        if n.startswith(SHARDTUNE_PREFIX)
    }
    return ModelMetadata.of(own) if own else read_model_metadata(metadata)


def find_lora(path: Path, average: bool | None = None) -> Path:
    """The LoRA file ``path``, or the one in the run, checkpoint or peft folder ``path``; which
    of a checkpoint's two, ``weights_folder`` says.

    Raises:
        ValueError: there is no such file.
    """
    path = weights_folder(path, average)
    for name in (LORA, PEFT) if path.is_dir() else ():
        if (path / name).is_file():
            return path / name
    file = path / LORA if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such LoRA file")
    return file


def open_lora(path: Path) -> Any:
    """Open a LoRA file with safetensors.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no LoRA file in safetensors format ({error})") from None


def read_lora_file(path: Path) -> LoraFile:
    """Read a LoRA file or folder, on the CPU, in the file's dtype. Warns of bundled tensors that
    are not used.

    Raises:
        ValueError: no LoRA file, or none of a kind that can be read.
    """
    path = find_lora(path)
    check_digest(path)
    tensors, metadata = _tensors(path)
    extras = [name for name in tensors if is_extra(name)]
    if len(extras) == len(tensors):
        which = f"nothing but {extras[0]} and the like" if extras else "no tensor at all"
        raise ValueError(f"{path}: holds no LoRA weights: it has {which}")
    _warn_of_extras(path, extras)
    tensors = {name: tensor for name, tensor in tensors.items() if not is_extra(name)}
    settings, kind = _read_settings(metadata), _detect_format(tensors)
    if kind == "peft":
        settings = {f"{UNET}.{n}": v for n, v in _peft_settings(path).items()}
    return LoraFile(path, kind, _parts(path, tensors, settings), metadata)


def is_extra(name: str) -> bool:
    """Whether a tensor of a LoRA file belongs to something else that is bundled with it."""
    return name.startswith(tuple(EXTRAS))


def lora_parts(
    path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, dict[str, LoraWeights]]:
    """The tensors of an adapter by part and module. ``settings`` are peft's, by ``part.name``."""
    return {
        part: {
            name: adapter for name, adapter in modules.items() if isinstance(adapter, LoraWeights)
        }
        for part, modules in _parts(path, tensors, settings).items()
    }


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors and metadata. Names are checked first, since messages print them."""
    with open_lora(path) as file:
        metadata, names = dict(file.metadata() or {}), list(file.keys())
        for name in names:
            if not name.isprintable() or len(name) > MAX_LETTERS:
                raise ValueError(f"{path}: damaged: it has a tensor named {name[:100]!r}")
        try:
            return {name: file.get_tensor(name) for name in names}, metadata
        except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: a tensor cannot be read ({error})") from None


def _warn_of_extras(path: Path, extras: Iterable[str]) -> None:
    named = sorted(extras)
    for start, description in EXTRAS.items():
        if own := [name.removeprefix(start) for name in named if name.startswith(start)]:
            words = list(dict.fromkeys(name.split(".")[0] for name in own))
            listed = ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
            warnings.warn(
                f"{path}: its {description} ({start}*: {listed}) are not used", stacklevel=2
            )


def _parts(
    path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, dict[str, LoraWeights | Delta]]:
    grouped: dict[str, dict[str, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        part, module, role = _parse(path, name, tensors)
        if role in grouped[part][module]:
            raise ValueError(f"{path}: damaged: {module} has {role} twice")
        grouped[part][module][role] = tensor
    return {
        part: {
            m: _module(path, m, module_tensors, _settings_of(settings, part))
            for m, module_tensors in modules.items()
        }
        for part, modules in grouped.items()
    }


def _detect_format(names: Mapping[str, Any]) -> str:
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    return "kohya" if any(".lora_down." in name for name in names) else "diffusers"


def _parse(path: Path, name: str, names: Mapping[str, Any]) -> tuple[str, str, str]:
    """(part of the model, module, which of its tensors). ``names`` are all of the file."""
    short = name
    for old, new in OLD_NAMES:
        short = re.sub(old, new, short)
    module, role = _split_role(short, names)
    if role:
        prefix = next((start for start in PREFIXES if module.startswith(start)), "")
        module = module.removeprefix(prefix)
        if prefix == "base_model.model.":
            module = module.removeprefix("unet.")
        return PREFIXES.get(prefix, UNET), module, role
    for pattern, kind in UNSUPPORTED.items():
        if re.search(pattern, name):
            raise ValueError(f"{path}: {kind} ({name}); {_SUPPORTED}")
    if not any(_split_role(other, names)[1] for other in names):
        raise ValueError(f"{path}: holds no LoRA weights (e.g. {name})")
    raise ValueError(f"{path}: {name} is nothing of a LoRA that can be read")


def _split_role(name: str, names: Mapping[str, Any]) -> tuple[str, str]:
    """(module, which of its tensors); the latter is empty if it is no tensor of a LoRA."""
    for role, pattern in TENSORS.items():
        if match := re.search(f"{pattern}$", name):
            return name[: match.start()], role
    module, _, role = name.rpartition(".")
    if role == "weight":
        if f"{module}.on_input" in names:
            return module, role
        module, _, role = module.rpartition(".")
        return (module, role) if role in _GLORA_FACTORS else ("", "")
    return (module, role) if role in _PLAIN_NAMES else ("", "")


def _read_settings(metadata: dict[str, str]) -> dict[str, Any]:
    """peft's settings as diffusers keeps them, by ``part.name``; empty in other tools' files."""
    try:
        return dict(json.loads(metadata.get(METADATA_KEY, "{}")))
    except (ValueError, TypeError, RecursionError):
        return {}


def _settings_of(settings: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """One part's settings; in a file with one part alone they have no prefix."""
    own = {n.removeprefix(f"{part}."): v for n, v in settings.items() if n.startswith(f"{part}.")}
    return own or (settings if part == UNET and "lora_alpha" in settings else {})


def _peft_settings(path: Path) -> dict[str, Any]:
    config = path.with_name(PEFT_CONFIG)
    try:
        settings = dict(json.loads(config.read_bytes()))
    except OSError:
        raise ValueError(
            f"{config}: missing, and with it the strength of {path.name}; peft writes both"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{config}: not valid JSON ({error})") from None
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{config}: a {settings.get('peft_type')}, and no LoRA")
    return settings


def _module(
    path: Path, module: str, tensors: dict[str, torch.Tensor], settings: Mapping[str, Any]
) -> LoraWeights | Delta:
    if len(present := {"down", "up"} & tensors.keys()) == 1:
        missing = "up" if "down" in present else "down"
        raise ValueError(f"{path}: damaged or no LoRA: {module} has no {missing} weight")
    numbers = {n: _number(path, module, n, t) for n, t in tensors.items() if n in NUMBERS}
    factors = {name: t for name, t in tensors.items() if name not in NUMBERS}
    for name, tensor in factors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            kind = str(tensor.dtype).removeprefix("torch.")
            wrong = f"of type {kind}, not a float" if tensor.numel() else "empty"
            raise ValueError(f"{path}: damaged: {name} of {module} is {wrong}")
    if "magnitude" in factors:  # peft's, which may lie along the second axis
        factors["dora_scale"] = factors.pop("magnitude").flatten()
    if "oft_blocks" in factors and factors["oft_blocks"].ndim == 4:
        factors["boft_blocks"] = factors.pop("oft_blocks")
    algorithm = find_algorithm(frozenset(factors.keys() | numbers.keys()))
    if algorithm is None:
        every = ", ".join(sorted(tensors))
        raise ValueError(f"{path}: damaged, or of an unknown kind: {module} has {every}")
    if algorithm.title == "LoRA":
        return _lora(path, module, algorithm, factors, numbers, settings)
    if "oft_diag" in factors:
        _check_rotation(path, module, factors["oft_diag"])
    scalar, on_input = numbers.get("scalar", 1.0), bool(numbers.get("on_input"))
    return Delta(algorithm, factors, numbers.get("alpha"), scalar, on_input)


def _lora(
    path: Path,
    module: str,
    algorithm: Algorithm,
    tensors: dict[str, torch.Tensor],
    numbers: Mapping[str, float],
    settings: Mapping[str, Any],
) -> LoraWeights | Delta:
    """An adapter for peft; a ``Delta`` if it has a bias or is a DoRA normed over its input."""
    down, up, magnitude = tensors["down"], tensors["up"], tensors.get("dora_scale")
    if down.ndim != up.ndim or down.ndim not in (2, 4) or up.shape[1] != len(down):
        raise ValueError(
            f"{path}: damaged: {module} has weights of {list(down.shape)} and {list(up.shape)}"
        )
    if "scalar" in numbers:
        up = up * numbers["scalar"]
    alpha = numbers.get("alpha")
    if alpha is None:
        alpha = _stated_alpha(path, module, len(down), settings)
    adapter = LoraWeights(down, up, alpha, bool(settings.get("use_rslora")))
    if "diff_b" not in tensors:
        if magnitude is None:
            return adapter
        if magnitude.numel() == len(up) == len(magnitude):
            return replace(adapter, magnitude=magnitude.flatten())
    return Delta(algorithm, {**tensors, "up": up}, adapter.kohya_alpha)


def _number(path: Path, module: str, name: str, tensor: torch.Tensor) -> float:
    try:
        value = float(tensor)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: damaged: the {name} of {module} is no number")
    return value


def _stated_alpha(path: Path, module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha by the settings; without any it is the rank, as kohya's and diffusers' readers take
    it."""
    try:
        patterns = dict(settings.get("alpha_pattern") or {})
        default = settings.get("lora_alpha", rank)
        value = float(
            next(
                (v for pattern, v in patterns.items() if _pattern_matches(pattern, module)), default
            )
        )
    except (TypeError, ValueError, ArithmeticError, TimeoutError, RecursionError, regex.error):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: damaged: its settings hold no number as alpha of {module}")
    return value


def _pattern_matches(pattern: str, module: str) -> bool:
    """Whether a pattern of peft's settings matches this module: a regex for the name's end.

    Raises:
        TimeoutError: a forged pattern takes too long to match.
    """
    return bool(regex.match(rf"(.*\.)?({pattern})$", module, timeout=PATTERN_SECONDS))


def _check_rotation(path: Path, module: str, blocks: torch.Tensor) -> None:
    """Refuse an ``oft_diag`` that is no rotation R: early LyCORIS versions wrote other things."""
    if blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2]:
        product = blocks.float() @ blocks.float().transpose(1, 2)
        if torch.allclose(product, torch.eye(blocks.shape[1]).expand_as(product), atol=2e-2):
            return
    raise ValueError(
        f"{path}: an OFT of an early LyCORIS version ({module}.oft_diag); {_SUPPORTED}"
    )
