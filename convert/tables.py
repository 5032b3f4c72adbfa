"""What becomes of each option of another trainer: rows of data, and a report that loses none.

A tool's table (``kohya.table`` and the like, beside this file) is what the converter obeys, what
it prints, and what docs/coming-from.md is made of (``python -m tools.conversion_tables``).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from runtime.messages import printable, shortened

ALWAYS, NONE = "always", "none"  # what an option becomes, if not an option of ours

TRANSLATED = "Translated"
ALREADY = "Already so: our default, or always on"
WITHOUT = "No counterpart, and what is done instead"
UNKNOWN = "Not known to convert"
WRITTEN = "Not in the config: defaults of {tool} that differ from ours, written into the recipes"
CLASSES = (TRANSLATED, ALREADY, WITHOUT, UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An option of the source (or several, with spaces between) and what becomes of it."""

    names: str
    becomes: str  # ``train --rank``, with commas between several; or ALWAYS, NONE
    note: str = ""
    example: str = ""  # a line of the source
    gives: str = ""  # the line that it becomes, in a recipe of the first command in ``becomes``
    kind: type | None = None  # of a value that is copied as it is


_KINDS = {kind.__name__: kind for kind in (bool, int, float, str)}


@cache
def read_table(tool: str) -> tuple[Row, ...]:
    """The rows of ``TOOL.table``: five fields a line, with | between."""
    rows = []
    text = Path(__file__).with_name(f"{tool}.table").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            names, becomes, examples, kind, note = (part.strip() for part in line.split("|"))
            example, _, gives = (part.strip() for part in examples.partition("=>"))
            rows.append(
                Row(
                    names=names,
                    becomes=becomes,
                    note=note,
                    example=example,
                    gives=gives,
                    kind=_KINDS.get(kind),
                )
            )
    return tuple(rows)


def explain(name: str) -> str | None:
    """What stands here in place of another trainer's option, for someone who typed it (``name`` has
    ``_`` for ``-``); None if no table has it."""
    for tool in ("kohya", "simpletuner", "onetrainer"):
        for row in read_table(tool):
            if name in row.names.split():
                if row.becomes in (ALWAYS, NONE):
                    return f"Of {tool}'s options: {row.note}."
                return f"Of {tool}'s options; here it is {row.becomes}."
    return None


@dataclass(frozen=True)
class Outcome:
    """What became of one option that a config holds."""

    label: str
    kind: str  # one of CLASSES
    text: str


class Report:
    """Collects what was done with each option of the source, by its label."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {name: row for row in rows for name in row.names.split()}
        self._prefixes = {name[:-1]: row for name, row in self.rows.items() if name.endswith("*")}
        self.levels: list[Level] = []
        self.defaults: dict[str, None] = {}
        self._written: dict[str, dict[str, None]] = {}
        self._dropped: dict[str, str] = {}

    def level(self, path: Path, prefix: str, values: Mapping[str, Any], keys: str = "") -> "Level":
        """Options of the source that must be accounted for; ``keys`` begin their rows' names."""
        level = Level(path, prefix, dict(values), keys)
        self.levels.append(level)
        return level

    def write(self, labels: Sequence[str], text: str, because: str = "") -> None:
        """An option of ours was written, by these options or, of none, by a default."""
        for label in labels:
            self._written.setdefault(label, {})[text] = None
        if not labels and because:
            self.defaults[f"{because}: {text}"] = None

    def drop(self, label: str, text: str) -> None:
        """An option that is known, with a value that has no counterpart."""
        self._dropped[label] = text

    def row_of(self, name: str) -> Row | None:
        """The row of an option; that of ``optimizer.*`` is of all that begin so, and have none."""
        if name in self.rows and not name.endswith("*"):
            return self.rows[name]
        return next((row for key, row in self._prefixes.items() if name.startswith(key)), None)

    def outcomes(self) -> list[Outcome]:
        """One for each option of the source."""
        return [self._outcome(level, name) for level in self.levels for name in level.values]

    def _outcome(self, level: "Level", name: str) -> Outcome:
        label, row = level.label(name), self.row_of(level.keys + name)
        written = "; ".join(self._written.get(label, ()))
        if label in self._dropped:
            text = "; ".join(filter(None, [written, self._dropped[label]]))
            return Outcome(label, WITHOUT, text)
        if row is None:
            near = get_close_matches(level.keys + name[:60], self.rows, n=1, cutoff=0.8)
            hint = f"did you mean {near[0].removeprefix(level.keys)}?" if near else ""
            return Outcome(label, UNKNOWN, hint)
        if written:
            return Outcome(label, TRANSLATED, written)
        if row.becomes == NONE:
            return Outcome(label, WITHOUT, row.note)
        if row.becomes == ALWAYS:
            return Outcome(label, ALREADY, row.note)
        return Outcome(label, ALREADY, "the default, or without effect in this config")


@dataclass(frozen=True)
class Level:
    """Options of one table in a file of the source."""

    path: Path
    prefix: str  # of a label, such as ``datasets[1].``
    values: dict[str, Any]
    keys: str = ""

    def label(self, name: str) -> str:
        return printable(f"{self.prefix}{name if len(name) <= 80 else name[:80] + '...'}")


@dataclass(frozen=True)
class Given:
    """A value of the source, and which option it is of; no labels if that was absent."""

    value: Any
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """Options of the source, the nearest level first: a subset's win over its dataset's."""

    report: Report
    levels: tuple[Level, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)  # other names that the last level has

    def get(self, name: str, kind: type, default: Any = None) -> Given:
        """The nearest value of an option, checked for its kind; null is absent.

        Raises:
            ValueError: a value of another kind; names the file and the option.
        """
        for number, level in enumerate(self.levels):
            key = name
            if number == len(self.levels) - 1:
                key = self.renamed.get(name, name)
            if level.values.get(key) is not None:
                label = level.label(key)
                try:
                    return Given(as_kind(level.values[key], kind), (label,))
                except ValueError as error:
                    raise ValueError(f"{level.path}: {label}: {error}") from None
        return Given(default)

    def fail(self, name: str, text: str) -> ValueError:
        """An error about an option, which names the file."""
        for level in self.levels:
            if name in level.values:
                return ValueError(f"{level.path}: {level.label(name)}: {text}")
        return ValueError(f"{self.levels[0].path}: {self.levels[0].label(name)}: {text}")

    def drop(self, given: Given, text: str) -> None:
        for label in given.labels:
            self.report.drop(label, text)


def as_kind(value: Any, kind: type) -> Any:
    """``value`` as bool, int, float, str, list or dict; numbers and booleans may stand in text.

    Raises:
        ValueError: it is something else.
    """
    text = value.strip() if isinstance(value, str) else None
    if kind is bool and (isinstance(value, bool) or (text or "").lower() in ("true", "false")):
        return value if text is None else text.lower() == "true"
    if kind in (int, float) and not isinstance(value, bool):
        number = _as_number(value)
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return _as_text(value)
    if kind in (list, dict) and isinstance(value, kind):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "a table"}
    raise ValueError(f"must be {names[kind]}, not {shown(value)}")


def _as_number(value: Any) -> float | int | None:
    if isinstance(value, int):
        return value if abs(value) < 2**64 else None
    try:
        number = float(value) if isinstance(value, str | float) and len(str(value)) < 60 else None
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) else None


def _as_text(value: str | int | float) -> str:
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("is a number that is out of range")
    text = str(value)
    if len(text) > 100_000:
        raise ValueError(f"has {len(text):,} characters; at most 100,000 are read")
    if "\0" in text or any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise ValueError(f"{shown(text)} is not text that can be written to a file")
    return text


def shown(value: Any) -> str:
    """A value in a message: one short line, whatever it is."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a table"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number that is out of range"
    return printable(shortened(value)).replace("\n", " ")


def markdown(tool: str, rows: Iterable[Row]) -> str:
    """The tables of docs/coming-from.md for one tool's rows."""
    translated = [row for row in rows if row.becomes not in (ALWAYS, NONE)]
    lines = [f"| {tool} | shardtune | for example | |", "|---|---|---|---|"]
    for row in translated:
        targets = ", ".join(f"`{target}`" for target in row.becomes.split(", "))
        example = f"`{row.example}` becomes `{row.gives}`"
        lines.append(f"| {_names(row)} | {targets} | {example} | {_cell(row.note)} |")
    for kind, title in ((ALWAYS, "always so, or our default"), (NONE, "no counterpart")):
        others = [row for row in rows if row.becomes == kind]
        if others:
            lines += ["", f"| {tool}: {title} | |", "|---|---|"]
            lines += [f"| {_names(row)} | {_cell(row.note)} |" for row in others]
    return "\n".join(lines) + "\n"


def _names(row: Row) -> str:
    return ", ".join(f"`{name}`" for name in row.names.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
