"""The group of commands: how one is declared, and what it does before it begins."""

import os
import sys
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from runtime.errors import QUIET, silence_libraries
from runtime.imports import skip_unused_imports
from runtime.options import Commands, StageCommand
from runtime.process import keep_freed_memory, let_segments_grow, let_threads_sleep
from runtime.workers import launch, num_processes, rank_info


def stage(name: str, settings: str) -> Callable[[Callable[..., None]], click.Command]:
    """Declare a stage's command."""

    def declare(function: Callable[..., None]) -> click.Command:
        debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
        quiet = click.option(
            "--quiet",
            is_flag=True,
            expose_value=False,
            callback=_be_quiet,
            help="Print warnings and errors alone.",
        )
        return commands.command(name, cls=StageCommand, settings=settings)(
            click.pass_context(quiet(debug(function)))
        )

    return declare


def _be_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[QUIET] = value


def make_settings(ctx: click.Context, values: dict[str, Any], recipe: Path | None = None) -> Any:
    """The settings of a stage from its options, checked; and the process is made ready for it."""
    assert isinstance(ctx.command, StageCommand)
    settings = ctx.command.make_settings(ctx, values, recipe)
    if hasattr(settings, "check_inputs"):
        settings.check_inputs()  # a wrong path is refused before torch is imported
    prepare_process(getattr(settings, "special_imports", ()), _is_alone(settings))
    return settings


def _is_alone(settings: Any) -> bool:
    """Whether the command is a single process."""
    gpus = getattr(settings, "gpus", None)
    if gpus == "auto":
        return rank_info().size == 1 and num_processes(gpus, settings.device) == 1
    return rank_info().size == 1 and gpus in (None, "1")


def _is_own_process() -> bool:
    """Whether this process is of the command alone, and not of another program that called it."""
    return sys.argv[1:2] == [click.get_current_context().info_name]


def prepare_process(used: Collection[str] = (), alone: bool = True) -> None:
    """Before torch is imported. Other programs that call a command keep their process as it is."""
    if _is_own_process():
        if click.get_current_context().info_name != "train":  # which keeps its tensors: no gain
            keep_freed_memory()
        skip_unused_imports(used, alone=alone)


def launched(settings: Any) -> bool:
    """Whether this command was run by processes of its own, to the end."""
    if not _is_own_process():
        return False  # of a demo or a test, whose command line is not this one
    num = num_processes(settings.gpus, settings.device)
    if num > 1:
        launch(num)
    return num > 1


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
        click.echo(f"shardtune {project['version']}")
        ctx.exit()


def _explain_option(name: str) -> str | None:
    from convert.tables import explain

    return explain(name)


@click.group(
    cls=Commands,
    explain=_explain_option,
    panels={
        "The three stages": "encode train generate",
        "To begin with": "tune doctor demo download convert",
        "Caches and weights": "inspect verify unpack prompts export push",
        "Pages to look at": "report compare",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version, then exit.",
)
def commands() -> None:
    """Fine-tune SDXL from precomputed shards: encode once, train, generate."""
    silence_libraries()
    let_segments_grow()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # a log is no screen
    if sys.argv[1:2] == [click.get_current_context().invoked_subcommand]:
        let_threads_sleep()
