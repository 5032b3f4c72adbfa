"""The examples of docs/python.md run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest

from tools.draw_images import draw_images

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_images(tmp_path / "data", count=9, size=64)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 3
    names: dict[str, Any] = {}
    for number, example in enumerate(examples):
        capsys.readouterr()
        exec(compile(example, f"example {number}", "exec"), names)
        if number == 1:
            shapes = capsys.readouterr().out.splitlines()
            assert len(shapes) == names["plan"].num_batches and "torch.Size([" in shapes[0]
    assert names["lora"] == Path("run/pytorch_lora_weights.safetensors")
    assert (tmp_path / "images" / "000000.png").is_file()
    assert capsys.readouterr().out.startswith("['a ")
