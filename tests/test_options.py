"""The command line: every option under one heading, other trainers' names, near misses."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import cli
from runtime.options import Option, StageCommand

STAGES = {
    name: command
    for name, command in cli.commands.commands.items()
    if isinstance(command, StageCommand)
}


def context_of(command: str, *arguments: str) -> Any:
    return STAGES[command].make_context(command, [*arguments])


def options_of(command: str) -> list[Option]:
    params = STAGES[command].get_params(click.Context(STAGES[command]))
    return [param for param in params if isinstance(param, Option)]


@pytest.mark.parametrize("command", STAGES)
def test_every_option_stands_under_one_heading(command: str) -> None:
    settings = STAGES[command].settings
    listed = " ".join(settings.PANELS.values()).split()
    names = [field.name for field in fields(settings) if "help" in field.metadata]
    assert sorted(listed) == sorted(names)
    words = CliRunner().invoke(cli.commands, [command, "--help"]).output.split()
    for name in [*names, "debug", "help"]:
        assert f"--{name.rstrip('_').replace('_', '-')}" in words, name


@pytest.mark.parametrize("command", STAGES)
def test_help_lines_are_sentences(command: str) -> None:
    for option in options_of(command):
        text = (option.help or "").removesuffix("  [required]")
        assert text.endswith(".") and text.split()[0] not in ("Of", "As", "And"), option.name


@pytest.mark.parametrize("command", STAGES)
def test_other_trainers_names_are_accepted_and_not_shown(command: str) -> None:
    shown = CliRunner().invoke(cli.commands, [command, "--help"]).output.split()
    own = {
        name for option in options_of(command) for name in (*option.opts, *option.secondary_opts)
    }
    aliases = [(option, name) for option in options_of(command) for name in option.aliases]
    assert len(own | {name for _, name in aliases}) == len(own) + len(aliases)
    for option, name in aliases:
        assert name not in shown
        choices = getattr(option.type, "choices", ["3"])
        value = [] if option.is_flag else [str(choices[-1])]
        parsed = []
        for spelling in (name, option.opts[0]):
            with context_of(command, spelling, *value) as context:
                parsed.append(context.params[option.name])
        assert parsed[0] == parsed[1] != option.default, name


def test_a_switch_of_a_recipe_can_be_taken_back(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("full = true\nsteps = 5\n")
    given = ["cache", "--base", "b", "--out", "o", "--no-full", "--rank", "4"]
    with context_of("train", *given) as context:
        config = STAGES["train"].make_settings(context, context.params, recipe)
    assert not config.full and config.steps == 5 and config.rank == 4


def test_defaults_are_shown_also_when_they_are_zero() -> None:
    output = CliRunner().invoke(cli.commands, ["train", "--help"]).output
    words = " ".join(output.split())
    assert "0: only at the end. [default: 0]" in words
    assert "[default: 0.0]" in words and "CACHES..." in words and "[CACHES" not in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encod"], "no such command 'encod'; did you mean encode?"),
        (["xyz"], "no such command 'xyz'; known: tune, encode, prompts, train"),
        (["train", "--batchsize", "3"], "'--batch-size'"),
        (["train", "--learning-rat", "3"], "'--learning-rate'"),
    ],
)
def test_a_near_miss_is_told_the_right_name(arguments: list[str], words: str) -> None:
    run = CliRunner().invoke(cli.commands, arguments)
    assert run.exit_code == 2 and words in run.output


def test_the_version_and_the_stages_first() -> None:
    assert CliRunner().invoke(cli.commands, ["--version"]).output == "shardtune 0.1.0\n"
    output = CliRunner().invoke(cli.commands, []).output
    commands = [line.split()[0] for line in output.splitlines() if line.startswith("  ")]
    order = [name for name in commands if name in cli.commands.commands]
    assert order[:4] == ["encode", "train", "generate", "tune"]
    assert sorted(order) == sorted(cli.commands.commands)
    assert "..." not in output.partition("The three stages")[2]
