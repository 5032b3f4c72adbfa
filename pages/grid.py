"""The page of a grid: each prompt's images by two axes."""

from collections.abc import Sequence
from pathlib import Path

from pages.images import embed_all
from pages.page import render, write_page
from runtime.path_kinds import check_page


def write_grid(
    out: Path,
    columns: Sequence[str],
    rows: Sequence[str],
    blocks: Sequence[tuple[str, Sequence[Sequence[Path]]]],
) -> Path:
    """Write the page to ``out``; ``blocks`` are titles, and images by row and column.

    Raises:
        ValueError: a file of another program has the page's name.
        OSError: it cannot be written.
    """
    check_page(out)
    images, notes = embed_all([path for _, block in blocks for row in block for path in row])
    html = render(
        "grid.html", columns=columns, rows=rows, blocks=blocks, images=images, notes=notes
    )
    write_page(out, html)
    return out
