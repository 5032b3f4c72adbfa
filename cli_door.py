"""How errors, warnings and signals leave a command: as one line and an exit code."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click


class BadInput(click.ClickException):
    exit_code = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C does, with an exit code of its own."""


def _terminate(*_: Any) -> None:
    raise Terminated


def hush_libraries() -> None:
    """Their own chatter; their real errors reach us as exceptions. Before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def door(debug: bool) -> Iterator[None]:
    """An error leaves as one line: exit code 2 for bad input, 1 for the machine's."""
    warnings.simplefilter("ignore")
    if os.environ.get("RANK", "0") == "0":
        ours = r"(precompute|train|infer|processes|shards|sdxl)\."
        warnings.filterwarnings("default", module=ours)
    warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        if debug:
            raise
        kind = BadInput if isinstance(error, ValueError) else click.ClickException
        raise kind(_rank() + " ".join(str(error).split())) from error
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:200]
        raise click.ClickException(
            f"out of memory: try a smaller --batch-size ({reason})"
        ) from error
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            click.echo(" ".join(["\nInterrupted.", *getattr(stop, "__notes__", [])]), err=True)
        sys.exit(143 if isinstance(stop, Terminated) else 130)


def _rank() -> str:
    """Who says it, where several processes might."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "
