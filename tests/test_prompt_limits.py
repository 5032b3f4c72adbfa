"""Prompt files that would hang, fill the memory or end in a traceback: one line instead."""

import json
import os
from pathlib import Path

import pytest

import sdxl.prompt_files
from infer.requests import make_requests
from infer.settings import GenerateSettings
from sdxl.prompt_files import MAX_TEXT, Prompt, parse_prompt, read_prompts

DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "prompt = " + "[" * 2000 + "]" * 2000, ": not valid TOML (nested too deep)"),
        ("a.toml", "a." * 100_000 + "b = 1", ": not valid TOML (line 1 has more than 1000 dots)"),
        ("a.toml", '"\u2028".' * 2000 + "b = 1", ": not valid TOML (line 1 has more"),
        ("a.toml", f"[[prompt]]\nseed = {DIGITS}", ": not valid TOML ("),
        ("a.toml", f"[[prompt]]\nseed = 0x{'f' * 5000}", ", prompt 1: option seed must be a whole"),
        ("a.toml", "[[prompt]]\ntext = 1979-05-27", ", prompt 1: option text must be text or a nu"),
        ("a.json", '[{"a":' * 50_000, ": not valid JSON (it is nested too deep)"),
        ("a.json", f'[{{"text": "a", "seed": {DIGITS}}}]', ": not valid JSON ("),
        ("a.json", f'[{{"text": "a", "seed": {10**400}}}]', ", prompt 1: option seed must be a wh"),
        ("a.json", f'[{{"text": "a", "scale": {10**400}}}]', ", prompt 1: option scale must be a"),
        ("a.json", f'["a --l {"9" * 400}"]', ", prompt 1: option --l must be a number of at lea"),
        (
            "a.json",
            '[{"text": "a", "width": 1e999}]',
            ", prompt 1: option width must be a positive",
        ),
        ("a.json", f'[{{"text": "a", "sampler": "{"x" * 10_000}"}}]', ", prompt 1: option sampler"),
        ("a.jsonl", '"a"\n' + '{"text": ' * 3000, ", line 2: not valid JSON (it is nested too d"),
        (
            "a.json",
            "[" + '[{"a": 1}, 2], ' * 9 + "3]",
            ", prompt 1: a prompt is text or a table, no",
        ),
        ("a.txt", "a\0 b", ", line 1: 'a\\x00 b' contains a NUL character"),
        ("a.txt", "a" * (MAX_TEXT + 1), ", line 1: a text of 100,001 characters, too long"),
        ("a.txt", "a --n " + "b" * (MAX_TEXT + 1), ", line 1: a text of 100,001 characters"),
        ("a.txt", f"a --{'x' * 10_000}", f", line 1: unknown option --{'x' * 60} (known: "),
    ],
    ids=range(19),
)
def test_one_line_that_names_file_and_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    text = str(caught.value)
    assert text.startswith(f"{path}{message}") and "\n" not in text and len(text) < 600


def test_many_names_are_no_more_than_linear_work(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{f"name{n}": n for n in range(100_000)}]))
    with pytest.raises(ValueError, match="unknown option name0 "):
        read_prompts(tmp_path / "a.json")
    assert len(parse_prompt("word " * 19_999 + "--d 5").text) == 99_994


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a.txt: not a regular file"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="not a regular file"):
        (tmp_path / "zero.txt").symlink_to("/dev/zero")
        read_prompts(tmp_path / "zero.txt")


def test_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(10**12)  # a hole: a terabyte that takes no room
    with pytest.raises(ValueError, match=r"a.txt: has 1000.0 GB; at most 64.0 MB are read"):
        read_prompts(tmp_path / "a.txt")
    monkeypatch.setattr(sdxl.prompt_files, "MAX_PROMPTS", 2)
    (tmp_path / "b.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match=r"b.txt: has more than 2 prompts"):
        read_prompts(tmp_path / "b.txt")


def test_images_without_end_are_refused(tmp_path: Path) -> None:
    settings = GenerateSettings(base="x", out=tmp_path, prompt="a")
    with pytest.raises(ValueError, match="999,999,000 images are asked for; at most 10,000,000"):
        make_requests(settings, [Prompt(text="a", num_images=999_999)] * 1000, 64)
    few = GenerateSettings(base="x", out=tmp_path, prompt="a", num_images=3)
    prompts = [Prompt(text="a", num_images=2), Prompt(text="b", num_images=999_999)]
    assert [request.prompt for request in make_requests(few, prompts, 64)] == ["a", "a", "b"]
