"""Turns the errors, warnings and signals of a command into one line and an exit code."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from runtime.messages import printable
from runtime.signals import Stopped, Terminated, raise_terminated
from runtime.workers import is_main_process, process_label


class BadInput(click.ClickException):
    exit_code = 2


def silence_libraries() -> None:
    """Silence the libraries' log messages; their errors are exceptions. To be called before
    imports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "matplotlib"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


QUIET = "shardtune.quiet"  # in the meta of a command's context: --quiet was given


def is_quiet() -> bool:
    """Whether the command prints warnings and errors alone."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(QUIET))


def echo(text: str, err: bool = False, **style: Any) -> None:
    """Print a message, in a ``style`` as of ``click.secho``; control characters in names and
    captions are escaped."""
    if err or not is_quiet():
        click.secho(printable(text), err=err, **style)


@contextmanager
def handle_errors(debug: bool) -> Iterator[None]:
    """While entered, an error ends the command with one line and exit code 2 (bad input) or 1 (the
    machine). Warnings of our own code are printed. The filters and the signal handler are restored
    afterwards."""
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        with _printed_warnings():
            yield
    except click.ClickException:
        raise  # it is a message already
    except Stopped as stop:
        sys.exit(stop.exit_code)  # the run has said where it can be resumed
    except KeyboardInterrupt as stop:
        if is_main_process():
            echo(" ".join(["\nInterrupted.", *getattr(stop, "__notes__", [])]), err=True)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except Exception as error:
        if debug:
            raise
        kind = BadInput if isinstance(error, ValueError) else click.ClickException
        text, notes = describe_error(error), getattr(error, "__notes__", [])
        period = "." if notes and not text.endswith(".") else ""
        message = " ".join([text + period, *notes])
        raise kind(printable(process_label() + " ".join(message.split()))) from error
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _printed_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_main_process():
            own_modules = r"(precompute|train|infer|convert|runtime|shards|sdxl|pages)\."
            warnings.filterwarnings("default", module=own_modules)
        warnings.showwarning = lambda message, *_, **__: echo(f"Warning: {message}", err=True)
        yield


def describe_error(error: Exception) -> str:
    """The message of an error: which file, which field, what to do. Never empty."""
    text = str(error)
    no_memory = isinstance(error, RuntimeError) and "can't allocate memory" in text  # on a CPU
    if no_memory or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: try a smaller --batch-size ({text[:200]})"
    if isinstance(error, MemoryError):
        return text or "out of memory: this machine has too little for the command"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        names = (name for name in (error.filename, error.filename2) if name is not None)
        return f"{', '.join(map(str, names))}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)) and text:
        return text
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file cannot be read or written: {text}"
    return f"unexpected {type(error).__name__}: {text}; --debug shows where it happened"
