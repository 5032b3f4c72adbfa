"""Sample prompts of other trainers, as tables that ``generate`` and the previews read."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convert.tables import as_kind, shown
from runtime.safe_parsing import parse_json, parse_toml, read_bounded
from sdxl.prompt_files import KOHYA_NAMES, KOHYA_SAMPLERS, MAX_STEPS, SAMPLERS, prompt_of_table

MAX_FILE_BYTES = 4_000_000
MAX_PROMPTS = 10_000  # of one conversion: each is encoded, and previewed
# kohya's flags of a line; it takes them in any letter case, the first match wins, and passes over
# flags that it does not know.
_FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    r"w (\d+)": ("width", int),
    r"h (\d+)": ("height", int),
    r"d (\d+)": ("seed", int),
    r"s (\d+)": ("num_steps", int),
    r"l ([\d.]+)": ("guidance_scale", float),
    r"n (.+)": ("negative", str),
    r"ss (.+)": ("sampler", str),
}


def read_kohya_prompts(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The prompts of a ``sample_prompts`` file (.txt, .toml or .json), and what was left out.

    Raises:
        ValueError: names the file, and the line or prompt at fault.
        OSError: it cannot be read.
    """
    readers = {".txt": _lines, ".toml": _toml, ".json": _json}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: sample prompts are a .txt, .toml or .json file")
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file as UTF-8") from None
    prompts = list[dict[str, Any]]()
    left_out = dict[str, None]()
    for where, entry in readers[path.suffix.lower()](path, text):
        if len(prompts) >= MAX_PROMPTS:
            raise ValueError(f"{path}: more than {MAX_PROMPTS:,} prompts")
        try:
            table, dropped = _normalized(entry)
            check_prompt(table)
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
        prompts.append(table)
        left_out |= dict.fromkeys(dropped)
    if not prompts:
        raise ValueError(f"{path}: no prompts found")
    return prompts, [*left_out]


def check_prompt(table: dict[str, Any]) -> None:
    """Refuse a prompt that generate would refuse.

    Raises:
        ValueError: says what is wrong with it.
    """
    prompt_of_table(table)


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number}", line.strip()


def _of_line(line: str) -> dict[str, Any]:
    """As kohya splits it: at each " --"."""
    text, *parts = line.split(" --")
    table: dict[str, Any] = {"text": text}
    for part in parts:
        for pattern, (name, kind) in _FLAGS.items():
            if match := re.match(pattern, part, re.IGNORECASE | re.ASCII):
                if len(match[1]) > 30 and kind is not str:
                    raise ValueError(f"{shown(part)} is out of range")
                try:
                    table[name] = kind(match[1])
                except ValueError:
                    raise ValueError(f"{shown(part)} is no number") from None
                break
        else:
            table["--" + part.split(" ")[0][:20]] = part
    return table


def _toml(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """``[prompt]`` with what all have in common, and ``[[prompt.subset]]``."""
    try:
        prompt = parse_toml(text).get("prompt")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    subsets = prompt.pop("subset", None) if isinstance(prompt, dict) else None
    if not isinstance(subsets, list):
        raise ValueError(f"{path}: has no [prompt] with [[prompt.subset]]")
    assert isinstance(prompt, dict)
    for number, subset in enumerate(subsets, start=1):
        yield f"prompt {number}", {**prompt, **subset} if isinstance(subset, dict) else subset


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        entries = parse_json(text)
    except ValueError:
        raise ValueError(f"{path}: not valid JSON") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be a list of prompts")
    for number, entry in enumerate(entries, start=1):
        yield f"prompt {number}", entry


def _normalized(entry: Any) -> tuple[dict[str, Any], list[str]]:
    """A table of kohya's with our names and ranges, and which of its options were left out."""
    is_line = isinstance(entry, str)
    if isinstance(entry, str):
        entry = _of_line(entry)
    if not isinstance(entry, dict):
        raise ValueError(f"a prompt is text or a table, not {shown(entry)}")
    kinds = {"text": str, "negative": str, "width": int, "height": int, "seed": int}
    kinds |= {"num_steps": int, "guidance_scale": float, "sampler": str}
    table, dropped = dict[str, Any](), []
    for key, value in entry.items():
        name = KOHYA_NAMES.get(key, key)
        if name not in kinds or (key == "guidance_scale" and not is_line):
            dropped.append(key[:60])  # a table's guidance_scale is FLUX's, its scale is SDXL's
            continue
        if value is None:
            continue
        try:
            table[name] = as_kind(value, kinds[name])
        except ValueError as error:
            raise ValueError(f"{key[:60]}: {error}") from None
    dropped += fit_prompt(table)
    return table, dropped


def fit_prompt(table: dict[str, Any]) -> list[str]:
    """Change sizes, steps and sampler of a prompt to what ``generate`` takes; returns what of it
    was left out."""
    for side in ("width", "height"):
        if side in table:
            table[side] = max(64, table[side] - table[side] % 8)  # kohya rounds so too
    if "num_steps" in table:
        table["num_steps"] = max(1, min(MAX_STEPS, table["num_steps"]))
    if not table.get("negative", "x").strip():
        del table["negative"]
    if "sampler" in table:
        sampler = sampler_of(table["sampler"])
        if sampler is None:
            return [f"sampler {shown(table.pop('sampler'))}"]
        table["sampler"] = sampler
    return []


def sampler_of(name: str) -> str | None:
    """Our name of a sampler; None if we have none like it."""
    name = KOHYA_SAMPLERS.get(name, name)
    return name if name in SAMPLERS else None
