"""The plan file of a run: the shards to write, and what each sample copies and encodes.

``plan.jsonl`` in the cache's folder holds it while the run lasts: the first line what all shards
have in common, then a line a shard; each is JSON behind a digest of its bytes. The processes of a
run read their work there; a run that follows an interrupted one finds there where each sample was
to go.
"""

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import xxhash

from precompute.dataset.records import Blob, ImportedFile, SourceImage
from precompute.plan.placement import Placement, PlannedSample
from runtime import schema
from runtime.files import durable_file
from shards.buckets import Geometry, Size
from shards.manifest import PLAN


@dataclass(frozen=True, slots=True)
class CopySource:
    """Where the valid latents or text of a sample are copied from: a row of a retired shard.

    ``key`` is the sample's key in that shard. ``cache`` is empty, or the folder of the run's other
    cache (train or val). For latents, ``num_variants`` is the number of first variants that the
    row has; 0 means all. For text, ``by_text`` means that the row has other captions: those whose
    text is the same are copied, and the others encoded.
    """

    shard: str
    row: int
    key: str
    cache: str = ""
    num_variants: int = 0
    by_text: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class SampleTask:
    """One member of a shard: latents and text are each copied or encoded."""

    planned: PlannedSample
    latents: CopySource | None = None
    text: CopySource | None = None
    reason: str | None = None  # why it has no sample, if it failed before and is as it was

    @property
    def needs_vae(self) -> bool:
        """Whether latents must be encoded."""
        is_copied = self.latents is not None and not self.latents.num_variants
        return not (self.reason is not None or is_copied or self.planned.latents_file)

    @property
    def needs_text_encoders(self) -> bool:
        """Whether captions must be encoded."""
        return self.encodes_text and not self.planned.text_file

    @property
    def is_encoded(self) -> bool:
        """Whether any of it must be encoded or imported, and not only copied."""
        is_copied = self.latents and not self.latents.num_variants and self.text
        return self.reason is None and not (is_copied and not self.encodes_text)

    @property
    def encodes_text(self) -> bool:
        """Whether any of its captions may have to be encoded, or imported."""
        return self.reason is None and (self.text is None or self.text.by_text)


@dataclass(frozen=True, eq=False, slots=True)
class ShardTask:
    """A shard to be written."""

    name: str
    bucket: Size
    repeats: int
    tasks: tuple[SampleTask, ...]  # in key order
    releases: tuple[str, ...] = ()  # retired shards that only this one copies from

    @property
    def num_encodes(self) -> int:
        """Samples of which something is encoded."""
        return sum(task.is_encoded for task in self.tasks)


def write_plan_file(folder: Path, header: dict[str, Any], shard_tasks: list[ShardTask]) -> None:
    """Write the plan file, durably: from now on this is where the samples go."""
    with durable_file(folder / PLAN) as file:
        for line in (header, *map(_shard_to_json, shard_tasks)):
            text = json.dumps(line).encode()
            file.write(xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n")


class PlanFile:
    """The plan file, read line by line; ``header`` is what all its shards have in common.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PLAN
        self._opened = _identity(self._path)
        with open(self._path, "rb") as file:
            self._starts = [0]
            self._starts += [file.tell() for _ in iter(file.readline, b"")]
        self.header: dict[str, Any] = self._read_line(0)

    def __len__(self) -> int:
        return len(self._starts) - 2

    def check_current(self) -> None:
        """
        Raises:
            ValueError: the plan is gone, or another one has taken its place.
        """
        try:
            is_current = _identity(self._path) == self._opened
        except FileNotFoundError:
            is_current = False
        if not is_current:
            raise ValueError(f"{self._path}: finished or planned anew meanwhile; start again")

    def shard(self, number: int) -> ShardTask:
        """The ``number``-th shard to be written."""
        line = self._read_line(1 + number)
        if wrong := schema.misfit(line, _SHARD):
            raise ValueError(f"{self._path}: {wrong}; run the same encode again")
        return _shard_from_json(line)

    def places(self) -> dict[str, Placement]:
        """The samples assigned to each shard, by the shards' names."""
        places = {}
        for number in range(len(self)):
            shard_task = self.shard(number)
            keys = tuple(task.planned.record.key for task in shard_task.tasks)
            if len(set(keys)) < len(keys):
                raise ValueError(f"{self._path}: names a sample twice; run the same encode again")
            places[shard_task.name] = Placement(shard_task.bucket, shard_task.repeats, keys)
        return places

    def _read_line(self, number: int) -> Any:
        with open(self._path, "rb") as file:
            file.seek(self._starts[number])
            digest, _, text = file.readline().rstrip(b"\n").partition(b" ")
        if xxhash.xxh3_64_hexdigest(text).encode() != digest:
            raise ValueError(f"{self._path}: damaged; run the same encode again")
        return schema.read_json(text)


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_plan_header(folder: Path) -> dict[str, Any]:
    """The header of an interrupted run's plan file (recipe, made_with); empty if there is none."""
    try:
        header = PlanFile(folder).header
    except (FileNotFoundError, ValueError):
        return {}
    return {} if schema.misfit(header, _HEADER) else header


def read_places(folder: Path) -> dict[str, Placement]:
    """The samples that an interrupted run assigned to each shard; empty if there was none."""
    try:
        return PlanFile(folder).places()
    except (FileNotFoundError, ValueError):
        return {}


def _is_path(value: Any) -> bool:
    return isinstance(value, str)  # a dataset's folder may have any bytes as its name


# What the lines must look like before they are believed.
_HEADER = {"recipe": schema.record, "made_with": schema.record}
_COUNT = schema.integer()
_TIME = schema.integer(-(2**63), 2**63)  # in ns
_BLOB_PARTS = (_is_path, _COUNT, _TIME, _COUNT)
_BLOB = schema.either(schema.row(*_BLOB_PARTS), schema.row(*_BLOB_PARTS, schema.text))
_GEOMETRY = schema.row(*[schema.each(_COUNT, 2)] * 4, schema.flag)
_COPY_PARTS = (schema.SHARD, _COUNT, schema.text, schema.text, _COUNT)
_COPY_SOURCE = schema.either(schema.row(*_COPY_PARTS), schema.row(*_COPY_PARTS, schema.flag))
_TASK = {
    "path": schema.text,
    "picture": _BLOB,
    "mask": schema.maybe(_BLOB),
    "captions": schema.each(schema.text),
    "weight": schema.number,
    "digests": schema.each(schema.text, 2),
    "variants": schema.each(_GEOMETRY),
    "latents": schema.maybe(_COPY_SOURCE),
    "text": schema.maybe(_COPY_SOURCE),
    "reason": schema.maybe(schema.text),
}
_FILE = schema.maybe(schema.row(_BLOB, schema.text, schema.text))
_MORE = {"imports": schema.row(_FILE, _FILE), "roles": schema.each(schema.text)}


def _is_task(value: Any) -> bool:
    if schema.misfit(value, _TASK, _MORE):
        return False
    return len(value.get("roles", value["captions"])) == len(value["captions"])


_SHARD = {
    "name": schema.SHARD,
    "bucket": schema.BUCKET,
    "repeats": schema.REPEATS,
    "frees": schema.each(schema.SHARD),
    "tasks": schema.each(_is_task),
}


def _shard_to_json(shard_task: ShardTask) -> dict[str, Any]:
    return {
        "name": shard_task.name,
        "bucket": shard_task.bucket,
        "repeats": shard_task.repeats,
        "frees": shard_task.releases,
        "tasks": [_task_to_json(task) for task in shard_task.tasks],
    }


def _shard_from_json(line: dict[str, Any]) -> ShardTask:
    width, height = line["bucket"]
    tasks = tuple(_task_from_json(task, line["repeats"]) for task in line["tasks"])
    return ShardTask(line["name"], (width, height), line["repeats"], tasks, tuple(line["frees"]))


def _task_to_json(task: SampleTask) -> dict[str, Any]:
    planned, record = task.planned, task.planned.record
    files = [planned.latents_file, planned.text_file]
    imports = {"imports": [file and _file_to_json(file) for file in files]} if any(files) else {}
    roles = {"roles": record.roles} if record.roles else {}
    return (
        imports
        | roles
        | {
            "path": record.path,
            "picture": _blob_to_json(record.image),
            "mask": record.mask and _blob_to_json(record.mask),
            "captions": record.captions,
            "weight": record.weight,
            "digests": [planned.image_digest, planned.mask_digest],
            "variants": [astuple(geometry) for geometry in planned.variants],
            "latents": task.latents and astuple(task.latents),
            "text": task.text and astuple(task.text),
            "reason": task.reason,
        }
    )


def _task_from_json(line: dict[str, Any], repeats: int) -> SampleTask:
    record = SourceImage(
        line["path"],
        _blob_from_json(line["picture"]),
        tuple(line["captions"]),
        line["weight"],
        repeats,
        line["mask"] and _blob_from_json(line["mask"]),
        roles=tuple(line.get("roles", ())),
    )
    image, mask = line["digests"]
    variants = tuple(_geometry_from_json(row) for row in line["variants"])
    latents, text = (line[part] and CopySource(*line[part]) for part in ("latents", "text"))
    files = (row and _file_from_json(row) for row in line.get("imports", (None, None)))
    planned = PlannedSample(record, image, variants, mask, *files)
    return SampleTask(planned, latents, text, line["reason"])


def _file_to_json(file: ImportedFile) -> list[Any]:
    return [_blob_to_json(file.blob), file.digest, file.suffix]


def _file_from_json(row: list[Any]) -> ImportedFile:
    return ImportedFile(_blob_from_json(row[0]), row[1], row[2])


def _geometry_from_json(row: list[Any]) -> Geometry:
    original, resized, crop, target = map(tuple, row[:4])
    return Geometry(original=original, resized=resized, crop=crop, target=target, flipped=row[4])


def _blob_to_json(blob: Blob) -> list[Any]:
    row = [str(blob.file), blob.size, blob.mtime_ns, blob.offset]
    return [*row, blob.column] if blob.column else row


def _blob_from_json(row: list[Any]) -> Blob:
    return Blob(Path(row[0]), *row[1:])
