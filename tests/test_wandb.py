"""What W&B is told, read back from the file that an offline run leaves."""

import base64
import hashlib
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

import cli
from precompute.prompts import change_prompts
from runtime.files import unseal
from tests.runs import in_child

LORA = "pytorch_lora_weights.safetensors"
FILE_HEADER_BYTES, CHUNK_HEADER_BYTES, BLOCK_BYTES = 7, 7, 32768
FULL, FIRST, LAST = 1, 2, 4  # kinds of chunk: a whole record, or where in one it stands
pytestmark = pytest.mark.slow  # a run, and W&B's own process


def read_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of W&B's own."""
    data, at, record = path.read_bytes(), FILE_HEADER_BYTES, b""
    assert data[:4] == b":W&B"
    while at + CHUNK_HEADER_BYTES <= len(data):
        if (left := BLOCK_BYTES - at % BLOCK_BYTES) < CHUNK_HEADER_BYTES:
            at += left
            continue
        crc, size, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + CHUNK_HEADER_BYTES : at + CHUNK_HEADER_BYTES + size]
        assert zlib.crc32(bytes([kind]) + chunk) == crc
        record = chunk if kind in (FULL, FIRST) else record + chunk
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(record)
        at += CHUNK_HEADER_BYTES + size


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    """What was logged, in order, without W&B's own ``_`` fields."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key
                inside = row.setdefault(outer[0], {}) if outer else row
                inside[name] = json.loads(item.value_json)
            rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    return rows


def only(records: list[Any], kind: str) -> Any:
    results = [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]
    assert len(results) == 1, f"{len(results)} records of kind {kind}"
    return results[0]


@pytest.fixture(scope="module")
def run(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: 4 steps, then resumed to 6, with an eval at every second step and previews at
    every fourth."""
    folder = tmp_path_factory.mktemp("wandb")
    cache = Path(shutil.copytree(cache, folder / "cache"))
    (folder / "prompts.txt").write_text("a red circle --s 2\na blue square --s 2\n")
    change_prompts(cache, folder / "prompts.txt", str(base), "cpu")
    command = [
        *(
            "train",
            str(cache),
            "--base",
            str(base),
            "--out",
            str(folder / "run"),
            "--device",
            "cpu",
        ),
        *("--val", str(cache), "--eval-every", "2", "--log-every", "3", "--batch-size", "4"),
        *("--warmup-steps", "3", "--wandb", "offline", "--wandb-project", "a-project"),
        *("--wandb-entity", "a-team", "--wandb-name", "a name", "--wandb-group", "a group"),
        *("--wandb-tags", "first, second", "--preview-every", "4"),
    ]
    commands = [[*command, "--steps", "4"], [*command, "--steps", "6", "--resume"]]
    # Nothing of the user's own W&B settings.
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {f"WANDB_{name}_DIR": str(folder / name) for name in ("CACHE", "CONFIG", "DATA")}

    def train() -> None:
        os.environ.clear()
        os.environ.update(env, **own)
        for item in commands:
            cli.commands(item, standalone_mode=False)

    in_child(train)
    return folder / "run"


@pytest.fixture(scope="module")
def parts(run: Path) -> list[list[Any]]:
    """The records of the first run and of the resumed one."""
    files = (run / "wandb").glob("offline-run-*/run-*.wandb")
    return [[*read_records(path)] for path in sorted(files, key=lambda path: path.stat().st_mtime)]


@pytest.fixture(scope="module")
def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"trainer/step": row.pop("step"), **row} for row in rows]


def test_the_first_run_logs_every_step_once(parts: list[list[Any]]) -> None:
    rows = rows_of(parts[0])
    train = [row["trainer/step"] for row in rows if "train/loss" in row]
    assert train == [1, 2, 3, 4]
    assert [row["trainer/step"] for row in rows if "eval/loss" in row] == [0, 2, 4]
    for row in rows:
        if "train/loss" in row:
            assert {"train/loss", "train/lr", "train/grad_norm"} <= set(row)
            assert row["train/grad_norm"] > 0
    lrs = [row["train/lr"] for row in rows if "train/lr" in row]
    assert lrs == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4, 1e-4])


def test_values_are_those_of_metrics_jsonl(
    parts: list[list[Any]], metrics: list[dict[str, Any]]
) -> None:
    """W&B has one row for each step."""
    merged: dict[int, dict[str, Any]] = {}
    for row in metrics:
        merged.setdefault(row["trainer/step"], {}).update(row)
    assert len(parts) == 2
    logged = rows_of(parts[0]) + rows_of(parts[1])
    assert [{k: v for k, v in row.items() if k != "previews"} for row in logged] == [
        *merged.values()
    ]
    assert [row["trainer/step"] for row in metrics if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_goes_on_under_its_id(run: Path, parts: list[list[Any]]) -> None:
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    assert len(parts) == 2
    for records in parts:
        assert only(records, "run").run_id == run_id
        assert only(records, "run").project == "a-project"
    assert [row["trainer/step"] for row in rows_of(parts[1])] == [5, 6]
    steps = [record.history.step.num for record in parts[1] if record.HasField("history")]
    assert steps == [5, 6], "W&B's own count goes on as well: its files are joined by it"


def test_metrics_are_drawn_over_the_trained_steps(parts: list[list[Any]]) -> None:
    for records in parts:
        metric = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
        assert [(m.glob_name, m.step_metric) for m in metric] == [("*", "trainer/step")]


def test_previews_are_logged_apart_with_their_prompts(run: Path, parts: list[list[Any]]) -> None:
    drawn = {row["trainer/step"]: row["previews"] for row in rows_of(parts[0]) if "previews" in row}
    assert list(drawn) == [0, 4]
    for previews in drawn.values():
        assert previews["captions"] == ["a red circle", "a blue square"]
        assert (previews["count"], previews["width"], previews["height"]) == (2, 512, 512)
    for name in drawn[4]["filenames"]:
        (image,) = (run / "wandb").glob(f"offline-run-*/files/{name}")
        with Image.open(image) as opened:
            assert opened.size == (512, 512)


def test_the_run_has_the_names_that_were_given(parts: list[list[Any]]) -> None:
    for records in parts:
        record = only(records, "run")
        assert (record.entity, record.display_name) == ("a-team", "a name")
        assert (record.run_group, list(record.tags)) == ("a group", ["first", "second"])


def test_nothing_of_the_machine_is_uploaded(run: Path, parts: list[list[Any]]) -> None:
    """What a sync sends: the records, but for where an artifact lies here, and the files."""
    sent = [
        record.SerializeToString()
        for records in parts
        for record in records
        if record.WhichOneof("record_type") not in ("artifact", "request")
    ]
    files = [path for path in (run / "wandb").glob("offline-run-*/files/**/*") if path.is_file()]
    assert len(sent) > 10 and files
    sent += [str(path).encode() + path.read_bytes() for path in files]
    for records in parts:
        assert not only(records, "run").host
    private = [str(run.parent), sys.executable, str(Path(cli.__file__).parent)]
    for word in private:
        where = [data for data in sent if word.encode() in data.removeprefix(str(run).encode())]
        assert not where, (word, where[0][:2000])
    assert {path.name for path in files if path.suffix != ".png"} <= {
        "wandb-summary.json",
        "config.yaml",
    }


def test_the_artifact_is_the_weights_file(run: Path, parts: list[list[Any]]) -> None:
    artifact = only(parts[1], "artifact")
    assert artifact.type == "model"
    assert artifact.name == f"weights-{only(parts[1], 'run').run_id}"
    (content,) = artifact.manifest.contents
    data = (run / LORA).read_bytes()
    assert (content.path, content.size) == (LORA, len(data))
    assert base64.b64decode(content.digest) == hashlib.md5(data).digest()
    (first,) = only(parts[0], "artifact").manifest.contents
    assert first.path == LORA
    assert first.digest != content.digest


def test_the_settings_are_told(run: Path, parts: list[list[Any]]) -> None:
    logged = {u.key: u.value_json for u in only(parts[0], "run").config.update if u.key != "_wandb"}
    settings = {name: json.loads(value) for name, value in logged.items()}
    after = unseal((run / "config.json").read_bytes())
    assert settings["steps"] == 4
    assert settings["lr"] == 1e-4
    assert "wandb_entity" not in settings
    changed = {"steps", "num_steps", "resume"}
    assert {k: v for k, v in settings.items() if k not in changed} == {
        k: v for k, v in after.items() if k not in changed
    }
