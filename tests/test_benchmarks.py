"""The benchmarks run: all ways to read read, and every GPU cell runs on a CPU, tiny."""

import inspect
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from pretended_cuda import PretendedCuda
from recorded_cuda_graphs import stand_in
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

import benchmarks
import benchmarks.gpu as gpu
from benchmarks import gpu_cells, readers
from benchmarks.allocations import RUNS, Allocations, peaks
from benchmarks.caches import KINDS, Kind, random_samples, write_random, write_sparse
from benchmarks.estimates import config_of
from benchmarks.full_base import CONFIGS
from benchmarks.gpu import Cell, fill_in, grid, measure, rows_of, run_cell
from benchmarks.gpu_cells import largest
from benchmarks.online import ImageDataset, Online
from benchmarks.report import ratio, take_turns
from benchmarks.vae_precision import Tf32, compare, drawn_pixels, to_tf32
from sdxl.base import open_base
from sdxl.load import load_vae
from shards.batches import Reader
from shards.plan import Plan, RankShare
from shards.reader import Cache
from shards.verify import verify
from train.memory import Estimator

SMALL = Kind(pixels=64, width=12, pooled=5)


SCRIPTS = sorted(
    path
    for path in Path(benchmarks.__path__[0]).glob("*.py")
    if "@click.command" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_takes_the_options_that_it_has(script: Path) -> None:
    """click hands options over by name, which no type checker sees."""
    module = import_module(f"benchmarks.{script.stem}")
    (command,) = (value for value in vars(module).values() if isinstance(value, click.Command))
    assert command.callback is not None and command.params
    bound = inspect.signature(command.callback).bind(**{p.name: None for p in command.params})
    assert bound.kwargs or bound.args


def test_the_sizes_are_sdxls() -> None:
    assert [round(kind.sample_bytes / 1e3) for kind in KINDS.values()] == [449, 580]


def test_random_caches_are_whole_and_their_samples_differ(tmp_path: Path) -> None:
    samples = random_samples(SMALL, 5)
    write_random(tmp_path / "cache", SMALL, samples)
    cache = Cache(tmp_path / "cache")
    assert [fault for result in verify(cache.folder, cache.manifest) for fault in result] == []
    assert len({bytes(sample.tensors["latents.mean"].numpy()) for sample in samples}) == 5


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset closes its tars late
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_reader_reads_the_whole_cache(tmp_path: Path) -> None:
    samples = random_samples(SMALL, 5)
    write_random(tmp_path / "cache", SMALL, samples)
    readers.write_npz(tmp_path / "npz", samples)
    cache = Cache(tmp_path / "cache")
    assert len(set(readers.places(cache))) == 5
    for work in (
        readers.mmap_copy(cache),
        readers.shards_in_order(cache, SMALL),
        readers.hash_and_copy(cache),
        readers.training(cache),
        readers.stock_webdataset(cache),
        readers.npz(tmp_path / "npz"),
    ):
        work()


def test_a_sparse_cache_reads_as_zeros(tmp_path: Path) -> None:
    write_sparse(tmp_path / "cache", SMALL, 700)  # two shards
    cache = Cache(tmp_path / "cache")
    plan = Plan(cache.groups(), 0, 7)
    reader = Reader([cache], plan, RankShare(batch_size=7, world=1, rank=0))
    keys = set()
    for number in range(plan.num_batches):
        batch = reader.read(plan.batch(0, number), 0)
        assert not batch.latents.any() and not batch.prompt.any() and batch.noise.any()
        keys |= set(batch.keys)
    assert len(keys) == 700


def test_the_cached_script_trains_without_its_encoders(images: Path, base: Path) -> None:
    online = Online(str(base), torch.device("cpu"), torch.float32, torch.float32, rank=2)
    dataset = ImageDataset(images, 64)
    first = next(iter(DataLoader(dataset, batch_size=4)))
    prompt, pooled = online.encode_text(first["caption"])
    samples = online.precompute(dataset, batch_size=4)
    assert len(samples) == 14
    batch = next(iter(DataLoader(samples, batch_size=4)))  # type: ignore[arg-type]
    torch.testing.assert_close(batch["prompt"], prompt)
    torch.testing.assert_close(batch["pooled"], pooled)
    assert batch["latents"].shape == (4, 4, 8, 8) and torch.equal(
        batch["time_ids"], first["time_ids"]
    )
    assert not any(hasattr(online, name) for name in ("vae", "encoders", "tokenizers"))
    before = [parameter.clone() for parameter in online.trained]
    online.step(batch)
    assert any(not torch.equal(a, b) for a, b in zip(before, online.trained, strict=True))


def test_tf32_is_emulated_by_rounding_what_is_multiplied(base: Path) -> None:
    step = 2.0**-10  # of TF32's mantissa
    numbers = torch.tensor([1.0, 1 + step / 2, 1 + 0.4 * step, -1 - 0.6 * step, 3e38, 0.0])
    rounded = [1.0, 1 + step, 1.0, -1 - step, 3e38, 0.0]
    assert to_tf32(numbers).tolist() == pytest.approx(rounded, rel=step / 4)
    cut_off = to_tf32(numbers, cut_off=True)
    assert cut_off[:4].tolist() == [1.0, 1.0, 1.0, -1.0]
    vae = load_vae(open_base(base).vae, torch.float32)
    rows = {row["precision"]: row for row in compare(vae, drawn_pixels(2, 64))}
    errors = [
        rows[name]["latents, rms error in % of std"] for name in ("tf32", "tf32, cut off", "bf16")
    ]
    assert 1e-6 < errors[0] < errors[1] < errors[2] / 2
    with Tf32() as mode, torch.inference_mode():
        a, b = torch.full((1, 1), 1 + step / 4), torch.full((1, 1), 1 + step)
        assert torch.nn.functional.linear(a, b).item() == 1 + step
        torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))
    assert mode.num_products == 2


def test_turns_and_ratios() -> None:
    clock = iter(range(100))
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns(works, 3, {"beats": lambda: float(next(clock))})  # type: ignore[arg-type]
    assert order == [*"abbaabba"] and seconds == {"beats": {"a": [1.0] * 3, "b": [1.0] * 3}}
    assert ratio({"a": [1, 2, 4], "b": [2, 6, 20]}, "a", "b") == 3
    assert ratio({"a": [1, 2, 4], "b": [2, 6, 20]}, "b", "a") == pytest.approx(1 / 3)


def test_allocations_are_counted_from_making_to_end() -> None:
    with FakeTensorMode(), Allocations() as result:
        first = torch.empty(128)  # 512 bytes
        view = first.view(2, 64)
        second = first + torch.empty(1)  # and for a moment 512 of the allocator's for 4
        assert (result.live, result.peak) == (1024, 1536)
        del first, second
        assert result.live == 512  # the view holds it
        weight = torch.empty(256, 256, requires_grad=True)
        (view.new_empty(4, 256) @ weight).square().sum().backward()
        del view
        assert result.live == 2 * 4 * 256 * 256  # the weight and its gradient
    assert result.peak > result.live


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS[:1], ids=lambda run: run[0])  # benchmarks.allocations has all
def test_what_a_step_allocates_is_near_the_estimate(run: Any) -> None:
    _, settings, pixels, target = run
    config = config_of(allow_cpu_bf16=True, **settings)
    actual = peaks(config, pixels)
    expected = Estimator(open_base(CONFIGS), 77).estimate(config, (pixels, pixels))
    state = expected.weights + expected.optimizer
    assert actual["kept"] == pytest.approx(state, rel=0.02)
    assert actual["peak"] == pytest.approx(expected.peak, rel=0.05)
    assert actual["peak"] < 1e9 * target


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
def test_the_largest_that_fits_is_found(most: int) -> None:
    for limit in range(most + 3):
        tried: list[int] = []

        def fits(number: int, tried: list[int] = tried, limit: int = limit) -> bool:
            tried.append(number)
            return number <= limit

        assert largest(fits, most) == min(limit, most)
        assert max(tried) <= most and len(tried) == len(set(tried))


# The cells of the GPU benchmark.


def test_cells_have_names_of_their_own_and_settings_that_go_together() -> None:
    cells = grid()
    assert len({cell.name for cell in cells}) == len(cells) > 30
    assert {cell.kind for cell in cells} == set(gpu_cells.KINDS)
    for pixels in (512, 1024):
        for kind in ("LoRA 4", "LoRA 16", "full"):
            assert any(cell.name.startswith(f"{kind}, {pixels}") for cell in cells)


def one_of_each() -> Iterator[Any]:
    """Cells that differ in more than sizes."""
    seen, sizes = set(), ("pixels", "gib", "rank", "batch_size")
    for cell in grid():
        settings = {name: value for name, value in cell.settings.items() if name not in sizes}
        path = cell.kind, json.dumps(settings, sort_keys=True)
        again = "compile" in settings and "full" in settings  # it compiles the same blocks
        if path not in seen and not again:
            yield pytest.param(cell, id=cell.name)
        seen.add(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler and of torchao
@pytest.mark.parametrize("cell", [*one_of_each()])
def test_a_cell_runs_tiny_on_a_cpu(tmp_path: Path, cell: Cell) -> None:
    result = measure(cell, tmp_path, "cpu", tiny=True)
    figures = [value for value in result.values() if not isinstance(value, dict)]
    assert figures and all(value > 0 for value in figures)
    assert not list(tmp_path.iterdir())  # nothing is left


def measured_on_cuda(cell: Cell, work: Path) -> dict[str, Any]:
    stand_in(setattr)  # for the graphs of a card
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measure(cell, work, "cuda", tiny=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", [p for p in one_of_each() if not re.search("nf4|compile", str(p.id))]
)
def test_a_cell_is_rehearsed_on_pretended_cuda(
    cuda: PretendedCuda, tmp_path: Path, cell: Cell
) -> None:
    """So that its first run on a card does not die of a name. Neither nf4, as instead of
    bitsandbytes' kernels its plain Python would run, for minutes, nor what is compiled for a card.
    """
    result = cuda(measured_on_cuda, cell, tmp_path)
    assert result.pop("machine")["gpu"] == "pretended"
    assert result and all(value > 0 for value in result.values())
    if cell.kind != "ceiling":
        assert result["peak_allocated_gb"] > 0 and result["peak_reserved_gb"] > 0


def the_command(folder: Path, only: str) -> str:
    gpu.run_cell = lambda cell, options: measured_on_cuda(cell, folder)
    options = ["--work", str(folder), "--out", str(folder), "--tiny", "--only", only]
    run = CliRunner().invoke(gpu.main, [*options, "--budget-seconds", "1500"])
    assert run.exit_code == 0, run.output
    return run.output


def test_the_command_is_rehearsed_on_pretended_cuda(cuda: PretendedCuda, tmp_path: Path) -> None:
    output = cuda(the_command, tmp_path, "matrix product")
    assert output.splitlines()[-1].split()[:4] == ["matrix", "product", "bf16", "-"]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert (
        kept["machine"]["gpu"] == "pretended" and kept["cells"]["matrix product bf16"]["tflops"] > 0
    )


@pytest.mark.slow
def test_the_work_of_a_step_is_counted(tmp_path: Path) -> None:
    """Recomputing a forward pass is work too; a second sample is as much again."""
    place = gpu_cells.Place(
        base="miniature", encoders="miniature", work=tmp_path, device=torch.device("cpu"), tiny=True
    )
    flops = {}
    for batch_size, again in ((1, False), (1, True), (2, False)):
        training = gpu_cells.Training(place, 512, batch_size, gradient_checkpointing=again)
        training.stop()
        flops[batch_size, again] = training.flops
    assert 1.2 < flops[1, True] / flops[1, False] < 1.6
    assert flops[2, False] == pytest.approx(2 * flops[1, False], rel=0.02)


def test_a_batch_that_does_not_fit_is_stepped_back_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gpu_cells.ProductLoop.steps

    def steps(self: Any, num: int) -> None:
        if self.config.batch_size > 1:
            raise torch.OutOfMemoryError("planted")
        real(self, num)

    monkeypatch.setattr(gpu_cells.ProductLoop, "steps", steps)
    (cell,) = [cell for cell in grid() if cell.name == "largest LoRA 4, 512, 12 GiB"]
    assert measure(cell, tmp_path, "cpu", tiny=True)["largest_batch"] == 1


def test_it_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell(name, "ceiling", {}) for name in "abc"]
    requested: list[str] = []

    def run_cell(cell: Cell, options: list[str]) -> dict[str, Any]:
        requested.append(cell.name)
        return {"error": "planted"} if requested == ["a", "b"] else {"tflops": 1.0}

    monkeypatch.setattr(gpu, "run_cell", run_cell)
    path = tmp_path / "gpu.json"
    fill_in(cells[:2], path, [], 1e9)
    results = fill_in(cells, path, [], 1e9)  # b failed, c was never run
    assert requested == ["a", "b", "b", "c"]
    assert json.loads(path.read_text())["cells"] == results
    assert [row["TFLOP/s"] for row in rows_of(cells, results)] == [1.0] * 3
    fill_in([*cells, replace(cells[0], name="d")], path, [], budget_seconds=-1)
    assert len(requested) == 4, "no cell starts when the time is up"


@pytest.mark.slow
def test_a_cell_has_a_process_of_its_own_and_may_fail(tmp_path: Path) -> None:
    cell, options = grid()[0], ["--work", str(tmp_path), "--tiny", "--device"]
    assert run_cell(cell, [*options, "cpu"])["tflops"] > 0
    assert "finds no such device" in run_cell(cell, [*options, "cuda:99"])["error"]


def test_the_command_shows_what_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "run_cell", lambda cell, options: {"tflops": 2.0})
    options = ["--work", str(tmp_path), "--out", str(tmp_path), "--tiny", "--only", "1024, b1"]
    run = CliRunner().invoke(gpu.main, options, catch_exceptions=False)
    assert run.exit_code == 0
    names = [line.strip() for line in run.output.splitlines() if line.startswith("  LoRA 4, 1024")]
    assert len(names) == 3 and all("<=" in line for line in names)
    run = CliRunner().invoke(gpu.main, [*options[:-1], "", "--budget-seconds", "-1"])
    assert "not measured" in run.output and "run again" in run.output
