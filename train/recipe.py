"""A run's settings from a TOML file."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from train.config import TrainConfig


def read_recipe(path: Path) -> dict[str, Any]:
    """Options from a TOML file, by their names with ``-`` or ``_``.

    Raises:
        ValueError: unreadable, or a key that is no option (the known ones are listed).
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    known = {one.name for one in fields(TrainConfig)}
    values = {key.replace("-", "_"): value for key, value in table.items()}
    if unknown := sorted(set(values) - known):
        names = ", ".join(sorted(name.replace("_", "-") for name in known))
        raise ValueError(f"{path}: unknown option {unknown[0].replace('_', '-')} (known: {names})")
    return values
