"""No input makes another exception than ours: some inputs for each parser of ``tests/fuzz.py``."""

from pathlib import Path

import pytest

from tests.fuzz import PARSERS, fuzz

INPUTS = {
    "text": 1200,
    "row": 1200,
    "list": 300,
    "table": 300,
    "arrow": 300,
    "tar": 300,
    "image": 400,
    "npz": 400,
    "plan": 250,
    "cache": 50,
    "base-folder": 125,
    "single-file": 50,
    "lora": 300,
    "prompts": 1000,
    "recipe": 250,
    "checkpoint": 250,
    "run": 250,
    "page": 40,
    "sheet": 200,
    "generated": 250,
    "convert": 60,
}


@pytest.mark.parametrize("name", PARSERS)
def test_no_input_makes_another_exception_than_ours(name: str, base: Path, tmp_path: Path) -> None:
    if name in ("table", "arrow"):
        pytest.importorskip("pyarrow")
    endings = fuzz(name, tmp_path, base, 0, range(INPUTS[name]))
    assert endings.total() == INPUTS[name]
    assert min(endings["read"], endings["refused"]) > INPUTS[name] // 30, endings
