"""The page about the format: its examples read every sample, and what it says of shapes is so."""

import gc
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
from encodes import samples_of

from shards.format import FORMAT, TENSORS, VERSION
from shards.index import RECORD_DTYPE
from shards.manifest import read_manifest

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cache").symlink_to(cache)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def run(number: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert len(EXAMPLES) == 3 and len(EXAMPLES[number].splitlines()) <= 16
    capsys.readouterr()
    exec(compile(EXAMPLES[number], f"example {number}", "exec"), {})
    return capsys.readouterr().out.splitlines()


def test_plain_python_reads_every_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = []
    for path, members in samples_of(folder).items():
        shape = tuple(safetensors.torch.load(members["safetensors"])["latents.mean"].shape)
        wanted.append(f"{path} {json.loads(members['json'])['captions'][0]} {shape}")
    assert sorted(run(0, capsys)) == sorted(wanted)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it so
def test_webdataset_reads_batches_of_each_bucket(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(1, capsys)
    gc.collect()
    numbers = [int(re.findall(r"\d+", line)[0]) for line in lines]
    assert sum(numbers) == 14 and len(lines) == 8  # 5, 5 and 4 samples, in twos
    assert all("77, 80])" in line for line in lines)


def test_datasets_reads_every_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    lines = run(2, capsys)
    assert len(lines) == 14 and all("torch.Size([1, 4," in line for line in lines)


def test_what_the_page_says_of_fields_is_so(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert f"`{manifest['format']}`, {manifest['version']}" in PAGE
    assert (FORMAT, VERSION) == ("shardtune-cache", 2)
    missing = [name for name in manifest if f"`{name}`" not in PAGE]
    fields = {name for shard in manifest["shards"] for name in shard}
    fields |= {
        name for members in samples_of(folder).values() for name in json.loads(members["json"])
    }
    missing += [name for name in {*TENSORS, *fields} if f"`{name}`" not in PAGE]
    assert not missing
    assert f"a record of {RECORD_DTYPE.itemsize} bytes a sample" in PAGE
    side = safetensors.torch.load_file(folder / "unconditional.safetensors")
    assert {name.partition(".")[0] for name in side} == {"empty", "zeros"}
