"""Memory-mapped shards: every slice is hashed before it is used."""

import functools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from xxhash import xxh3_64_intdigest

from runtime import schema
from runtime.devices import DTYPES
from runtime.schema import misfit, read_json
from shards.buckets import Size
from shards.format import CAPTION_TENSORS, CacheError, SampleLayout, SampleSpan
from shards.index import HashedSpan, Index, IndexRecord, map_file
from shards.manifest import UNCONDITIONAL, data_digest, read_manifest, read_side_file
from shards.plan import Group

SAMPLE_FIELDS = {"path": schema.text, "captions": schema.each(schema.text)}
OPTIONAL_SAMPLE_FIELDS = {
    "weight": schema.number,
    "digests": schema.table(schema.text, schema.text),
    "notes": schema.record,
    "roles": schema.each(schema.text),
}
MAX_OPEN_SHARDS = 8192  # each maps two files and keeps none open; Linux maps up to 65,530
T = TypeVar("T")
R = TypeVar("R")


class Shard:
    """One tar, mapped into memory, with its index.

    Raises:
        CacheError: missing, damaged, truncated, or another shard than the manifest names.
    """

    def __init__(self, folder: Path, name: str, index_sha256: str) -> None:
        self.path = folder / f"{name}.tar"
        self.index = Index(folder / f"{name}.index")
        if self.index.sha256 != index_sha256:
            raise CacheError(f"{folder / name}.index: not the one that the manifest names")
        try:
            self._data = map_file(self.path)
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be read ({error})") from None
        if len(self._data) != self.index.header["tar_bytes"]:
            raise CacheError(
                f"{self.path}: truncated or replaced: {len(self._data)} bytes where "
                f"{self.index.header['tar_bytes']} were written; encode again"
            )

    def checked(
        self, record: IndexRecord, sample_layout: SampleLayout, spans: Iterable[SampleSpan]
    ) -> Iterator[tuple[SampleSpan, memoryview]]:
        """The bytes of some spans of a sample, as views of the mapped tar.

        Each is hashed just before it is yielded, so that copying it finds it in the CPU cache.
        """
        data, offset = self._data, record.offset
        digests = self.index.digests(record, sample_layout)
        for span in spans:
            view = data[offset + span.start : offset + span.stop]
            if xxh3_64_intdigest(view) != digests[span.digest]:
                self._raise_damaged(record, span.label)
            yield span, view

    def read_into(self, target: torch.Tensor, row: int, name: str, number: int = 0) -> None:
        """Copy one checked slice into ``target`` (contiguous; of any dtype that holds it)."""
        record = self.index.record(row)
        sample_layout = self.index.sample_layout(record)
        spans_by_name = {
            **dict.fromkeys(CAPTION_TENSORS, sample_layout.captions),
            "mask": sample_layout.masks,
        }
        spans = spans_by_name.get(name, sample_layout.variants)[number]
        ((wanted, tensor_slice),) = (
            (s, piece) for s in spans for piece in s.slices if piece.name == name
        )
        ((_, source),) = self.checked(record, sample_layout, [wanted])
        values = bytearray(source[tensor_slice.start : tensor_slice.stop])
        dtype = self.index.layout.torch_dtype(name)
        target.view(-1).copy_(torch.frombuffer(values, dtype=dtype))

    def metadata(self, row: int) -> dict[str, Any]:
        """The sample's JSON: path, captions, digests."""
        data = bytes(self._part(row, *next(self.index.parts(row))))
        try:
            fields = read_json(data)
            problem = misfit(fields, SAMPLE_FIELDS, OPTIONAL_SAMPLE_FIELDS)
            if not problem and len(fields["captions"]) != self.index.records["num_captions"][row]:
                problem = "its captions are not as many as their embeddings"
            if not problem and len(fields.get("roles", fields["captions"])) != len(
                fields["captions"]
            ):
                problem = "its roles are not as many as its captions"
        except ValueError as error:
            problem = f"no JSON ({str(error)[:80]})"
        if problem:
            key = self.index.key(row)
            raise CacheError(f"{self.path}: sample {key}: not what shardtune writes: {problem}")
        return dict(fields)

    def members(self, row: int) -> dict[str, bytes]:
        """Both tar members of a sample, by extension; every part is checked."""
        for part, digest in self.index.parts(row):
            self._part(row, part, digest)
        record = self.index.record(row)
        places = {
            "json": (record.json_offset, record.json_size),
            "safetensors": (record.offset, record.size),
        }
        return {end: bytes(self._data[at : at + size]) for end, (at, size) in places.items()}

    def _part(self, row: int, part: HashedSpan, digest: int) -> memoryview:
        view = self._data[part.offset : part.offset + part.size]
        if xxh3_64_intdigest(view) != digest:
            self._raise_damaged(self.index.record(row), part.label)
        return view

    def _raise_damaged(self, record: IndexRecord, part: str) -> NoReturn:
        raise CacheError(
            f"{self.path}: sample {record.key.decode()}: {part} is damaged (xxh3 differs); "
            "`python cli.py verify` names all damage"
        )


class Cache:
    """A finished cache: its manifest, and its shards by group (bucket, repeats).

    ``weight`` and ``repeats`` multiply those of its samples: how one run uses this cache.
    """

    def __init__(self, folder: Path, *, weight: float = 1.0, repeats: int = 1) -> None:
        self.folder = folder
        self.weight, self.repeats = weight, repeats
        self.manifest = read_manifest(folder)
        self._rows = {shard["name"]: shard for shard in self.manifest["shards"]}
        self._groups: dict[tuple[Size, int], list[dict[str, Any]]] = {}
        for shard in self.manifest["shards"]:
            if shard["count"]:
                bucket: Size = (shard["bucket"][0], shard["bucket"][1])
                self._groups.setdefault((bucket, shard["repeats"]), []).append(shard)
        self._ends = {
            group: [*accumulate(shard["count"] for shard in shards)]
            for group, shards in self._groups.items()
        }
        self._open = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    @property
    def data_digest(self) -> str:
        """sha256 of everything that a run learns from; preview prompts do not change it."""
        return data_digest(self.manifest)

    def groups(self, number: int = 0) -> list[Group]:
        """This cache's groups for a ``Plan``; the cache is the ``number``-th of the run."""
        return [
            Group(cache=number, bucket=bucket, repeats=repeats * self.repeats, count=ends[-1])
            for (bucket, repeats), ends in sorted(self._ends.items())
        ]

    def locate(self, group: Group, row: int) -> tuple[Shard, int]:
        """The shard that holds sample ``row`` of a group, and its row there."""
        group_key = group.bucket, group.repeats // self.repeats
        ends = self._ends[group_key]
        which = bisect_right(ends, row)
        shard = self._groups[group_key][which]
        return self._open(shard["name"]), row - (ends[which - 1] if which else 0)

    def shards(self) -> Iterator[Shard]:
        """All shards that hold samples, one after the other."""
        for members in self._groups.values():
            for shard in members:
                yield self._open(shard["name"])

    def _open_shard(self, name: str) -> Shard:
        shard = Shard(self.folder, name, self._rows[name]["index_sha256"])
        index, row, text = shard.index, self._rows[name], self.manifest["text"]
        is_same = len(index) == row["count"] and index.layout.pooled == text["pooled"]
        is_same &= index.layout.prompt == (text["tokens"], text["depth"])
        is_same &= index.layout.latent[0] == self.manifest["latents"]["channels"]
        for name in ("bucket", "repeats"):
            is_same &= index.header.get(name) == row[name]
        if not is_same:
            raise CacheError(f"{index.path}: not as the manifest says: another count, or shape")
        return shard

    def side_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a side file, e.g. ``unconditional.safetensors``.

        Raises:
            CacheError: the cache has none, or it is damaged.
        """
        data = read_side_file(self.folder, self.manifest, name, "encode the dataset again")
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError, RecursionError) as error:
            raise CacheError(f"{self.folder / name}: no whole safetensors file ({error})") from None
        if name == UNCONDITIONAL:
            self._check_unconditional(tensors)
        return tensors

    def _check_unconditional(self, tensors: dict[str, torch.Tensor]) -> None:
        text = self.manifest["text"]
        shapes = {
            "prompt_embeds": (1, text["tokens"], text["depth"]),
            "pooled_prompt_embeds": (1, text["pooled"]),
        }
        for name, shape in shapes.items():
            for prefix in ("zeros", "empty"):
                tensor = tensors.get(f"{prefix}.{name}")
                if tensor is None or tensor.shape != shape or tensor.dtype not in DTYPES.values():
                    raise CacheError(
                        f"{self.folder / UNCONDITIONAL}: holds no {prefix}.{name} of {shape}; "
                        "encode the dataset again"
                    )


def groups_of(caches: Sequence[Cache]) -> list[Group]:
    """The groups of several caches, for a ``Plan``."""
    return [group for number, cache in enumerate(caches) for group in cache.groups(number)]


def read_ahead(
    function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int
) -> Generator[R, None, None]:
    """``map`` in order, by a pool of threads that is at most ``ahead`` items ahead."""
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
