"""LoRA files, whoever wrote them, read into one form.

Known are the names of diffusers (of peft's layers and the older ones, with the adapter's settings
or without), of peft's own folders, and of kohya's scripts and what follows them. What cannot be
read rightly is refused by its name: LoHa, LoKr, full differences, other architectures.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from sdxl.adapted import Adapted
from sdxl.card import Card, read_card

LORA = "pytorch_lora_weights.safetensors"  # the name load_lora_weights looks for in a folder
KOHYA = "kohya_lora_weights.safetensors"  # beside it, for the UIs
PEFT = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base
OURS = "shardtune."  # in that metadata; diffusers looks at a part's own prefix alone
UNET = "unet"
PREFIXES = {  # of a tensor's name, longest first where one begins another
    "lora_unet_": UNET,
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "base_model.model.": UNET,
    "model.diffusion_model.": UNET,
    "diffusion_model.": UNET,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "unet.": UNET,
}
_TENSORS = {
    "down": r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.\w+)?\.weight",
    "up": r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)(\.\w+)?\.weight",
    "magnitude": r"\.lora_magnitude_vector(\.\w+)?(\.weight)?",
    "dora_scale": r"\.dora_scale",
    "alpha": r"\.alpha",
}
_OLD = (  # diffusers before peft kept attention's in its processors
    (r"\.processor\.to_out_lora\.", r".to_out.0.lora."),
    (r"\.processor\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.self_attn\.to_out_lora\.", r".self_attn.out_proj.lora."),
    (r"\.self_attn\.to_([qkv])_lora\.", r".self_attn.\1_proj.lora."),
)
_KINDS = {
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.(oft_|boft)": "an OFT",
    r"\.on_input": "an IA3",
    r"\.lora_mid\.": "a LoCon in Tucker form",
    r"\.(diff|diff_b)$": "full differences of weights",
}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The parts of a LoRA file, each by its modules' names as they stand there."""

    path: Path
    kind: str  # kohya, peft or diffusers
    parts: dict[str, dict[str, Adapted]]
    metadata: dict[str, str]

    @property
    def num_text(self) -> int:
        """Modules of the text encoders that it adapts."""
        return sum(len(part) for name, part in self.parts.items() if name != UNET)

    @property
    def card(self) -> Card:
        """What its maker, if it was this project, says of it."""
        return lora_card(self.metadata)


def lora_card(metadata: dict[str, str]) -> Card:
    """What the metadata of a LoRA file says of it, if this project wrote it."""
    settings = _settings(metadata)
    ours = {n.removeprefix(OURS): v for n, v in settings.items() if n.startswith(OURS)}
    return Card.of(ours) if ours else read_card(metadata)


def long_name(name: str) -> str:
    """A text encoder's module with the level of names that transformers 5.6 dropped and files of
    LoRAs keep."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def find_lora(path: Path) -> Path:
    """The LoRA file that ``path`` is, or that lies in this run, checkpoint or peft folder.

    Raises:
        ValueError: there is none.
    """
    for name in (LORA, PEFT) if path.is_dir() else ():
        if (path / name).is_file():
            return path / name
    file = path / LORA if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such LoRA file")
    return file


def open_lora(path: Path) -> Any:
    """A LoRA file's header.

    Raises:
        ValueError: no safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no LoRA file in safetensors format ({error})") from None


def read_lora_file(path: Path) -> LoraFile:
    """All that a LoRA file or folder holds, on the CPU, in the file's dtype.

    Raises:
        ValueError: no LoRA file, or none of a kind that can be read.
    """
    path = find_lora(path)
    with open_lora(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise ValueError(f"{path}: holds no LoRA weights: it has no tensor at all")
    settings, kind = _settings(metadata), _kind(tensors)
    if kind == "peft":
        settings = {f"{UNET}.{n}": v for n, v in _peft_settings(path).items()}
    return LoraFile(path, kind, lora_parts(path, tensors, settings), metadata)


def lora_parts(
    path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, dict[str, Adapted]]:
    """The tensors of a LoRA by part and module. ``settings`` are peft's, by ``part.name``."""
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        part, module, what = _parse(path, name)
        found[part][module][what] = tensor
    return {
        part: {m: _adapted(path, m, one, _of(settings, part)) for m, one in modules.items()}
        for part, modules in found.items()
    }


def _kind(names: Mapping[str, Any]) -> str:
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    return "kohya" if any(".lora_down." in name for name in names) else "diffusers"


def _parse(path: Path, name: str) -> tuple[str, str, str]:
    """(part of the model, module, which of its tensors)."""
    short = name
    for old, new in _OLD:
        short = re.sub(old, new, short)
    for what, pattern in _TENSORS.items():
        if match := re.search(f"{pattern}$", short):
            module = short[: match.start()]
            prefix = next((one for one in PREFIXES if module.startswith(one)), "")
            module = module.removeprefix(prefix)
            if prefix == "base_model.model.":
                module = module.removeprefix("unet.")
            return PREFIXES.get(prefix, UNET), module, what
    for pattern, kind in _KINDS.items():
        if re.search(pattern, name):
            raise ValueError(f"{path}: {kind} ({name}); LoRA, rsLoRA, LoCon and DoRA can be read")
    if not re.search("lora", name):
        raise ValueError(f"{path}: holds no LoRA weights (e.g. {name})")
    raise ValueError(f"{path}: {name} is nothing of a LoRA that can be read")


def _settings(metadata: dict[str, str]) -> dict[str, Any]:
    """What diffusers keeps of peft's settings: by ``part.name``; empty in others' files."""
    try:
        return dict(json.loads(metadata.get(METADATA_KEY, "{}")))
    except (ValueError, TypeError):
        return {}


def _of(settings: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """One part's settings; of a file of one part alone they have no prefix."""
    mine = {n.removeprefix(f"{part}."): v for n, v in settings.items() if n.startswith(f"{part}.")}
    return mine or (settings if part == UNET and "lora_alpha" in settings else {})


def _peft_settings(path: Path) -> dict[str, Any]:
    config = path.with_name(PEFT_CONFIG)
    try:
        settings = dict(json.loads(config.read_bytes()))
        if settings.get("peft_type") != "LORA":
            raise ValueError(f"{config}: a {settings.get('peft_type')}, and no LoRA")
        return settings
    except OSError:
        raise ValueError(
            f"{config}: missing, and with it the strength of {path.name}; peft writes both"
        ) from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{config}: not valid JSON ({error})") from None


def _adapted(
    path: Path, module: str, tensors: dict[str, torch.Tensor], settings: Mapping[str, Any]
) -> Adapted:
    if not {"down", "up"} <= tensors.keys():
        missing = "up" if "down" in tensors else "down"
        raise ValueError(f"{path}: damaged or no LoRA: {module} has no {missing} weight")
    down, up = tensors["down"], tensors["up"]
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and up.shape[1] == len(down) > 0
    if not fits:
        raise ValueError(
            f"{path}: damaged: {module} has weights of {list(down.shape)} and {list(up.shape)}"
        )
    alpha = _alpha(path, module, tensors, settings)
    magnitude = tensors.get("magnitude", tensors.get("dora_scale"))
    if magnitude is not None:
        if magnitude.numel() != len(up) or len(tensors.get("dora_scale", up)) != len(up):
            raise ValueError(
                f"{path}: a DoRA whose {module} is normed over its input; only those normed over "
                "their output can be read"
            )
        magnitude = magnitude.flatten()
    return Adapted(down, up, alpha, bool(settings.get("use_rslora")), magnitude)


def _alpha(
    path: Path, module: str, tensors: dict[str, torch.Tensor], settings: Mapping[str, Any]
) -> float:
    """A module's own, or what the settings say; rank where nothing is said, as kohya's and
    diffusers' readers take it too."""
    try:
        if "alpha" in tensors:
            return float(tensors["alpha"])
        patterns = dict(settings.get("alpha_pattern") or {})
        default = settings.get("lora_alpha", len(tensors["down"]))
        return float(patterns.get(get_pattern_key(patterns, module), default))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{path}: damaged: the alpha of {module} is no number") from None
