"""A base named by its hub id is of one commit in all its parts, and the hub is asked little."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import NEXT_REVISION, REPO, Hub, serve

ROOT = Path(__file__).parent.parent
SLOW = [pytest.mark.slow]


@pytest.fixture
def hub(base: Path, tmp_path: Path) -> Iterator[Hub]:
    """Its branch moves to a commit with other parts, as soon as the first config was read."""
    with serve(base) as hub:
        hub.next_folder = shutil.copytree(base, tmp_path / "next")
        for config in hub.next_folder.rglob("config.json"):
            config.write_text("no config of the first commit")
        yield hub


@pytest.mark.parametrize(
    ("command", "first", "parts"),
    [
        ("train CACHE --steps 1 --rank 2 --out OUT/run", "unet", {"unet", "scheduler"}),
        pytest.param(
            "encode PICTURES --resolution 64 --bucket-step 16 --out OUT/cache",
            "vae",
            {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"},
            marks=SLOW,
        ),
        pytest.param(
            "generate --prompts PROMPTS --out OUT/images",
            "unet",
            {
                "unet",
                "scheduler",
                "vae",
                "text_encoder",
                "text_encoder_2",
                "tokenizer",
                "tokenizer_2",
            },
            marks=SLOW,
        ),
    ],
    ids=["train", "encode", "generate"],
)
def test_a_moving_branch_mixes_no_models(
    command: str, first: str, parts: set[str], hub: Hub, cache: Path, pictures: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2\n")
    hub.moves_after = f"{first}/config.json"
    places = {"CACHE": cache, "PICTURES": pictures, "PROMPTS": prompts, "OUT": tmp_path}
    for name, path in places.items():
        command = command.replace(name, str(path))
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    run = subprocess.run(
        [sys.executable, "cli.py", *command.split(), "--base", REPO, "--device", "cpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert hub.branch == NEXT_REVISION  # it did move meanwhile
    assert {name.split("/")[0] for name in hub.asked} - {"model_index.json"} == parts
    twice = {name: count for name, count in Counter(hub.asked).items() if count > 1}
    assert not twice
    assert len(hub.listings) <= len(parts) + 1, hub.listings
