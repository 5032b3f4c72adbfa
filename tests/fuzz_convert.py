"""Damaged configs of other trainers, and the files that they name."""

import json
import random
from functools import partial
from pathlib import Path

import cli
from cli_convert import convert
from cli_tune import check_command
from runtime.files import remove_path
from tests.configs import (
    BACKENDS,
    CONCEPTS,
    KOHYA_DATA,
    KOHYA_LORA,
    ONETRAINER_LORA,
    SIMPLETUNER_LORA,
)
from tests.mutations import Try, damage, damaged_json, ending, forge, json_text

PROMPTS = "a cat --n blurry --w 768 --h 512 --d 7 --s 20 --l 5.5\n# b\n"
TEXTS = {
    "kohya": {"config.toml": KOHYA_LORA, "data.toml": KOHYA_DATA, "prompts.txt": PROMPTS},
    "onetrainer": {
        "config.json": json.dumps(ONETRAINER_LORA),
        "my-concepts.json": json.dumps(CONCEPTS),
        "samples.json": '[{"prompt": "a cat", "seed": 3, "width": 512}]',
    },
    "simpletuner": {
        "config.json": json.dumps(SIMPLETUNER_LORA),
        "data.json": json.dumps(BACKENDS),
    },
}


def fuzz_convert(work: Path, base: Path) -> Try:
    """Configs, datasets and prompts of each tool."""
    check = partial(check_command, cli.commands)

    def try_one(rng: random.Random) -> str:
        tool = rng.choice([*TEXTS])
        folder = work / tool
        folder.mkdir(exist_ok=True)
        changed = rng.choice([*TEXTS[tool]])
        for name, text in TEXTS[tool].items():
            data = text.encode()
            if name == changed and name.endswith(".json"):
                data = damaged_json(rng, json.loads(text))
            elif name == changed and rng.random() < 0.5 and tool == "kohya":
                data = _with_other_values(rng, text)
            elif name == changed:
                data = damage(rng, data)
            (folder / name).write_bytes(data)
        config, second, *_ = (folder / name for name in TEXTS[tool])
        datasets = None if tool == "onetrainer" else second
        out = work / "recipes"
        remove_path(out)
        return ending(lambda: convert(tool, config, datasets, out, check), work)

    return try_one


def _with_other_values(rng: random.Random, text: str) -> bytes:
    """TOML with the value of some line replaced."""
    lines = text.split("\n")
    number = rng.randrange(len(lines))
    name, equals, _ = lines[number].partition("=")
    if equals:
        value = json_text(forge(rng, rng.choice([[1], ["x"], 1])))
        lines[number] = f"{name}= {value}"
    return "\n".join(lines).encode()
