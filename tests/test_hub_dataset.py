"""A dataset of the hub is downloaded, of one commit, and read as the folder that it is."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from precompute.dataset.hub import locate_dataset
from precompute.dataset.sources import read_dataset
from precompute.plan.dry_run import dry_run
from precompute.report import Report
from shards.manifest import data_digest, read_manifest
from tests.encodes import encode, settings_of
from tests.folders import put, put_list
from tests.hub import NEXT_REVISION, REPO, REVISION, Hub, serve


@contextmanager
def connected(hub: Hub, home: Path, offline: bool = False) -> Iterator[None]:
    """The hub's client as the environment would set it, had it been imported now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield


def read(hub: Hub, home: Path, *names: str, offline: bool = False) -> list[str]:
    """For each name that of the dataset, its commit, its images and what is not used; or why it
    cannot be had."""
    lines = []
    for name in names:
        try:
            with connected(hub, home, offline), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                local = locate_dataset(settings_of(Path(name), home, home / "out"))
                source = read_dataset(local.settings)[""]
            paths = [record.path for record in source.records]
            lines.append(" ".join([local.name, local.commit, *paths, *source.unused]))
        except ValueError as error:
            lines.append(str(error))
    return lines


def test_what_is_downloaded_of_which_commit(tmp_path: Path) -> None:
    first = tmp_path / "first"
    put(first / "data" / "a.PNG", "a")
    put(first / "more" / "b.jpg")
    put_list(first / "more", {"file_name": "b.jpg", "text": "b"}, name="metadata.jsonl")
    for name in ("README.md", "script.py", "model.safetensors"):
        put(first / name)
    home, name = tmp_path / "hf", f"hf://{REPO}"
    with serve(first, "datasets") as hub:
        (line,) = read(hub, home, name, offline=True)
        assert line.endswith(
            "HF_HUB_OFFLINE is set, and the hub's cache on this machine does not hold all of it"
        )
        folder, all_of_it = read(hub, home, f"hf://datasets/{REPO}/more/", name)
        assert folder == f"{name}/more {REVISION} b.jpg"
        assert all_of_it == f"{name} {REVISION} more/b.jpg data/a.PNG"
        wanted = {"data/a.PNG", "data/a.txt", "more/b.jpg", "more/metadata.jsonl"}
        assert {*hub.requests} == wanted and len(hub.requests) == len(wanted)
        hub.next_folder = shutil.copytree(first, tmp_path / "next")
        (hub.next_folder / "data" / "a.PNG").unlink()
        hub.branch = NEXT_REVISION
        again, pinned = read(hub, home, name, f"{name}@{REVISION}")
        assert (again, pinned) == (f"{name} {NEXT_REVISION} more/b.jpg data/a.txt", all_of_it)
        # Without a connection, what the cache holds as a whole.
        assert read(hub, home, f"{name}@{REVISION}", offline=True) == [all_of_it]
        next(home.rglob(f"{REVISION}/more/b.jpg")).unlink()
        (line,) = read(hub, home, f"{name}@{REVISION}", offline=True)
        assert "does not hold all of it" in line
        lost = read(hub, home, "hf://someone/none", f"{name}/nowhere", f"{name}/more/../..")
        assert lost[0].startswith("hf://someone/none: could not be downloaded: the hub has none of")
        assert lost[1] == f"{name}/nowhere: has no folder nowhere with images or tables in it"
        assert "is named hf://OWNER/NAME" in lost[2]


@pytest.mark.parametrize("name", ["hf:", "hf://a", "hf://a/b@c@d", "hf:///", "hf://a/b\0"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is named hf://OWNER/NAME"):
        locate_dataset(settings_of(Path(name), tmp_path, tmp_path))


@pytest.mark.slow
def test_a_cache_knows_the_commit_and_a_rerun_says_that_it_changed(
    tmp_path: Path, images: Path, base: Path
) -> None:
    home, out, name = tmp_path / "hf", tmp_path / "cache", f"hf://{REPO}"

    def rerun(hub: Hub) -> tuple[str, Report]:
        """What it warns of, and its report; as the dry run before it warns."""
        settings = settings_of(Path(name), base, out)
        texts = []
        for run in (lambda: [*dry_run(settings)], lambda: encode(Path(name), base, out)):
            with connected(hub, home), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = run()
            texts.append([str(warned.message) for warned in caught])
            texts[-1] = [text for text in texts[-1] if "at commit" in text]
        assert texts[0] == texts[1]
        return "".join(texts[0]), result

    with serve(images, "datasets") as hub:
        hub.next_folder = shutil.copytree(images, tmp_path / "next")
        assert rerun(hub)[0] == ""
        first = read_manifest(out)
        assert first["dataset_revision"] == REVISION
        assert REPO not in json.dumps(first) and str(home) not in json.dumps(first)
        hub.branch = NEXT_REVISION
        assert rerun(hub)[0] == (
            f"{out}: encoded from {name} at commit {REVISION[:12]}, which is at "
            f"{NEXT_REVISION[:12]} now; to stay, give {name}@{REVISION}"
        )
        second = read_manifest(out)
        assert second["dataset_revision"] == NEXT_REVISION
        assert data_digest(second) == data_digest(first), "the images stayed"
        next(hub.next_folder.glob("*.txt")).write_text("another caption")
        shutil.rmtree(home)
        warned, report = rerun(hub)
        assert warned == "" and report.changes.causes == {"captions": 1}
