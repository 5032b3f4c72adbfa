"""How errors leave a command: one line that is never empty, no traceback, an exit code."""

import errno

import click
import pytest
from safetensors import SafetensorError

from runtime.errors import echo, handle_errors


def leave(error: BaseException, debug: bool = False) -> str:
    with pytest.raises(click.ClickException) as caught, handle_errors(debug):
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
def test_an_error_is_one_line(error: Exception, message: str) -> None:
    assert leave(error) == message


def test_what_is_still_good_is_added_to_the_error() -> None:
    error = OSError("no room")
    error.add_note("The checkpoints are good.")
    assert leave(error) == "1 no room. The checkpoints are good."


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(KeyError), handle_errors(debug=True):
        raise KeyError("x")


def test_messages_and_warnings_cannot_command_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    echo("\x1b]0;title\x07 name\n")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 name\n\n"
