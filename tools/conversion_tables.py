"""Writes the tables of docs/coming-from.md from those that ``convert`` obeys.

python -m tools.conversion_tables
"""

import re
from pathlib import Path

from convert.tables import markdown, read_table

DOCS = Path(__file__).parent.parent / "docs" / "coming-from.md"
TITLES = {"kohya": "kohya", "onetrainer": "OneTrainer", "simpletuner": "SimpleTuner"}


def with_tables(text: str) -> str:
    """The page with the tables of today between its marks."""
    for tool, title in TITLES.items():
        start, end = f"<!-- {tool} -->\n", f"<!-- end of {tool} -->\n"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        table = f"{start}{markdown(title, read_table(tool))}{end}"
        text, count = re.subn(pattern, lambda _, table=table: table, text, flags=re.DOTALL)
        assert count == 1, f"{DOCS} has no marks of {tool}"
    return text


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
