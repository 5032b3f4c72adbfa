"""How errors leave a command: one line that is never empty, no traceback, an exit code."""

import errno

import click
import pytest
from safetensors import SafetensorError

import cli_door


def leave(error: BaseException, monkeypatch: pytest.MonkeyPatch, debug: bool = False) -> str:
    monkeypatch.setattr(cli_door.signal, "signal", lambda *_: None)
    with pytest.raises(click.ClickException) as caught, cli_door.door(debug):
        raise error
    return f"{caught.value.exit_code} {caught.value.message}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("x.txt: no"), "2 x.txt: no"),
        (OSError(errno.EIO, "Input/output error", "a/b"), "1 a/b: Input/output error"),
        (
            OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"),
            "1 a, b: Invalid cross-device link",
        ),
        (MemoryError(), "1 out of memory: this machine has too little for the command"),
        (MemoryError("a card of 4 GB"), "1 a card of 4 GB"),
        (
            SafetensorError("MissingMetadata"),
            "1 a safetensors file cannot be read or written: MissingMetadata",
        ),
        (KeyError("x"), "1 unexpected KeyError: 'x'; --debug shows where it happened"),
        (OSError(), "1 unexpected OSError: ; --debug shows where it happened"),
        (ValueError("a\x1b[2Jb\nc"), "2 a\\x1b[2Jb c"),
    ],
)
def test_an_error_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert leave(error, monkeypatch) == message


def test_what_is_still_good_is_added_to_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError("no room")
    error.add_note("The checkpoints are good.")
    assert leave(error, monkeypatch) == "1 no room. The checkpoints are good."


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_door.signal, "signal", lambda *_: None)
    with pytest.raises(KeyError), cli_door.door(debug=True):
        raise KeyError("x")


def test_messages_and_warnings_cannot_command_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli_door.echo("\x1b]0;title\x07 name\n")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 name\n\n"
