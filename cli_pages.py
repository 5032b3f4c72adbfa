"""What the commands do about pages: whether they can be written, and the page at a run's end."""

import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import describe_error, echo
from runtime.messages import pluralize
from runtime.options import StageCommand
from runtime.path_kinds import check_cache
from runtime.workers import is_main_process

if TYPE_CHECKING:
    from infer.grid import Grid


PAUSE_SECONDS = 60  # from one page at a checkpoint to the next


class CheckpointPages:
    """Writes a run's page at its checkpoints, in a process of its own: the steps go on.

    While entered, calling it starts that process, unless one is at work or was a moment ago. At the
    end what is still at work is ended, for the page of the whole run comes next.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._process: subprocess.Popen[bytes] | None = None
        self._next = time.monotonic() + PAUSE_SECONDS

    def __call__(self) -> None:
        is_idle = self._process is None or self._process.poll() is not None
        if not (is_main_process() and is_idle and time.monotonic() >= self._next):
            return
        if not _missing_packages():
            self._next = time.monotonic() + PAUSE_SECONDS
            command = [sys.executable, str(Path(__file__).with_name("cli.py")), "report"]
            with suppress(OSError):  # a page is not worth the run
                self._process = subprocess.Popen(
                    [*command, str(self.run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )

    def __enter__(self) -> "CheckpointPages":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def report_at_end(run: Path, command: StageCommand) -> None:
    """Write the run's page into its folder; nothing where the packages for it are not installed.

    Whatever goes wrong with it, the run has ended as it has: a page is worth a warning.
    """
    if is_main_process() and not _missing_packages():
        try:
            page = write_run_page(run, None, command)
            echo(f"{page}: curves, previews, settings and checkpoints, to open in a browser")
        except Exception as error:
            echo(f"Warning: the run's page is not written: {describe_error(error)}", err=True)


def write_run_page(
    run: Path, out: Path | None, command: StageCommand, val: Path | None = None
) -> Path:
    """Write a run's page. Its validation cache is ``val``, else the one that the run had, where
    this machine knows it.

    Raises:
        ValueError: there is no run, or ``val`` is no cache.
        OSError: the page cannot be written.
    """
    from pages.report import write_report
    from train.option_values import part_of
    from train.saved_options import recall_val

    if val is not None:
        check_cache(val)
    cache = part_of(val, "val") if val is not None else recall_val(run)
    return write_report(run, out, command, cache)


GRID_PAGE = "grid.html"


def show_grid(out: Path, grid: "Grid") -> None:
    """Print where a grid is, and write its page where the packages for it are installed."""
    drawn = pluralize(grid.num_generated, "image")
    echo(f"{drawn} drawn, {grid.num_kept} kept, in {out}; all at a glance: {grid.sheet}")
    if _missing_packages():
        return
    from pages.grid import write_grid

    blocks = [(block.title, block.images) for block in grid.blocks]
    page = write_grid(out / GRID_PAGE, grid.columns, grid.rows, blocks)
    echo(f"{page}: the same as a page, to open in a browser")


def check_pages() -> None:
    """Refuse a command that needs the extra ``pages`` where it is not installed.

    Raises:
        ValueError: says what to install.
    """
    if missing := _missing_packages():
        raise ValueError(f"pages need {' and '.join(missing)}: pip install '.[pages]'")


def _missing_packages() -> list[str]:
    return [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
