"""Batches of encode: their size, their order, and what a GPU is not made to wait for.

Functions of this file that take no fixtures run in a process where CUDA is pretended.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encodes
import pytest
import safetensors.torch
import torch
from PIL import Image
from pretended_cuda import PretendedCuda
from test_cuda import Traffic

from precompute.encode import default_batch_size, encode
from precompute.encode_samples import Failed, in_batches
from precompute.encoders import Encoders
from precompute.settings import EncodeSettings
from sdxl.base import open_base
from sdxl.text_encoders import TextEncoders
from shards.index import Index
from shards.reader import Cache


class Steps:
    """Notes when batches are started and waited for."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.num_started = 0

    def start(self, work: Callable[[], Any]) -> Callable[[], Any]:
        number, wait = self.num_started, work()
        self.num_started += 1
        self.order.append(f"start {number}")

        def noted() -> Any:
            self.order.append(f"wait {number}")
            return wait()

        return noted


def ahead_by_one(num: int) -> list[str]:
    """Each batch is started before the one before it is waited for."""
    order = ["start 0"]
    for number in range(1, num):
        order += [f"start {number}", f"wait {number - 1}"]
    return [*order, f"wait {num - 1}"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_rows_come_back_in_their_groups(num_ahead: int, size: int) -> None:
    failed = Failed("damaged")
    groups = [[1, 2], failed, [3], [4, 5, 6, 7], failed, [8], failed]
    steps, sizes, most = Steps(), [], 0

    def start(rows: list[int]) -> Callable[[], list[int]]:
        sizes.append(len(rows))
        return steps.start(lambda: lambda: [10 * row for row in rows])

    results = []
    for group in in_batches(groups, start, size, num_ahead):
        results.append(group)
        started, waited = (sum(word in s for s in steps.order) for word in ("start", "wait"))
        most = max(most, started - waited)
    expected = [g if isinstance(g, Failed) else [10 * row for row in g] for g in groups]
    assert results == expected
    assert sizes == [size] * (8 // size) + ([8 % size] if 8 % size else [])
    assert most == min(num_ahead, len(sizes) - 1)
    if num_ahead == 1:
        assert steps.order == ahead_by_one(len(sizes))


def test_a_batch_ahead_changes_no_byte(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Encoders.__init__

    def one_ahead(self: Encoders, *args: Any) -> None:
        make(self, *args)
        assert self.num_ahead == 0, "a CPU gains nothing"
        self.num_ahead = 1

    monkeypatch.setattr(Encoders, "__init__", one_ahead)
    encodes.encode(finished / "data", base, tmp_path / "cache")
    assert encodes.contents(tmp_path / "cache") == encodes.contents(finished / "cache")


# On a GPU.


def shards_on_cuda(images: Path, base: Path, out: Path, settings: dict[str, Any]) -> Any:
    """The order of starts and waits of latents and of text, and what went over the bus."""
    import precompute.encoders
    import sdxl.text_encoders

    steps = {"latents": Steps(), "text": Steps()}
    modules: dict[str, Any] = {"latents": precompute.encoders, "text": sdxl.text_encoders}
    traffic, encode_shard = Traffic(), precompute.encode.encode_shard

    def watched(*args: Any) -> None:
        real = {name: module.fetch for name, module in modules.items()}
        for name, module in modules.items():
            noted = steps[name]
            module.fetch = lambda tensors, noted=noted, name=name: noted.start(
                lambda: real[name](tensors)
            )
        with traffic:
            encode_shard(*args)
        for name, module in modules.items():
            module.fetch = real[name]

    precompute.encode.encode_shard = watched
    precompute.encode.encode(
        EncodeSettings(dataset=images, out=out, base=str(base), device="cuda", **settings)
    )
    made_with = [i for path in out.glob("*.index") for i in Index(path).header["made_with"]]
    return {
        "order": {name: noted.order for name, noted in steps.items()},
        "copies": traffic.copies,
        "reads": traffic.reads,
        "made_with": made_with,
    }


def test_the_host_waits_for_a_batch_when_the_next_one_is_started(
    cuda: PretendedCuda, images: Path, base: Path, tmp_path: Path
) -> None:
    settings = {"resolution": 64, "square": True, "batch_size": 4}
    results = cuda(shards_on_cuda, images, base, tmp_path / "cache", settings)
    texts = {file.read_text() for file in images.rglob("*.txt")}  # equal ones are encoded once
    orders = {"latents": ahead_by_one(4), "text": ahead_by_one(-(-len(texts) // 4))}
    assert results["order"] == orders
    assert results["copies"] == {(True, True)}, "from pinned memory, and not waited for"
    assert results["reads"] == [], "nothing else makes the host wait"


# The size of a batch.


@pytest.mark.parametrize(
    ("gib", "resolution", "vae_dtype", "size"),
    [
        (None, 1024, "fp32", 2),
        (None, 64, "bf16", 2),
        (4, 1024, "fp32", 1),
        (8, 1024, "fp32", 1),
        (8, 1024, "bf16", 2),
        (12, 1024, "fp32", 2),
        (16, 1024, "fp32", 4),
        (80, 1024, "fp32", 4),
        (8, 512, "fp32", 4),
        (24, 512, "fp32", 16),
        (24, 64, "fp32", 16),
        (80, 2048, "fp32", 1),
        (2, 64, "fp32", 1),
    ],
)
def test_the_default_batch_size_is_by_the_gpus_memory(
    gib: int | None, resolution: int, vae_dtype: Any, size: int
) -> None:
    settings = EncodeSettings(
        dataset=Path("d"), out=Path("o"), base="b", resolution=resolution, vae_dtype=vae_dtype
    )
    assert default_batch_size(settings, None if gib is None else gib << 30) == size


def test_a_cache_keeps_the_batch_size_that_it_began_with(
    cuda: PretendedCuda, images: Path, base: Path, tmp_path: Path
) -> None:
    data = encodes.copy_old(images, tmp_path / "data")
    (data / "000.txt").rename(tmp_path / "000.txt")
    settings = {"resolution": 64, "square": True}
    first = cuda(shards_on_cuda, data, base, tmp_path / "cache", settings)
    (tmp_path / "000.txt").rename(data / "000.txt")
    more = cuda(shards_on_cuda, data, base, tmp_path / "cache", settings, total_memory=1 << 30)
    assert first["made_with"] == more["made_with"] == [{"batch_size": 16, "device": "cuda"}]


def test_fit_chooses_the_batch_size_and_says_so(
    images: Path, encode_to: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are counted as 3 GB, an image of 64 x 64 pixels as 12.3 MB."""

    def size_of(out: Path, **settings: Any) -> tuple[int, str]:
        encode_to(images, out, **{"batch_size": None, **settings})
        header = next(iter(Cache(out).shards())).index.header
        return header["made_with"][-1]["batch_size"], capsys.readouterr().out

    size, output = size_of(tmp_path / "a", fit="3.06GB")
    assert size == 4 and "--fit 3.06GB: batches of 4, about 3.05 GB" in output
    assert size_of(tmp_path / "b", fit="3060 MB", batch_size=3)[0] == 3
    for settings, words in (
        ({"fit": "3GB"}, "--fit 3GB: 1 image at a time take.* about 3.01 GB; --vae-dtype bf16 or"),
        ({"fit": "3.03GB", "batch_size": 9}, "9 images at a time take about 3.11 GB"),
        ({"fit": "much"}, "--fit takes a size such as 12GB"),
    ):
        with pytest.raises(ValueError, match=words):
            size_of(tmp_path / "c", **settings)
    more = tmp_path / "more"
    shutil.copytree(images, more)
    Image.new("RGB", (64, 64), "red").save(more / "new.png")
    (more / "new.txt").write_text("red")
    encode_to(more, tmp_path / "a", batch_size=None, fit="3.02GB")  # less than when it was begun
    assert "batches of 1, about 3.01 GB" in capsys.readouterr().out


def test_a_text_that_several_images_have_is_encoded_once_per_shard(
    images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every sample holds what that text alone gives."""
    data = encodes.copy_old(images, tmp_path / "data")
    for number, file in enumerate(sorted(data.rglob("*.txt"))):
        file.write_text("a red car" if number % 3 else f"a car\nnumber {number // 6}\na red car")
    encoded: list[str] = []
    start = TextEncoders.start

    def note(self: TextEncoders, prompts: list[str], *more: Any) -> Any:
        encoded.extend(prompts)
        return start(self, prompts, *more)

    monkeypatch.setattr(TextEncoders, "start", note)
    settings = encodes.settings_of(data, base, tmp_path / "cache", caption_lines=True, dtype="fp32")
    encode(settings)
    monkeypatch.undo()
    shards, num_samples = list(Cache(tmp_path / "cache").shards()), 0
    models = TextEncoders(open_base(str(base)), torch.float32, torch.device("cpu"))
    for shard in shards:
        for row in range(len(shard.index)):
            captions = shard.metadata(row)["captions"]
            tensors = safetensors.torch.load(shard.members(row)["safetensors"])
            expected = models.encode(captions, settings.batch_size or 2)
            assert torch.equal(tensors["prompt_embeds"], expected.prompt)
            assert torch.equal(tensors["pooled_prompt_embeds"], expected.pooled)
            num_samples += 1
    assert encoded.count("a red car") == len(shards) < num_samples
