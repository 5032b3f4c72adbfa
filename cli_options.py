"""Command-line options made from the settings dataclasses of the stages: one place for names,
types, defaults and help. Imports no torch."""

import types
import typing
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between: ``600,680,750``."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not whole numbers with commas between", param, ctx)


class Parsed(click.ParamType[Any]):
    """A type of the settings that reads itself: it has ``parse(text)``."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, self.kind):
            return value
        try:
            return self.kind.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class StageCommand(click.Command):
    """A command whose options are the fields of a stage's settings (``"module:Class"``).

    The settings are the one place that knows names, types, defaults and help. They import no
    torch, and are imported when the options are first asked for.
    """

    def __init__(self, *args: Any, settings: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._options: dict[str, click.Parameter] = {}

    @property
    def settings(self) -> Any:
        module, name = self._settings.split(":")
        return getattr(import_module(module), name)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self._options:
            hints = typing.get_type_hints(self.settings)
            for one in fields(self.settings):
                self._options[one.name] = _parameter(one, hints[one.name])
        return [*self._options.values(), *super().get_params(ctx)]

    def make_settings(self, ctx: click.Context, values: dict[str, Any], recipe: Path | None) -> Any:
        """The settings from flags and, where none is given, from a recipe file."""
        given = {
            name: value
            for name, value in values.items()
            if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
        }
        if recipe is not None:
            for name, value in import_module("train.recipe").read_recipe(recipe).items():
                if _RIVALS.get(name) not in given:
                    given.setdefault(name, _from_toml(self._options[name], value, recipe, ctx))
        for one in fields(self.settings):
            if one.default is MISSING and one.name not in given:
                raise click.MissingParameter(ctx=ctx, param=self._options[one.name])
        return self.settings(**given)


_RIVALS = {"steps": "epochs", "epochs": "steps"}  # a flag replaces the recipe's other one too


def _parameter(one: Field[Any], hint: Any) -> click.Parameter:
    """The click option of a settings field; a field without help is an argument."""
    kind = _click_type(hint)
    if "help" not in one.metadata:
        several = typing.get_origin(hint) is tuple
        return click.Argument([one.name], type=kind, required=False, nargs=-1 if several else 1)
    flag = "--" + one.name.replace("_", "-")
    flags = f"{flag}/--no-{flag[2:]}" if kind is click.BOOL else flag
    required = one.default is MISSING
    shown = not required and one.default not in ((), None) and bool(one.default)
    several = typing.get_origin(hint) is tuple and not isinstance(kind, Numbers)
    return click.Option(
        [flags, one.name],
        type=kind,
        multiple=several,
        default=None if required else one.default,
        show_default=shown,
        help=one.metadata["help"] + ("  [required]" if required else ""),
    )


def _click_type(hint: Any) -> click.ParamType[Any]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return click.Choice(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        (hint, _) = typing.get_args(hint)
        if hint is int:
            return Numbers()
    if hasattr(hint, "parse"):
        return Parsed(
            hint,
            {"Every": "STEPS|Nep", "LoraUse": "FILE[,WEIGHT]"}.get(hint.__name__, hint.__name__),
        )
    simple = {bool: click.BOOL, int: click.INT, float: click.FLOAT, str: click.STRING}
    return simple.get(hint) or click.Path(path_type=Path)


def _from_toml(option: click.Parameter, value: Any, recipe: Path, ctx: click.Context) -> Any:
    is_flag = option.type is click.BOOL
    if isinstance(value, bool) != is_flag or isinstance(value, dict):
        raise ValueError(f"{recipe}: {option.name} cannot be {value!r}")
    if is_flag:
        return value
    if option.nargs == -1 or option.multiple:
        parts = value if isinstance(value, list) else [value]
        return tuple(_converted(option, str(part), recipe, ctx) for part in parts)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return _converted(option, text, recipe, ctx)


def _converted(option: click.Parameter, text: str, recipe: Path, ctx: click.Context) -> Any:
    try:
        return option.type.convert(text, option, ctx)
    except click.BadParameter as error:
        raise ValueError(f"{recipe}: {option.name}: {error.message}") from None
