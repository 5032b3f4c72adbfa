"""Damaged prompt files, bases in one file, configs and tokenizers."""

import json
import random
import shutil
import struct
from pathlib import Path

from sdxl.base import (
    find_weights,
    open_base,
)
from sdxl.original_names import PREFIXES
from sdxl.prompt_files import read_prompts
from sdxl.single_file import SingleFile
from tests.mutations import Try, damage, damaged_json, ending, forge, json_text
from tests.singles import write_single

PROMPTS = {
    ".txt": "a cat --n blurry --w 64 --h 96 --d 7 --s 30 --l 5.5 --ss euler-a --n-images 4\n# b\n",
    ".jsonl": '{"text": "a", "width": 64, "scale": 7.5, "seed": 3}\n"a dog --w 64"\n',
    ".json": '[{"prompt": "a", "width": 64, "scale": 7.5}, "a dog --w 64", {"text": "b"}]',
    ".toml": '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\nscale = 7.5\nseed = 3\n',
}


def fuzz_prompts(work: Path, base: Path) -> Try:
    """Prompt files of all four kinds."""

    def try_one(rng: random.Random) -> str:
        path = work / f"prompts{rng.choice([*PROMPTS])}"
        data = PROMPTS[path.suffix].encode()
        if path.suffix == ".json" and rng.random() < 0.5:
            path.write_bytes(damaged_json(rng, json.loads(data)))
        else:
            path.write_bytes(damage(rng, data))
        return ending(lambda: read_prompts(path), path)

    return try_one


def fuzz_single_file(work: Path, base: Path) -> Try:
    """Headers, and the configs in them, of a base in one file."""
    path = work / "one.safetensors"
    data = write_single(base, work / "whole.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    fields = json.loads(header)
    configs = json.loads(fields["__metadata__"]["shardtune.configs"])
    path.write_bytes(data)

    def read() -> None:
        single = SingleFile(path)
        single.scheduler_config()
        for component in PREFIXES:
            single.tensor_mappings(component)

    def try_one(rng: random.Random) -> str:
        how = rng.randrange(4)
        if how < 2:
            other = damage(rng, header)
        elif how == 2:
            other = json_text(forge(rng, fields)).encode()
        else:
            metadata = fields["__metadata__"] | {
                "shardtune.configs": json_text(forge(rng, configs))
            }
            other = json.dumps(fields | {"__metadata__": metadata}).encode()
        size = rng.choice((len(other), len(other), len(other), 2**63, rng.randrange(2**20)))
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", size) + other)
            file.truncate(len(data) - length + len(other))  # no value of a tensor is read
        return ending(read, path)

    return try_one


def fuzz_base_folder(work: Path, base: Path) -> Try:
    """Every JSON file of a diffusers folder, and both tokenizers' files."""
    folder = work / "base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')
    (folder / "unet" / "b.safetensors").touch()
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".txt")]
    originals = {path: path.read_bytes() for path in paths}

    def read() -> None:
        opened = open_base(folder)
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            opened.model(part)
        assert opened.scheduler_config and opened.zeros_for_empty_prompt in (True, False)
        for name in ("tokenizer", "tokenizer_2"):
            json.dumps(opened.tokenizer(name).parts(), sort_keys=True)
        find_weights(folder / "unet")

    def try_one(rng: random.Random) -> str:
        path = rng.choice(paths)
        if rng.random() < 0.5 and path.suffix == ".json":
            path.write_text(json_text(forge(rng, json.loads(originals[path]))))
        else:
            path.write_bytes(damage(rng, originals[path]))
        try:
            return ending(read, folder)
        finally:
            path.write_bytes(originals[path])

    return try_one
