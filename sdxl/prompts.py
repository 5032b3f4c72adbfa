"""Prompt files: one prompt a line, with kohya's options (``a cat --n blurry --w 768 --d 7``).

``generate`` and the previews of ``encode`` and ``prompts`` read the same syntax. Free of torch, so
that a command can refuse a bad file before it loads any model.
"""

import re
from dataclasses import dataclass
from pathlib import Path

# "--" opens an option only at a line's start or after a space, and only when a name follows at
# once: "rain -- then sun" and "a --- b" are prose.
OPTION_START = re.compile(r"(?:^|\s)--(?=[^\s-])")
LINE_END = re.compile(r"\r\n|\r|\n")
WHOLE_NUMBER = re.compile(r"[0-9]{1,20}")  # int() alone would also take "1_0", "+1" and "٣"
DECIMAL = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")  # likewise float(): "nan", "inf"
KNOWN_OPTIONS = ("n", "w", "h", "d", "s", "l")
MAX_SEED = 2**64 - 1  # the largest torch.Generator.manual_seed takes


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One picture to draw; None leaves the choice to the caller's defaults.

    ``width`` and ``height`` are in pixels.
    """

    text: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None


def parse_prompt(line: str) -> Prompt:
    """Read one line; ``ValueError`` names the option, what was found and what is allowed."""
    text, *parts = OPTION_START.split(line.strip())
    text = text.strip()
    if not text:
        raise ValueError("the prompt is empty: text must come before the options")
    values = _option_values(parts)
    return Prompt(
        text=text,
        negative=values.get("n"),
        width=_side(values, "w"),
        height=_side(values, "h"),
        seed=_whole_number(values, "d", least=0, most=MAX_SEED),
        num_steps=_whole_number(values, "s", least=1),
        guidance_scale=_guidance_scale(values),
    )


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file, skipping blank lines and ``#`` lines.

    Raises ``ValueError`` with one line that names the file, and the line number where there is one.
    """
    prompts = []
    for number, line in enumerate(LINE_END.split(_read_text(path)), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            prompts.append(parse_prompt(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: no prompts found (one a line; blank and # lines are skipped)")
    return prompts


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return content.decode("utf-8-sig")  # -sig: Windows editors put a byte order mark first
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error


def _option_values(parts: list[str]) -> dict[str, str]:
    """Turn ``["w 768", "n blurry"]`` into ``{"w": "768", "n": "blurry"}``."""
    values: dict[str, str] = {}
    for part in parts:
        name, *rest = part.split(maxsplit=1)
        if name not in KNOWN_OPTIONS:
            known = " ".join(f"--{option}" for option in KNOWN_OPTIONS)
            raise ValueError(f"unknown option --{name} (known: {known})")
        if name in values:
            raise ValueError(f"option --{name} is given more than once")
        if not rest:
            raise ValueError(f"option --{name} has no value")
        values[name] = rest[0].strip()
    return values


def _whole_number(
    values: dict[str, str], name: str, *, least: int, most: int | None = None
) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    number = int(value) if WHOLE_NUMBER.fullmatch(value) else -1
    if number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"option --{name} must be a whole number {limits}, not {value!r}")
    return number


def _side(values: dict[str, str], name: str) -> int | None:
    """A width or height in pixels; 8, because one latent covers 8x8 of them."""
    value = values.get(name)
    if value is None:
        return None
    number = int(value) if WHOLE_NUMBER.fullmatch(value) else 0
    if number < 8 or number % 8:
        raise ValueError(f"option --{name} must be a positive multiple of 8, not {value!r}")
    return number


def _guidance_scale(values: dict[str, str]) -> float | None:
    value = values.get("l")
    if value is None:
        return None
    if not DECIMAL.fullmatch(value):
        raise ValueError(f"option --l must be a number of at least 0, such as 7.5, not {value!r}")
    return float(value)
