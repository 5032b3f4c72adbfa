"""Command-line options made from settings dataclasses: names, help in panels, TOML recipes.

Imports no torch.
"""

import keyword
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from runtime.messages import shortened
from runtime.safe_parsing import parse_toml

LIMIT = 2**64  # of whole numbers: the largest that any option takes is a 64-bit seed
MAX_MESSAGE = 500  # characters about an option in a recipe
_PATHS_AS_TEXT = ("base", "vae")  # a path or a hub id, which is kept as the text that was given


class Number(click.ParamType[Any]):
    """A finite number, ``int`` or ``float``. Infinity, nan and numbers too large for the machine
    are refused here, with the option's name: no setting has a use for them."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind, self.name = kind, "integer" if kind is int else "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            number = self.kind(value)
        except (ValueError, OverflowError):
            hint = " A decimal is written with a point." if "," in str(value) else ""
            self.fail(f"{_short(value)} is not a valid {self.name}.{hint}", param, ctx)
        if not math.isfinite(number) if self.kind is float else abs(number) >= LIMIT:
            self.fail(f"{_short(value)} is out of range.", param, ctx)
        return number


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between: ``600,680,750``."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{_short(value)} is not whole numbers with commas between", param, ctx)
        return tuple(Number(int).convert(number, param, ctx) for number in numbers)


class FilePath(click.Path):
    """A path. ``~`` is expanded: a shell does that only for some spellings of an option, and for
    nothing in a recipe."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not str(value) or "\0" in str(value):
            self.fail(f"{_short(value)} is not a path.", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class PathText(click.ParamType[str]):
    """A path or a hub id, as text; ``~`` is expanded."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if "\0" in str(value):
            self.fail(f"{_short(value)} is not a path.", param, ctx)
        return os.path.expanduser(str(value))


def _short(value: Any) -> str:
    """A value in a message, cut where it is very long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


class Parsed(click.ParamType[Any]):
    """A type of the settings that has ``parse(text)``. If it has a path, the text begins with it,
    so that ``~`` can be expanded before."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, self.kind):
            return value
        try:
            return self.kind.parse(os.path.expanduser(str(value)))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def option(default: Any, text: str, *, metavar: str | None = None, aliases: str = "") -> Any:
    """Declare a field of a stage's settings as an option; it is required if ``default`` is
    ``MISSING``.

    ``aliases`` are names that the users of other trainers type, with spaces between: they are
    accepted, and not shown.
    """
    metadata = {"help": text, "metavar": metavar, "aliases": aliases.split()}
    return field(default=default, metadata=metadata)


class Option(click.Option):
    """An option with further spellings that are accepted and not shown: other trainers' names, and
    for a switch ``--no-NAME``, which overrides a recipe."""

    def __init__(self, *args: Any, aliases: list[str], off: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aliases, self._off = aliases, off

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        super().add_to_parser(parser, ctx)
        self.opts = shown
        if self._off:
            parser.add_option(self, self._off, self.name, action="store_const", const=False)


AUTO = "auto"  # of --fit: what the device has
_MEMORY = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}


def parse_memory(text: str) -> int | None:
    """Bytes of ``12GB``, ``12 GiB``, ``8000MB``; None of ``auto``.

    Raises:
        ValueError: anything else.
    """
    if text == AUTO:
        return None
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([MG]I?)B?", text.strip().upper())
    size = int(float(match[1]) * _MEMORY[f"{match[2]}B"]) if match else 0
    if size <= 0:
        raise ValueError(f"--fit takes a size such as 12GB, or auto, not {text[:50]!r}")
    return size


class Commands(click.Group):
    """Commands under the headings of ``panels``. What is typed wrongly is refused with what to type
    instead; ``explain`` says of an option that no command has what is done in its place, or None.
    """

    def __init__(
        self,
        *args: Any,
        panels: dict[str, str],
        explain: Callable[[str], str | None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._panels = {name: names.split() for name, names in panels.items()}
        self._explain = explain

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if remedy := self._remedy(error):
                raise click.UsageError(f"{error.message} {remedy}", error.ctx) from None
            raise
        except click.MissingParameter as error:
            # The first sentence of an option's help, or what the command does with its argument.
            param = error.param
            if isinstance(param, click.Option):
                text = param.help or ""
            else:
                text = (error.ctx or ctx).command.get_short_help_str(limit=200)
            message = error.message or f"{text.split('.')[0]}."
            raise click.MissingParameter(message, error.ctx, param=param) from None

    def _remedy(self, error: click.NoSuchOption) -> str | None:
        """What to type for an option that the command does not have."""
        name = error.option_name
        if not name.startswith("--"):
            return "Options begin with two dashes, as --lr."
        owners = [
            command.name
            for command in self.commands.values()
            for param in command.get_params(click.Context(command))
            if name in (*param.opts, *param.secondary_opts, *getattr(param, "aliases", ()))
        ]
        if owners:
            return f"It is an option of {' and '.join(map(str, owners))}."
        return self._explain(name[2:].replace("-", "_"))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] == "help":
            ctx.fail("no such command 'help'; type --help, alone or after a command")
        if args and args[0] not in self.commands:
            near = get_close_matches(args[0], self.commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(self.commands)}"
            ctx.fail(f"no such command {_short(args[0])}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in self._panels.items():
            with formatter.section(title):
                width = formatter.width - 6 - max(map(len, self.commands))
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(width)) for name in names]
                )


class StageCommand(click.Command):
    """A command whose options are the fields of a stage's settings (``"module:Class"``).

    The settings are the one place that knows names, types, defaults and help; their ``PANELS`` say
    under which heading of the help, and in which order, an option stands. They import no torch, and
    are imported when the options are first asked for.
    """

    def __init__(self, *args: Any, settings: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._options: dict[str, click.Parameter] = {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by panel; those of the command itself are with the last one."""
        params = {param.name: param for param in self.get_params(ctx)}
        listed = {name: [*names.split()] for name, names in self.settings.PANELS.items()}
        [*listed.values()][-1].extend(n for n in params if n and n not in self._options)
        for title, names in listed.items():
            records = [params[name].get_help_record(ctx) for name in names]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])

    @property
    def settings(self) -> Any:
        module, name = self._settings.split(":")
        return getattr(import_module(module), name)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self._options:
            hints = typing.get_type_hints(self.settings)
            for spec in fields(self.settings):
                self._options[spec.name] = _parameter(spec, hints[spec.name])
        return [*self._options.values(), *super().get_params(ctx)]

    def make_settings(self, ctx: click.Context, values: dict[str, Any], recipe: Path | None) -> Any:
        """The settings from flags and, where none is given, from a recipe file or a saved run."""
        settings = {
            name: value
            for name, value in values.items()
            if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
        }
        # Not click's default_map, which reads batch_size = 2.5 as 2, and names no file in errors.
        if recipe is not None:
            for name, value in read_recipe(recipe, self._options).items():
                if _RIVALS.get(name) not in settings:
                    settings.setdefault(name, _from_toml(self._options[name], value, recipe, ctx))
        if hasattr(self.settings, "saved_options"):  # those of a run that is resumed
            for name, value in self.settings.saved_options(settings).items():
                if name in self._options and _RIVALS.get(name) not in settings:
                    source = settings["out"]
                    settings.setdefault(name, _from_toml(self._options[name], value, source, ctx))
        for spec in fields(self.settings):
            if spec.default is MISSING and spec.name not in settings:
                raise click.MissingParameter(ctx=ctx, param=self._options[spec.name])
        return self.settings(**settings)


_RIVALS = {"steps": "epochs", "epochs": "steps"}  # a flag replaces the recipe's other one too


def _parameter(spec: Field[Any], hint: Any) -> click.Parameter:
    """The click option of a settings field; a field without help is an argument."""
    kind = PathText() if spec.name in _PATHS_AS_TEXT else _click_type(hint)
    is_tuple = typing.get_origin(hint) is tuple
    if "help" not in spec.metadata:
        # Required, but a recipe may have it: make_settings sees to that.
        name = spec.name.upper() + ("..." if is_tuple else "")
        if spec.default is not MISSING:
            name = f"[-- {name}]"
        return click.Argument(
            [spec.name], type=kind, required=False, nargs=-1 if is_tuple else 1, metavar=name
        )
    flag = "--" + _written(spec.name)
    off = "--no-" + flag[2:]
    is_required = spec.default is MISSING
    is_switch = kind is click.BOOL and spec.default is False
    no_default = is_required or spec.default in ((), None, "") or is_switch
    return Option(
        [f"{flag}/{off}" if kind is click.BOOL and not is_switch else flag, spec.name],
        type=kind,
        is_flag=True if is_switch else None,
        multiple=is_tuple and not isinstance(kind, Numbers),
        default=None if is_required else spec.default,
        show_default=not no_default,
        help=spec.metadata["help"] + ("  [required]" if is_required else ""),
        metavar=spec.metadata.get("metavar"),
        aliases=spec.metadata.get("aliases", []),
        off=[off] if is_switch else [],
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
            {
                "Every": "STEPS|Nep",
                "CaptionShares": "ROLE=SHARE,...",
                "LoraUse": "FILE[,WEIGHT]",
                "GridAxis": "AXIS=VALUE,...",
            }.get(hint.__name__, hint.__name__),
        )
    simple: dict[Any, click.ParamType[Any]] = {
        bool: click.BOOL,
        int: Number(int),
        float: Number(float),
        str: click.STRING,
        Path: FilePath(),
    }
    return simple[hint]


def _from_toml(option: click.Parameter, value: Any, recipe: Path, ctx: click.Context) -> Any:
    is_flag = option.type is click.BOOL
    parts = value if isinstance(value, list) else [value]
    is_single = all(isinstance(part, str | int | float) for part in parts)
    if not is_single or any(isinstance(part, bool) != is_flag for part in parts):
        raise ValueError(f"{recipe}: {option.name} cannot be {_kind_of(value)}")
    if is_flag and not isinstance(value, list):
        return value
    if option.nargs == -1 or option.multiple:
        return tuple(_converted(option, part, recipe, ctx) for part in parts)
    if isinstance(option.type, Numbers):
        lists = (_converted(option, part, recipe, ctx) for part in parts)
        return tuple(number for numbers in lists for number in numbers)
    return _converted(option, value, recipe, ctx)


def _kind_of(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "this list"
    return _short(value)


def _converted(option: click.Parameter, value: Any, recipe: Path, ctx: click.Context) -> Any:
    try:
        if isinstance(value, list):
            raise click.BadParameter("takes one value, not a list")
        if isinstance(value, int) and abs(value) >= LIMIT:  # Python may refuse to print it
            raise click.BadParameter("the number is out of range")
        return option.type.convert(str(value), option, ctx)
    except click.BadParameter as error:
        message = error.message  # a value in it may be of any length
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
        raise ValueError(f"{recipe}: {option.name}: {message}") from None


# Recipes: options from a TOML file (``--config`` of encode, train and generate).

RECIPE_OPTION = click.option(
    "--config",
    "recipe",
    type=FilePath(),
    help="Read options from a TOML file; options on the command line take precedence.",
)

MAX_BYTES = 1_000_000
MAX_NAME = 60  # characters of an unknown option in a message


def read_recipe(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The options of a TOML file by name, which may be spelled with ``-`` or ``_`` there; ``names``
    are those of the command's options, with ``_``.

    Raises:
        ValueError: unreadable, an option that is given twice, or a key that is no option (the
            nearest and the known ones are listed).
    """
    values: dict[str, Any] = {}
    for key, value in _read_toml(path).items():
        name = key.replace("-", "_")
        name = name + "_" if keyword.iskeyword(name) else name
        if name in values:
            raise ValueError(
                f"{path}: {_written(name)} is there twice, with - and with _ in its name; "
                "keep one of the two"
            )
        values[name] = value
    if unknown := sorted(set(values) - set(names)):
        near = get_close_matches(unknown[0], names, n=3)
        hint = f"did you mean {' or '.join(map(_written, near))}? " if near else ""
        listed = ", ".join(sorted(map(_written, names)))
        raise ValueError(f"{path}: unknown option {_written(unknown[0])} ({hint}known: {listed})")
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device without end ends here too
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES:,} bytes: not a recipe")
    try:
        return parse_toml(data.decode("utf-8-sig"))  # some editors write a byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _written(name: str) -> str:
    """An option as it is typed; ``import_`` has its underscore because Python has the word."""
    name = name.removesuffix("_") if keyword.iskeyword(name.removesuffix("_")) else name
    return name.replace("_", "-") if len(name) <= MAX_NAME else shortened(name)
