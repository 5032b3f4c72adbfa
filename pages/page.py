"""Writes pages from templates, with all text escaped, as one file each."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from runtime.files import write_durable, writing
from runtime.messages import printable
from runtime.path_kinds import check_page


def _safe(value: Any) -> Any:
    """Text without characters that reverse or hide it; not what is HTML already."""
    return printable(value) if type(value) is str else value


def render(template: str, **values: Any) -> str:
    """A page from one of the templates. Every value is escaped but for charts, which are ours."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_safe,
    )
    return environment.get_template(template).render(**values)


def write_page(path: Path, html: str) -> None:
    """Write the page; its folder is made. ``check_page`` before the work that it costs.

    Raises:
        ValueError: see ``check_page``.
        OSError: it cannot be written.
    """
    check_page(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durable(path, html.encode("utf-8", "backslashreplace"))
