"""The prompt-file parser: what it takes, and the one line it answers a mistake with."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from sdxl.prompt_files import Prompt, parse_prompt, read_prompts

ALL_OPTIONS = "(known: --n --w --h --d --s --l --ss --n-images --ow --oh --cl --ct)"


def test_every_option() -> None:
    line = "a red cat, sitting --n blurry, low quality --w 768 --h 512 --d 0 --s 1 --l 7.5"
    assert parse_prompt(line) == Prompt(
        text="a red cat, sitting",
        negative="blurry, low quality",
        width=768,
        height=512,
        seed=0,
        num_steps=1,
        guidance_scale=7.5,
    )


ALL = Prompt(
    text="a red cat",
    negative="dogs",
    width=768,
    height=512,
    seed=3,
    num_steps=20,
    guidance_scale=7.0,
    sampler="euler-a",
    num_images=2,
    original_width=1000,
    original_height=600,
    crop_left=0,
    crop_top=5,
)
LINE = (
    "a red cat --n dogs --w 768 --h 512 --d 3 --s 20 --l 7 --ss euler-a --n-images 2 --ow 1000 "
    "--oh 600 --cl 0 --ct 5"
)
TABLE = (
    '"prompt": "a red cat", "negative_prompt": "dogs", "width": 768, "height": 512, "seed": 3, '
    '"sample_steps": 20, "scale": 7, "sample_sampler": "euler_a", "num_images": 2, '
    '"original_width": 1000, "original_height": 600, "crop_left": 0, "crop_top": 5'
)
KOHYA = """
[prompt]
width = 768
negative_prompt = "dogs"
[[prompt.subset]]
prompt = "a red cat"
[[prompt.subset]]
prompt = "a dog"
negative_prompt = "cats"
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"# all\n{LINE}\na dog"),
        ("a.jsonl", f'{{{TABLE}}}\n\n"a dog"'),
        ("a.JSON", f'[{{{TABLE}}}, "a dog"]'),
        ("b.json", f'["{LINE}", {{"text": "a dog"}}]'),
        (
            "a.toml",
            f"[[prompt]]\n{TABLE.replace(', ', chr(10)).replace(':', ' =')}\n"
            '[[prompt]]\ntext = "a dog"',
        ),
    ],
)
def test_every_kind_of_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == [ALL, Prompt(text="a dog")]


def test_kohyas_toml(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(KOHYA)
    assert read_prompts(tmp_path / "a.toml") == [
        Prompt(text="a red cat", negative="dogs", width=768),
        Prompt(text="a dog", negative="cats", width=768),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '"a"\n{"prompt": "b", "widht": 8}',
            ", line 2: unknown option widht (known: tex",
        ),
        ("a.jsonl", '"a"\n{"prompt"', ", line 2: not valid JSON ("),
        (
            "a.json",
            '["a", {"text": "b", "width": 65}]',
            ", prompt 2: option width must be a positi",
        ),
        (
            "a.json",
            '[{"text": "b", "width": 64.0}]',
            ", prompt 1: option width must be a positive mu",
        ),
        (
            "a.json",
            '[{"text": "b", "width": null}]',
            ", prompt 1: option width must be text or a num",
        ),
        (
            "a.json",
            '[{"text": "b", "seed": true}]',
            ", prompt 1: option seed must be text or a numb",
        ),
        ("a.json", '[{"text": 5}]', ", prompt 1: option text must be text or a number, not 5"),
        (
            "a.json",
            '[{"text": "b", "scale": NaN}]',
            ", prompt 1: option scale must be a number of at",
        ),
        ("a.json", '[{"text": "b", "text": "c"}]', ": option text is given more than once"),
        ("a.json", '[{"text": "b", "prompt": "c"}]', ", prompt 1: option prompt is given more tha"),
        ("a.json", '[{"width": 64}]', ", prompt 1: the prompt is empty"),
        ("a.json", "[7]", ", prompt 1: a prompt is text or a table, not 7"),
        ("a.json", '{"text": "a"}', ": must be a list of prompts, [...], each text or a table"),
        ("a.json", "[]", ": no prompts found"),
        ("a.toml", "[[prompt]]\ntext = ", ": not valid TOML ("),
        (
            "a.toml",
            'steps = 3\n[[prompt]]\ntext = "a"',
            ": must have [[prompt]] tables, and nothing",
        ),
        ("a.toml", 'prompt = "a"', ": must have [[prompt]] tables"),
        ("a.csv", "a", ": a prompt file is a .txt, .jsonl, .json or .toml"),
        (
            "a.txt",
            "a --ow 99999999999999999999 --oh 8",
            ", line 1: option --ow must be a whole number from 1 to 999999999",
        ),
        ("a.json", '["a \\ud800"]', ", prompt 1: 'a \\ud800' holds half a character"),
        ("a.json", "[" * 200_000, ": not valid JSON"),
        ("a.txt", "a --ow 64", ", line 1: options --ow and --oh, the original size, go together"),
        (
            "a.txt",
            "a --ss heun",
            ", line 1: option --ss must be one of euler, euler-a, ddim, ddpm, d",
        ),
        (
            "a.txt",
            "a --n-images 0",
            ", line 1: option --n-images must be a whole number from 1 to",
        ),
    ],
)
def test_a_mistake_in_a_file_names_file_place_and_option(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_defaults_are_none_and_prompts_are_frozen() -> None:
    prompt = parse_prompt("  a cat \t")
    assert prompt == Prompt(text="a cat")
    assert {value for name, value in vars(prompt).items() if name != "text"} == {None}
    with pytest.raises(FrozenInstanceError):
        prompt.text = "a dog"  # type: ignore[misc]


def test_options_come_in_any_order() -> None:
    assert parse_prompt("a cat\t--l  0   --h 8 --n dogs") == Prompt(
        text="a cat", negative="dogs", height=8, guidance_scale=0.0
    )


@pytest.mark.parametrize(
    "text",
    ["rain -- then sun", "a --- b", "well--known", "a cat --", "a - b", "-- a cat", "naïve 🐈 #1"],
)
def test_prose_stays_text(text: str) -> None:
    assert parse_prompt(text) == Prompt(text=text)
    assert parse_prompt(f"a cat --n {text} --w 64") == Prompt(text="a cat", negative=text, width=64)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "a --x 1",
            f"unknown option --x {ALL_OPTIONS}",
        ),
        (
            "a --w=64",
            f"unknown option --w=64 {ALL_OPTIONS}",
        ),
        (
            "a --7.5",
            f"unknown option --7.5 {ALL_OPTIONS}",
        ),
        ("a --w 64 --w 64", "option --w is given more than once"),
        ("a --n", "option --n has no value"),
        ("a --w --h 64", "option --w has no value"),
        ("--w 64", "the prompt is empty: text must come before the options"),
        ("", "the prompt is empty: text must come before the options"),
        ("a --w 100", "option --w must be a positive multiple of 8 up to 16384, not '100'"),
        ("a --w 80000", "option --w must be a positive multiple of 8 up to 16384, not '80000'"),
        ("a --h 0", "option --h must be a positive multiple of 8 up to 16384, not '0'"),
        ("a --h -64", "option --h must be a positive multiple of 8 up to 16384, not '-64'"),
        ("a --w 64.0", "option --w must be a positive multiple of 8 up to 16384, not '64.0'"),
        ("a --w 64 px", "option --w must be a positive multiple of 8 up to 16384, not '64 px'"),
        ("a --d -1", f"option --d must be a whole number from 0 to {2**64 - 1}, not '-1'"),
        ("a --d 1_0", f"option --d must be a whole number from 0 to {2**64 - 1}, not '1_0'"),
        ("a --s 0", "option --s must be a whole number from 1 to 999, not '0'"),
        ("a --s ten", "option --s must be a whole number from 1 to 999, not 'ten'"),
        ("a --l -1", "option --l must be a number of at least 0, such as 7.5, not '-1'"),
        ("a --l nan", "option --l must be a number of at least 0, such as 7.5, not 'nan'"),
        ("a --l inf", "option --l must be a number of at least 0, such as 7.5, not 'inf'"),
    ],
)
def test_a_mistake_is_one_clear_line(line: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_prompt(line)
    assert str(caught.value) == message


def test_the_largest_seed() -> None:
    assert parse_prompt(f"a --d {2**64 - 1}").seed == 2**64 - 1
    with pytest.raises(ValueError, match=f"not '{2**64}'"):
        parse_prompt(f"a --d {2**64}")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_a_file_skips_blanks_and_comments(tmp_path: Path, newline: bytes) -> None:
    lines = ["\ufeffa cat --d 1", "", "  # a note --x", "#--y", " ", "a dog \u2028 --n café", ""]
    path = tmp_path / "prompts.txt"
    path.write_bytes(newline.join(line.encode() for line in lines))
    assert read_prompts(path) == [
        Prompt(text="a cat", seed=1),
        Prompt(text="a dog", negative="café"),
    ]


def test_a_mistake_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n# note\na dog --x 1\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert str(caught.value) == (f"{path}, line 3: unknown option --x {ALL_OPTIONS}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": no prompts found (one a line; blank and # lines are skipped)"),
        (b"\n# only a note\n", ": no prompts found (one a line; blank and # lines are skipped)"),
        (b"a cat\ncaf\xe9\n", ", line 2: not UTF-8; save the file as UTF-8"),
        ("a cat".encode("utf-16"), ", line 1: not UTF-8; save the file as UTF-8"),
        (None, ": cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    # The whole text: a bare UnicodeDecodeError is a ValueError too.
    assert str(caught.value) == f"{path}{message}"


def test_reading_prompts_needs_no_torch() -> None:
    code = "import sys, sdxl.prompt_files; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root)
    assert run.returncode == 0
