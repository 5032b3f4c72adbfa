"""A run's settings beside their defaults, and the command that they come from.

The command's settings dataclass, which is handed in, is the one place that knows names, defaults
and headings.
"""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

import click

from runtime.options import StageCommand

# How a run was begun, and not what it is: a copied command must neither resume nor delete.
_OF_THE_START = frozenset({"resume", "allow_changed_data", "overwrite", "dry_run"})
# Where nothing is given, the run decides by the memory that is free, and records its decision.
_DECIDED = frozenset({"gradient_checkpointing"})
MAX_VALUE = 300  # characters of a value on a page


@dataclass(frozen=True)
class Setting:
    """A setting of a run, as text."""

    name: str
    flag: str
    panel: str
    value: str
    default: str
    differs: bool


def describe_settings(values: Mapping[str, Any], command: StageCommand) -> list[Setting]:
    """Each setting of the command that ``values`` has, in the order of the command's help.

    A default that depends on other settings (the rate of an optimizer, alpha of a rank) is the one
    for this run.
    """
    specs = {spec.name: spec for spec in fields(command.settings)}
    panels = {
        name: title for title, names in command.settings.PANELS.items() for name in names.split()
    }
    order = [*(name for name in specs if name not in panels), *panels]
    described = []
    for name in order:
        if name not in values or name not in specs:
            continue
        default = _default(specs[name], values, command)
        is_required = specs[name].default is MISSING
        described.append(
            Setting(
                name=name,
                flag=name if "help" not in specs[name].metadata else flag(name),
                panel=panels.get(name, "Essentials"),
                value=show(values[name]),
                default="" if is_required else show(default),
                differs=not is_required and values[name] != default and name not in _DECIDED,
            )
        )
    return described


def other_values(values: Mapping[str, Any], command: StageCommand) -> dict[str, str]:
    """What followed from the settings, and what another version wrote."""
    known = {spec.name for spec in fields(command.settings)}
    return {name: show(value) for name, value in values.items() if name not in known}


def command_line(values: Mapping[str, Any], command: StageCommand) -> list[str]:
    """The words of a run's command, quoted for a shell; none where ``values`` are not those of a
    run. Folders stand in it by their names."""
    arguments = _arguments(values, command)
    if _parse(arguments, command) is None:
        return []
    return [shlex.quote(word) for word in ("python", "cli.py", str(command.name), *arguments)]


def _arguments(values: Mapping[str, Any], command: StageCommand, without: str = "") -> list[str]:
    """Positional values, then those options that differ from what the command would take."""
    skipped = {*_OF_THE_START, without}
    positional: list[str] = []
    options: list[str] = []
    for spec in fields(command.settings):
        value = values.get(spec.name, _plain(spec.default))
        if "help" not in spec.metadata:
            words = map(str, value if isinstance(value, list) else [value])
            positional += [word if word[:1] != "-" else f"./{word}" for word in words]
        elif value is None or value == _plain(spec.default) or spec.name in skipped:
            continue
        elif isinstance(value, bool):
            options.append(flag(spec.name) if value else flag(f"no_{spec.name}"))
        elif isinstance(value, list):
            options += [flag(spec.name), ",".join(map(str, value))]
        else:
            options += [flag(spec.name), str(value)]
    return [*positional, *options]


def _default(spec: Field[Any], values: Mapping[str, Any], command: StageCommand) -> Any:
    """The value that the run would have had without the option, as config.json would hold it."""
    default = _plain(spec.default)
    if default is not None or values[spec.name] is None or spec.name in _DECIDED:
        return default
    settings = _parse(_arguments(values, command, without=spec.name), command)
    return default if settings is None else _plain(settings.resolved()[spec.name])


def _parse(arguments: list[str], command: StageCommand) -> Any:
    """The settings that a command line gives; None where it is refused."""
    try:
        with command.make_context(str(command.name), [*arguments]) as ctx:
            return command.make_settings(ctx, ctx.params, None)
    except (click.ClickException, ValueError):
        return None


def _plain(value: Any) -> Any:
    """A value as config.json holds it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is MISSING or isinstance(value, bool | int | float | None):
        return None if value is MISSING else value
    return str(value)


def show(value: Any) -> str:
    """A value of config.json for a reader."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        text = ", ".join(map(show, value)) or "none"
    else:
        text = "none" if value is None else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}…"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
