"""A base named by its hub id is of one commit in all its parts, and the hub is asked little."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import NEXT_REVISION, REPO, REVISION, Hub, serve

ROOT = Path(__file__).parent.parent
SLOW = [pytest.mark.slow]


@pytest.fixture
def hub(base: Path, tmp_path: Path) -> Iterator[Hub]:
    """Its branch will move to a commit whose parts are no models."""
    with serve(base) as hub:
        hub.next_folder = shutil.copytree(base, tmp_path / "next")
        for config in hub.next_folder.rglob("config.json"):
            config.write_text("no config of the first commit")
        yield hub


@pytest.mark.parametrize(
    ("command", "moves_after", "parts"),
    [
        (
            "train CACHE --steps 1 --rank 2 --out OUT/run",
            "unet/config.json",
            {"unet", "scheduler"},
        ),
        pytest.param(  # the second process comes when the branch has moved
            "train CACHE --steps 1 --rank 2 --out OUT/run --gpus 2 --batch-size 1",
            "model_index.json",
            {"unet", "scheduler"},
            marks=SLOW,
        ),
        pytest.param(
            "encode IMAGES --resolution 64 --bucket-step 16 --out OUT/cache",
            "vae/config.json",
            {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"},
            marks=SLOW,
        ),
        pytest.param(
            "generate --prompts PROMPTS --out OUT/images",
            "unet/config.json",
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
    ids=["train", "two processes", "encode", "generate"],
)
def test_a_moving_branch_mixes_no_models(
    command: str,
    moves_after: str,
    parts: set[str],
    hub: Hub,
    cache: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2\n")
    hub.moves_after = moves_after
    places = {"CACHE": cache, "IMAGES": images, "PROMPTS": prompts, "OUT": tmp_path}
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
    assert {name.split("/")[0] for name in hub.requests} - {"model_index.json"} == parts
    twice = {name: count for name, count in Counter(hub.requests).items() if count > 1}
    assert not twice
    # Which commit it is, and what that holds: once, however many components and processes.
    assert len(hub.listings) == 2, hub.listings


OPEN = """
import sys
from sdxl import BaseError
from sdxl.base import open_base
try:
    base = open_base(sys.argv[1])
    print(base.pinned, base.name, base.license, base.unet.config["in_channels"])
except BaseError as error:
    print(error)
"""


def opened(hub: Hub, home: Path, given: str, offline: bool = False) -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
    }
    command = [sys.executable, "-c", OPEN, given]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_revision_can_be_named_and_is_found_without_a_connection(
    base: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(base, tmp_path / "first")
    (first / "README.md").write_text("---\nlicense: mit\n---\n")
    home = tmp_path / "hf"
    with serve(first) as hub:
        expected = f"{REPO}@{REVISION} {REPO} mit 4"
        assert opened(hub, home, REPO) == expected
        assert opened(hub, home, REPO, offline=True) == expected
        hub.next_folder = shutil.copytree(base, tmp_path / "next")
        hub.branch = NEXT_REVISION
        assert opened(hub, home, REPO) == f"{REPO}@{NEXT_REVISION} {REPO} None 4"
        assert opened(hub, home, f"{REPO}@{REVISION}") == expected
        assert opened(hub, home, f"{REPO}@{REVISION}", offline=True) == expected


def test_a_download_that_is_not_whole_is_not_used_without_a_connection(
    base: Path, tmp_path: Path
) -> None:
    home = tmp_path / "hf"
    with serve(base) as hub:
        assert opened(hub, home, REPO).endswith(" 4")
        (config,) = home.rglob("unet/config.json")
        config.unlink()
        assert f"{REPO}: no such folder, and could not be downloaded" in opened(
            hub, home, REPO, offline=True
        )
