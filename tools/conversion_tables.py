"""Writes the tables of docs/coming-from.md from those that ``convert`` obeys.

python -m tools.conversion_tables
"""

from pathlib import Path

from convert.tables import markdown, read_table

DOCS = Path(__file__).parent.parent / "docs" / "coming-from.md"
TITLES = {"kohya": "kohya", "onetrainer": "OneTrainer", "simpletuner": "SimpleTuner"}


def with_tables(text: str) -> str:
    """The page with the tables of today between its marks."""
    for tool, title in TITLES.items():
        start, end = f"<!-- {tool} -->\n", f"<!-- end of {tool} -->\n"
        before, found_start, rest = text.partition(start)
        _, found_end, after = rest.partition(end)
        assert found_start and found_end, f"{DOCS} has no marks of {tool}"
        text = f"{before}{start}{markdown(title, read_table(tool))}{end}{after}"
    return text


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
