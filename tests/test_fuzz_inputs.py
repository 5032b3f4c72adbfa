"""Prompt files, bases in one file, configs and tokenizers, damaged at random: no input makes
another exception than ours, of one line with the file's name. ``FUZZ_COUNT=100000`` runs longer."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl.base import find_weights, model_config, scheduler_config, zeros_for_empty_prompt
from sdxl.original import PREFIXES
from sdxl.prompts import read_prompts
from sdxl.single_file import SingleFile
from sdxl.tokenizers import find_tokenizer
from tests.singles import write_single

COUNT = int(os.environ.get("FUZZ_COUNT", "250"))  # of each kind of file
PROMPTS = {
    ".txt": "a cat --n blurry --w 64 --h 96 --d 7 --s 30 --l 5.5 --ss euler-a --n-images 4\n# b\n",
    ".jsonl": '{"text": "a", "width": 64, "scale": 7.5, "seed": 3}\n"a dog --w 64"\n',
    ".json": '[{"prompt": "a", "width": 64, "scale": 7.5}, "a dog --w 64", {"text": "b"}]',
    ".toml": '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\nscale = 7.5\nseed = 3\n',
}
PIECES = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b'"\\ud800"',
        b"\x1b[2J",
        b"\r",
        b" --",
    ),
    *(b"NaN", b"-Infinity", b"inf", b"-1", b"1e400", b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000),
    *(b"[" * 3000, b'{"a":' * 3000, b"a." * 900, b"null", b"true", b"[]", b"{}", b'""', b"#", b"="),
    *(b"1979-05-27T07:32:00Z", b"\n[[prompt]]\n", b"[prompt.subset]\n", b'"""', b"'", b","),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3.5, 2**40, 10**400, float("nan"), float("inf"), "", "x", "\ud800"),
    *([], [1], ["x"], [[1]], {}, {"a": 1}, [None], [10**30], "9" * 5000),
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some of them flipped, cut out, doubled, or replaced by something nasty."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.choice((0, 1, 2, 8, 40)))
        how = rng.randrange(4)
        if how == 0 and end > start:
            changed[start] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[start:end]
        elif how == 2:
            changed[start:start] = changed[start:end]
        else:
            changed[start:end] = rng.choice(PIECES)
    return bytes(changed)


def forged(rng: random.Random, value: Any) -> Any:
    """A JSON value with one of its parts replaced, renamed or taken away."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, changed = rng.choice(keys), value.copy()
    if rng.random() < 0.15:
        del changed[key]
    else:
        changed[key] = forged(rng, value[key])
    return changed


def check(path: Path, read: Callable[[], Any]) -> None:
    """``read`` works, or says in one line what is wrong with ``path``."""
    try:
        read()
    except ValueError as error:
        text = str(error)
        assert str(path.parent) in text and "\n" not in text and len(text) < 2000, text[:500]
        assert type(error).__name__ in ("ValueError", "BaseError"), error


@pytest.mark.parametrize("ending", PROMPTS)
def test_prompt_files(tmp_path: Path, ending: str) -> None:
    rng, path = random.Random(ending), tmp_path / f"prompts{ending}"
    for _ in range(COUNT):
        path.write_bytes(mutated(rng, PROMPTS[ending].encode()))
        check(path, lambda: read_prompts(path))


def test_single_files(base: Path, tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "one.safetensors"
    data = write_single(base, tmp_path / "whole.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = data[8 : 8 + length], data[8 + length :]

    def read() -> None:
        single = SingleFile(path)
        single.scheduler_config()
        for component in PREFIXES:
            single.pieces(component)

    for number in range(COUNT // 5):  # each header has hundreds of tensors
        if number % 2:
            other = mutated(rng, header)
        else:
            about = json.loads(header)
            configs = json.loads(about["__metadata__"]["shardtune.configs"])
            if number % 4:
                about["__metadata__"]["shardtune.configs"] = json.dumps(forged(rng, configs))
            other = json.dumps(about if number % 4 else forged(rng, about)).encode()
        size = rng.choice((len(other), len(other), len(other), 2**63, rng.randrange(2**20)))
        path.write_bytes(struct.pack("<Q", size) + other + tensors)
        check(path, read)


def test_folders(base: Path, tmp_path: Path) -> None:
    """Every JSON file of a diffusers folder in turn, and both tokenizers' files."""
    rng, folder = random.Random(2), tmp_path / "base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".txt")]

    def read() -> None:
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            model_config(str(folder), part)
        scheduler_config(str(folder))
        zeros_for_empty_prompt(str(folder))
        for name in ("tokenizer", "tokenizer_2"):
            json.dumps(find_tokenizer(str(folder), name, None).parts(), sort_keys=True)
        find_weights(folder / "unet")

    for number in range(COUNT // 2):
        path = rng.choice(files)
        whole = path.read_bytes()
        if number % 2 and path.suffix == ".json":
            path.write_text(json.dumps(forged(rng, json.loads(whole))))
        else:
            path.write_bytes(mutated(rng, whole))
        check(folder, read)
        path.write_bytes(whole)
