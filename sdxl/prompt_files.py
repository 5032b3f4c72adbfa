"""Prompts, with kohya's options: ``a cat --n blurry --w 768 --d 7``, or the same as a table.

``generate`` and the previews of ``encode`` and ``prompts`` read the same files: ``.txt`` (one a
line), ``.jsonl``, ``.json`` and ``.toml`` (tables, or lines as strings). Free of torch, so that a
command can refuse a bad file before it loads any model.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.messages import first_line
from runtime.safe_parsing import parse_json, parse_toml, read_bounded

# "--" opens an option only at a line's start or after a space, and only when a name follows at
# once: "rain -- then sun" and "a --- b" are prose.
OPTION_START = re.compile(r"(?:^|\s)--(?=[^\s-])")
LINE_END = re.compile(r"\r\n|\r|\n")
WHOLE_NUMBER = re.compile(r"[0-9]{1,20}")  # int() alone would also take "1_0", "+1" and "٣"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
DECIMAL = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")  # likewise float(): "nan", "inf"
MAX_SEED = 2**64 - 1  # the largest torch.Generator.manual_seed takes
MAX_SIDE = 16_384  # pixels of an image
MAX_PIXELS = 999_999_999  # of a size or crop that conditions SDXL, such as --original-size
MAX_IMAGES = 999_999  # of one line
MAX_FILE_BYTES = 64_000_000
MAX_TOML_BYTES = 4_000_000  # the parser takes seconds for each of them
MAX_PROMPTS = 1_000_000  # of one file
MAX_TEXT = 100_000  # characters of a prompt: the encoders take 75 tokens, or at most 32 times that
MAX_STEPS = 999  # of 1000 that a UNet is trained on; with 1000 some samplers go beyond the last
SAMPLERS = ("euler", "euler-a", "ddim", "ddpm", "dpm++2m")
OPTIONS = {
    "n": "negative",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "num_steps",
    "l": "guidance_scale",
    "ss": "sampler",
    "n-images": "num_images",
    "ow": "original_width",
    "oh": "original_height",
    "cl": "crop_left",
    "ct": "crop_top",
}  # of a line, and what a table calls them
KOHYA_NAMES = {
    "prompt": "text",
    "negative_prompt": "negative",
    "sample_steps": "num_steps",
    "scale": "guidance_scale",
    "sample_sampler": "sampler",
}  # in tables, besides those
KOHYA_SAMPLERS = {"euler_a": "euler-a", "k_euler": "euler", "k_euler_a": "euler-a"}
KOHYA_SAMPLERS |= {"dpmsolver++": "dpm++2m"}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with its settings; None leaves a setting to the caller's defaults.

    Sizes and crops are in pixels. ``original_*`` and ``crop_*`` are SDXL's conditioning on the
    image's past: its size before it was resized, and where it was cut.
    """

    text: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    num_images: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None


def parse_prompt(line: str) -> Prompt:
    """Read one line; ``ValueError`` names the option, what was found and what is allowed."""
    text, *parts = OPTION_START.split(line.strip())
    values: dict[str, Any] = {}
    for part in parts:
        name, *rest = part.split(maxsplit=1)
        if name not in OPTIONS:
            options = " ".join(f"--{option}" for option in OPTIONS)
            raise ValueError(f"unknown option --{name[:60]} (known: {options})")
        if OPTIONS[name] in values:
            raise ValueError(f"option --{name} is given more than once")
        if not rest:
            raise ValueError(f"option --{name} has no value")
        values[OPTIONS[name]] = _value(OPTIONS[name], f"--{name}", rest[0].strip())
    return _prompt(text, values)


def prompt_of_table(table: dict[str, Any]) -> Prompt:
    """Read one table of a ``.json`` or ``.toml`` file; ``ValueError`` as of ``parse_prompt``."""
    values: dict[str, Any] = {}
    for name, value in table.items():
        field = KOHYA_NAMES.get(name, name)
        if field not in _READERS:
            raise ValueError(f"unknown option {name[:60]} (known: {', '.join(_READERS)})")
        if field in values:
            raise ValueError(f"option {name} is given more than once")
        is_text = isinstance(value, str)
        if not is_text and (_READERS[field] is str or type(value) not in (int, float)):
            raise ValueError(f"option {name} must be text or a number, not {_shown(value)}")
        values[field] = _value(field, name, value if is_text else _digits(value))
    return _prompt(values.pop("text", ""), values)


def _prompt(text: str, values: dict[str, Any]) -> Prompt:
    if not text.strip():
        raise ValueError("the prompt is empty: text must come before the options")
    for part in (text, str(values.get("negative", ""))):
        if len(part) > MAX_TEXT:
            raise ValueError(f"a text of {len(part):,} characters, too long: at most {MAX_TEXT:,}")
        if LONE_SURROGATE.search(part):  # no tokenizer reads it
            raise ValueError(f"{part[:60]!r} holds half a character, which is no Unicode text")
        if "\0" in part:
            raise ValueError(f"{part[:60]!r} contains a NUL character; save the file as UTF-8")
    if ("original_width" in values) != ("original_height" in values):
        raise ValueError("options --ow and --oh, the original size, go together")
    return Prompt(text=text.strip(), **values)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file; of a ``.txt`` blank lines and ``#`` lines are skipped.

    Raises ``ValueError`` with one line that names the file, and the line or prompt at fault.
    """
    readers = {"": _lines, ".txt": _lines, ".jsonl": _json_lines, ".json": _json, ".toml": _toml}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a prompt file is a .txt, .jsonl, .json or .toml")
    prompts = []
    for where, entry in readers[path.suffix.lower()](path, _read_text(path)):
        try:
            if not isinstance(entry, str | dict):
                raise ValueError(f"a prompt is text or a table, not {_shown(entry)}")
            prompts.append(
                parse_prompt(entry) if isinstance(entry, str) else prompt_of_table(entry)
            )
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from error
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"{path}: has more than {MAX_PROMPTS:,} prompts; split the file")
    if not prompts:
        raise ValueError(f"{path}: no prompts found (one a line; blank and # lines are skipped)")
    return prompts


def _read_text(path: Path) -> str:
    is_toml = path.suffix.lower() == ".toml"
    try:
        content = read_bounded(path, MAX_TOML_BYTES if is_toml else MAX_FILE_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return content.decode("utf-8-sig")  # -sig: Windows editors put a byte order mark first
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(LINE_END.split(text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number}", line


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path, text):
        yield where, _from_json(f"{path}, {where}", line)


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    entries = _from_json(str(path), text)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be a list of prompts, [...], each text or a table")
    return ((f"prompt {number}", entry) for number, entry in enumerate(entries, start=1))


def _toml(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """``[[prompt]]`` tables; or, as kohya has it, ``[[prompt.subset]]`` over ``[prompt]``."""
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    prompts = table.pop("prompt", None)
    if isinstance(prompts, dict) and isinstance(prompts.get("subset", []), list):
        subsets = prompts.pop("subset", [{}])
        prompts = [
            {**prompts, **subset} if isinstance(subset, dict) else subset for subset in subsets
        ]
    if not isinstance(prompts, list) or table:
        raise ValueError(f"{path}: must have [[prompt]] tables, and nothing else beside them")
    return ((f"prompt {number}", prompt) for number, prompt in enumerate(prompts, start=1))


def _from_json(where: str, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise _GivenTwice(f"{where}: option {name[:60]} is given more than once")
            table[name] = value
        return table

    try:
        return parse_json(text, once)
    except _GivenTwice as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({first_line(error)})") from None


class _GivenTwice(ValueError):
    """Valid JSON with a name twice in one object."""


def _shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a table"
    text = repr(value) if isinstance(value, str) else _digits(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _digits(value: Any) -> str:
    """A number as text; Python refuses to convert integers of more than some thousand digits."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    return str(value)


def _value(field: str, name: str, text: str) -> Any:
    """The value of a field from its text; the readers' errors say what is allowed."""
    try:
        return _READERS[field](text)
    except ValueError as allowed:
        raise ValueError(f"option {name} must be {allowed}, not {_shown(text)}") from None


def _whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if WHOLE_NUMBER.fullmatch(text) else -1
        if number < minimum or (maximum is not None and number > maximum):
            limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"a whole number {limits}")
        return number

    return read


def _side(text: str) -> int:
    """A width or height in pixels; 8, because one latent covers 8x8 of them."""
    number = int(text) if WHOLE_NUMBER.fullmatch(text) else 0
    if not 8 <= number <= MAX_SIDE or number % 8:
        raise ValueError(f"a positive multiple of 8 up to {MAX_SIDE}")
    return number


def _guidance_scale(text: str) -> float:
    if not DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError("a number of at least 0, such as 7.5")
    return float(text)


def _sampler(text: str) -> str:
    name = KOHYA_SAMPLERS.get(text, text)
    if name not in SAMPLERS:
        raise ValueError(f"one of {', '.join(SAMPLERS)}")
    return name


_READERS: dict[str, Callable[[str], Any]] = {
    "text": str,
    "negative": str,
    "width": _side,
    "height": _side,
    "seed": _whole_number(0, MAX_SEED),
    "num_steps": _whole_number(1, MAX_STEPS),
    "guidance_scale": _guidance_scale,
    "sampler": _sampler,
    "num_images": _whole_number(1, MAX_IMAGES),
    "original_width": _whole_number(1, MAX_PIXELS),
    "original_height": _whole_number(1, MAX_PIXELS),
    "crop_left": _whole_number(0, MAX_PIXELS),
    "crop_top": _whole_number(0, MAX_PIXELS),
}
