"""Damaged files of runs: recipes, checkpoints, plans and notes of encode, what generate wrote."""

import io
import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import xxhash
from PIL import Image, PngImagePlugin

import cli
from infer.outputs import (
    SETTINGS_KEY,
    CaptionRow,
    ImageFolder,
    caption_row,
    coco_listing,
    jsonl_listing,
    make_record,
    read_record,
    why_stale,
)
from infer.requests import ImageRequest
from precompute.dataset.records import Blob, ImportedFile, SourceImage
from precompute.plan.placement import PlannedSample, assign_shards
from precompute.plan.plan_file import (
    CopySource,
    SampleTask,
    ShardTask,
    read_places,
    read_plan_header,
    write_plan_file,
)
from precompute.plan.scan import Notes
from runtime.files import aside_of, canonical_json, remove_path, seal
from runtime.path_kinds import checkpoints_in
from shards.buckets import Geometry
from shards.manifest import PLAN
from tests.made import config_of
from tests.mutations import Try, damage, damaged_json, ending, forge, json_text
from train.checkpoint import CHECKPOINTS, STATE, newest_checkpoint, read_state, rotate
from train.log import cut_metrics
from train.run_folder import CONFIG, METRICS, check_folder, read_own_json

RECIPE = """# A LoRA of the cache "train".
caches = ["train", "prior,weight=0.5,repeats=3"]
rank = 16
targets = "attention"
lr = 1e-4
lr-schedule = "cosine"
epochs = 10
checkpoint-every = "2ep"
pure_bf16 = false
timestep-range = [0, 999]
"""


def fuzz_recipe(work: Path, base: Path) -> Try:
    """TOML files of ``train``, and the settings that are made of them."""
    path = work / "recipe.toml"
    command = cli.commands.commands["train"]

    def try_one(rng: random.Random) -> str:
        path.write_bytes(damage(rng, RECIPE.encode()))
        given = ["--base", "base", "--out", str(work / "out"), "--config", str(path)]

        def read() -> None:
            with command.make_context("train", given) as ctx:
                values = {name: value for name, value in ctx.params.items() if name != "recipe"}
                with suppress(click.MissingParameter):  # a recipe may have no caches
                    command.make_settings(ctx, values, path)

        return ending(read, None)

    return try_one


FILES = {"a.safetensors": b"weights", "optimizer/b.safetensors": b"state"}
CHECKPOINT: dict[str, Any] = {
    "epoch": 0,
    "batches_of_epoch": 1,
    "kind": "every",
    "skipped_in_a_row": 0,
    "plan": "0" * 64,
    "global_batch": 4,
    "eval_loss": 0.5,
    "config": {"rank": 8},
    "identity": {"cache": [["0" * 64, 1.0, 1]]},
    "optimizer": {},
    "scaler": {},
    "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in FILES.items()},
}


def write_checkpoints(run: Path, state_file: Callable[[dict[str, Any]], bytes]) -> None:
    """Checkpoints of two steps; ``state_file`` makes what stands in the JSON of each."""
    for step in (2, 4):
        path = run / CHECKPOINTS / f"checkpoint-{step}"
        (path / "optimizer").mkdir(parents=True)
        for name, data in FILES.items():
            (path / name).write_bytes(data)
        (path / STATE).write_bytes(state_file({"step": step, **CHECKPOINT}))


def fuzz_checkpoint(work: Path, base: Path) -> Try:
    """``state.json`` of checkpoints, sealed or not, and the files that it vouches for."""
    run = work / "run"

    def read() -> None:
        for path in checkpoints_in(run).values():
            read_state(path)
        rotate(run, 1, 4)

    def try_one(rng: random.Random) -> str:
        def state_file(state: dict[str, Any]) -> bytes:
            is_sealed = rng.random() < 0.4
            return canonical_json(seal(state)).encode() if is_sealed else sealed(rng, state)

        remove_path(run)
        write_checkpoints(run, state_file)
        if rng.random() < 0.1:
            path, data = rng.choice([*FILES.items()])
            (run / CHECKPOINTS / "checkpoint-4" / path).write_bytes(damage(rng, data))
        newest_checkpoint(run)
        return ending(read, run)

    return try_one


def fuzz_run(work: Path, base: Path) -> Try:
    """``config.json`` and ``metrics.jsonl`` of a run: what is damaged in them is no error."""
    settings = {"steps_per_epoch": 9, "lr": 1e-4, "caches": ["train"], "rank": None}
    rows = b"".join(b'{"step": %d, "train/loss": 0.5}\n' % step for step in range(1, 9))
    config = config_of(out=work, steps=9, resume=True)

    def try_one(rng: random.Random) -> str:
        (work / CONFIG).write_bytes(sealed(rng, settings))
        read_own_json(work / CONFIG)
        (work / METRICS).write_bytes(damage(rng, rows))
        cut_metrics(work, 4)
        for line in (work / METRICS).read_bytes().split(b"\n")[:-1]:
            assert json.loads(line)["step"] <= 4
        return ending(lambda: check_folder(config), work)

    return try_one


def sealed(rng: random.Random, value: dict[str, Any]) -> bytes:
    """A JSON object that was forged and sealed, or damaged."""
    if rng.random() < 0.5:
        return damaged_json(rng, seal(value))
    changed = forge(rng, value)
    with suppress(UnicodeEncodeError):  # half a character, whose digest nobody can make
        changed = seal(changed) if isinstance(changed, dict) else changed
    return json_text(changed).encode()


def fuzz_plan(work: Path, base: Path) -> Try:
    """``plan.jsonl`` of an encode that was interrupted, and its notes of the dataset: what is
    damaged in them is forgotten."""
    write_plan_file(work, {"recipe": {"vae": {}}, "made_with": {"batch_size": 4}}, [example_work()])
    lines = [line[17:] for line in (work / PLAN).read_bytes().splitlines()]
    members = [task.planned for task in example_work().tasks]
    notes = Notes(work / "out", str(work))
    for member in members:
        notes.memory.remember(f"image {member.record.path}:0", 9, 1, [member.image_digest, 64, 64])
    notes.write()
    stored = notes._path.read_bytes()

    def try_one(rng: random.Random) -> str:
        which = rng.randrange(len(lines) + 1)
        texts = [
            damaged_json(rng, json.loads(line)) if number == which else line
            for number, line in enumerate(lines)
        ]
        signed = [xxhash.xxh3_64_hexdigest(text).encode() + b" " + text for text in texts]
        data = b"".join(line + b"\n" for line in signed)
        (work / PLAN).write_bytes(damage(rng, data) if which == len(lines) else data)
        read_plan_header(work).get("made_with")
        places = read_places(work)
        placed = [member for shard in assign_shards(members, places, 2) for member in shard.members]
        assert {sample.record.key for sample in placed} == {member.record.key for member in members}
        notes._path.write_bytes(damage(rng, stored))
        Notes(work / "out", str(work)).memory.find("image a.png:0", 9, 1)
        return "read" if places else "refused"

    return try_one


def example_work() -> ShardTask:
    blob = Blob(Path("a.png"), 9, 1)
    geometry = Geometry(original=(70, 64), resized=(70, 64), crop=(3, 0), target=(64, 64))
    records = [SourceImage(f"{name}.png", blob, ("a cat",), mask=blob) for name in "abc"]
    planned = sorted(
        (PlannedSample(record, "f" * 20, (geometry,), "e" * 20) for record in records), key=_key
    )
    file = ImportedFile(blob, "d" * 20, "_8x8")
    result = CopySource("64x64-000000", 0, planned[0].record.key)
    tasks = [
        SampleTask(planned[0], result, result),
        SampleTask(replace(planned[1], latents_file=file, text_file=file)),
        SampleTask(planned[2], reason="empty"),
    ]
    return ShardTask("64x64-000001", (64, 64), 1, tuple(tasks), ("64x64-000000",))


def _key(planned: PlannedSample) -> str:
    return planned.record.key


DRAWING = ImageRequest(
    number=0,
    prompt="a cat",
    negative=None,
    width=16,
    height=8,
    seed=1,
    num_steps=2,
    guidance_scale=5.0,
    guidance_rescale=0.0,
    sampler=None,
    original_width=16,
    original_height=8,
    crop_left=0,
    crop_top=0,
    tiled=False,
    compare=False,
)


def fuzz_generated(work: Path, base: Path) -> Try:
    """Images that generate wrote, with their records, and the captions beside them."""
    metadata = {"samplers": {"": {"name": "euler", "config": {}}}, "weights": {"unet": "0" * 64}}
    requested = make_record(DRAWING, metadata)
    row = CaptionRow("000000.png", "a cat", 16, 8)
    layouts = {"folder": jsonl_listing([row]), "coco": coco_listing([row])}

    def try_one(rng: random.Random) -> str:
        remove_path(work / "out")
        folder = ImageFolder(work / "out", rng.choice([*layouts]))
        folder.image_folder.mkdir(parents=True)
        path, listing = folder.image_folder / "000000.png", folder.listing
        data = image_with(json_text(forge(rng, requested) if rng.random() < 0.5 else requested))
        path.write_bytes(damage(rng, data) if rng.random() < 0.3 else data)
        text = layouts["coco" if folder.is_coco else "folder"]
        how = rng.randrange(4)
        if how == 0:
            listing = aside_of(listing)  # as a run leaves it that was killed
        listing.write_bytes(damaged_json(rng, json.loads(text)) if how == 1 else text.encode())

        def read() -> None:
            record, _ = read_record(path)
            caption_row(path, record)
            why_stale(path, requested)
            with folder.open():
                pass

        return ending(read, work)

    return try_one


def image_with(record: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat")
    info.add_text(SETTINGS_KEY, record)
    file = io.BytesIO()
    Image.new("RGB", (16, 8)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()
