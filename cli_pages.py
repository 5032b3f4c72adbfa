"""What the commands do about pages: whether they can be written, and the page at a run's end."""

from importlib.util import find_spec
from pathlib import Path

from runtime.errors import describe_error, echo
from runtime.options import StageCommand
from runtime.workers import is_main_process


def report_at_end(run: Path, command: StageCommand) -> None:
    """Write the run's page into its folder; nothing where the packages for it are not installed.

    Whatever goes wrong with it, the run has ended as it has: a page is worth a warning.
    """
    if is_main_process() and not _missing_packages():
        try:
            from pages.report import write_report

            page = write_report(run, None, command)
            echo(f"{page}: curves, previews, settings and checkpoints, to open in a browser")
        except Exception as error:
            echo(f"Warning: the run's page is not written: {describe_error(error)}", err=True)


def check_pages() -> None:
    """Refuse a command that needs the extra ``pages`` where it is not installed.

    Raises:
        ValueError: says what to install.
    """
    if missing := _missing_packages():
        raise ValueError(f"pages need {' and '.join(missing)}: pip install '.[pages]'")


def _missing_packages() -> list[str]:
    return [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
