"""``generate --grid``: checkpoints, weights and guidance with the same prompts and seeds."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from click.testing import CliRunner
from drawing import check_same, differ, draw, draw_on, load, settings_of
from loras import made_lora
from PIL import Image

from cli import commands
from infer.grid import Grid, generate_grid
from infer.settings import GenerateSettings, GridAxis, LoraUse
from pages.grid import write_grid
from sdxl.lora.names import LORA

PROMPTS = ["a red circle", "a blue square --d 40 --n-images 2 --w 80 --h 48"]
AXES = (GridAxis("weight", (0, 1)), GridAxis("guidance", (2.5, 6)), GridAxis("checkpoint", ()))


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run's folder has of its checkpoints: two LoRAs that differ."""
    folder = tmp_path_factory.mktemp("run")
    for step, strength in ((2, 1.0), (10, -2.0)):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        made_lora(base, checkpoint)
        tensors = safetensors.torch.load_file(checkpoint / LORA)
        safetensors.torch.save_file(
            {name: strength * value for name, value in tensors.items()}, checkpoint / LORA
        )
    return folder


def grid_of(base: Path, run: Path, out: Path, axes: Any = AXES, **more: Any) -> Grid:
    more = {"num_steps": 2, "lora": (LoraUse(run),), **more}
    grid = generate_grid(settings_of(base, out, PROMPTS, grid=axes, **more))
    assert grid is not None
    return grid


@pytest.mark.slow
def test_each_image_is_what_generate_draws(base: Path, run: Path, tmp_path: Path) -> None:
    grid = grid_of(base, run, tmp_path / "grid")
    assert grid.columns == ["weight 0", "weight 1"]
    assert grid.rows == [f"guidance {g}, step {s}" for g in (2.5, 6) for s in (2, 10)]
    titles = [f"a red circle  (seed {11})", *(f"a blue square  (seed {seed})" for seed in (40, 41))]
    assert [block.title for block in grid.blocks] == titles
    assert (grid.num_generated, grid.num_kept) == (24, 0)
    for column, weight in enumerate((0, 1)):
        for row, (scale, step) in enumerate((g, s) for g in (2.5, 6) for s in (2, 10)):
            drawn = [load(block.images[row][column]) for block in grid.blocks]
            checkpoint = run / "checkpoints" / f"checkpoint-{step}"
            plain = draw(
                base,
                tmp_path / f"{weight}-{scale}-{step}",
                PROMPTS,
                num_steps=2,
                guidance_scale=scale,
                lora=(LoraUse(checkpoint, weight),),
            )
            assert differ(drawn, plain) <= 1e-2  # in levels: batches differ
    blocks = [[[load(path) for path in row] for row in block.images] for block in grid.blocks]
    images = blocks[0]
    assert differ([images[0][1]], [images[1][1]]) > 0.1  # checkpoints
    assert differ([images[0][1]], [images[2][1]]) > 0.1  # guidance
    check_same([images[0][0]], [images[1][0]])  # at weight 0 checkpoints are one


def test_a_grid_that_grows_draws_what_is_new(base: Path, run: Path, tmp_path: Path) -> None:
    axes = [GridAxis("checkpoint", (10,)), GridAxis("guidance", (3,))]
    first = grid_of(base, run, tmp_path / "grid", axes)
    assert (first.num_generated, first.rows) == (3, ["guidance 3"])
    before = first.sheet.read_bytes()
    again = grid_of(base, run, tmp_path / "grid", axes)
    assert (again.num_generated, again.num_kept) == (0, 3)
    assert again.sheet.read_bytes() == before
    more = grid_of(base, run, tmp_path / "grid", [GridAxis("checkpoint", ()), axes[1]])
    assert (more.num_generated, more.num_kept) == (3, 3)
    with Image.open(more.sheet) as sheet:  # two columns of 64 pixels, three prompts
        assert sheet.width > 2 * 64 and sheet.height > 64 + 2 * 38
    assert grid_of(base, run, tmp_path / "alone", [axes[0]]).rows == [""]


def test_the_command_writes_a_page_and_replaces_nothing_of_others(
    base: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["generate", "--base", base, "--lora", run, "--prompt", "a <b>red</b> circle"]
    words += ["--num-steps", 2, "--size", 64, "--device", "cpu", "--out", out]
    words += ["--grid", "checkpoint=10,2", "--grid", "weight=0.5"]
    result = CliRunner().invoke(commands, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert f"2 images drawn, 0 kept, in {out}" in result.output
    html = (out / "grid.html").read_text()
    assert len(re.findall("<img ", html)) == 2 and "a &lt;b&gt;red" in html
    assert "step 10, weight 0.5: " in html and str(tmp_path) not in html
    for name in ("grid.html", "grid.png"):
        shutil.copy(out / name, tmp_path / name)
        other = b"<html>mine" if name.endswith("html") else b"mine"
        (out / name).write_bytes(other)
        refused = CliRunner().invoke(commands, list(map(str, words)))
        assert refused.exit_code == 2 and f"{name}: " in refused.output
        assert (out / name).read_bytes() == other
        shutil.copy(tmp_path / name, out / name)


@pytest.mark.parametrize(
    ("axes", "more", "words"),
    [
        (["weight=0,1"], {}, "--grid weight: needs one --lora, not 0"),
        (["checkpoint"], {}, "--grid checkpoint: needs the run"),
        (["guidance=3", "guidance=4"], {}, "an axis is given twice"),
        (["guidance=3"], {"compare": True, "lora": (LoraUse(Path("x")),)}, "--compare does not go"),
        (["guidance=3"], {"num_images": 2}, "--num-images does not go"),
        (["guidance=3"], {"format": "coco"}, "--format coco does not go"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, axes: list[str], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        settings_of(
            tmp_path, tmp_path / "x", PROMPTS, grid=tuple(map(GridAxis.parse, axes)), **more
        )


@pytest.mark.parametrize(
    "text",
    [
        *("", "seed=1", "weight", "weight=", "weight=a", "weight=1,1", "weight=nan"),
        *("guidance=-1", "guidance=1e999", "checkpoint=1.5", "checkpoint=last"),
    ],
)
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(ValueError, match=r"axis|numbers|finite|at least 0"):
        GridAxis.parse(text)


def test_axes_that_a_run_does_not_have(base: Path, run: Path, tmp_path: Path) -> None:
    for axes, words in (
        ([GridAxis("checkpoint", (3,))], "has no checkpoint-3; it has 2, 10"),
        ([GridAxis("guidance", tuple(map(float, range(1000))))], "has 3,000 images; at most 2,000"),
    ):
        with pytest.raises(ValueError, match=words):
            grid_of(base, run, tmp_path / "x", axes)
    with pytest.raises(ValueError, match="has no checkpoints; --grid checkpoint needs a run"):
        grid_of(base, run / "checkpoints" / "checkpoint-2", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_values_that_are_alike_have_folders_of_their_own(base: Path, run: Path) -> None:
    axis = GridAxis.parse("weight=0.1234567,0.12345671,1")
    assert str(axis) == "weight=0.1234567,0.12345671,1"
    with pytest.raises(ValueError, match="lies in the checkpoints of a run"):
        (run / "metrics.jsonl").write_text("")
        GenerateSettings(base="miniature", out=run / "checkpoints" / "x", prompt="a").check_inputs()


def test_a_damaged_image_is_noted_on_the_page(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    row = [tmp_path / "a.png", tmp_path / "b.png"]
    html = write_grid(tmp_path / "grid.html", ["1", "2"], [""], [("x", [row])]).read_text()
    assert html.count("<img ") == 1 and "b.png cannot be read" in html


@pytest.mark.slow
def test_any_number_of_processes_draws_the_same(base: Path, run: Path, tmp_path: Path) -> None:
    alone = grid_of(base, run, tmp_path / "1", batch_size=1)
    more: dict[str, Any] = {"num_steps": 2, "lora": (LoraUse(run),), "batch_size": 1}
    settings = settings_of(base, tmp_path / "2", PROMPTS, grid=AXES, **more)
    draw_on(settings, 2, generate_grid)
    for block in alone.blocks:
        for row in block.images:
            same = [tmp_path / "2" / path.relative_to(tmp_path / "1") for path in row]
            check_same([load(path) for path in row], [load(path) for path in same])
    assert (tmp_path / "2" / "grid.png").read_bytes() == alone.sheet.read_bytes()
