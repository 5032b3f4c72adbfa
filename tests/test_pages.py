"""The pages of runs: what stands in them, what never does, and runs that are damaged."""

import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from run_folders import (
    draw_sheet,
    eval_at,
    make_run,
    train_row,
    write_metrics,
    write_settings,
)

import cli
import cli_pages
import pages.images
import train.run_folder
from pages.compare import write_comparison
from pages.curves import MOST_POINTS, Line, draw_chart, smoothed
from pages.images import embed_images, thinned
from pages.report import REPORT, write_report
from pages.run_files import Series, read_run
from pages.settings import command_line, describe_settings
from runtime.options import StageCommand
from train.config import TrainConfig
from train.option_values import CacheUse, Every

ROOT = Path(__file__).parent.parent
TRAIN = cli.commands.commands["train"]
assert isinstance(TRAIN, StageCommand)
VOID = {"br", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A page's elements, and its text outside of styles and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text = html, ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []  # of all tables, row by row
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(run: Path) -> Page:
    return Page(write_report(run, None, TRAIN).read_text())


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, [*map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line of a command that ends with exit code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make_run(tmp_path_factory.mktemp("runs") / "cats")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


@pytest.fixture(scope="module")
def comparison(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("compared")
    other = make_run(folder / "other" / "cats", lr=3e-3, lr_schedule="cosine", caches=["dogs"])
    return Page(write_comparison([run, other], folder / "page.html", TRAIN).read_text())


@pytest.mark.parametrize("name", ["page", "comparison"])
def test_a_page_needs_no_network_and_is_whole(name: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(name)
    assert "http:" not in page.html and "https:" not in page.html and "//" not in page.text
    for tag, attributes in page.elements:
        for attribute, value in attributes.items():
            if attribute in ("src", "srcset", "href", "data", "poster", "action"):
                assert re.match("data:|#", value or ""), (tag, attribute, value)
            assert not attribute.startswith("on"), (tag, attribute)
    assert all("src" not in script for script in page.all("script"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for attribute in ("aria-labelledby", "for"):
            assert attributes.get(attribute) in (None, *ids)
        assert attributes.get("href", "#")[:1] != "#" or attributes.get("href", "#")[1:] in (
            "",
            *ids,
        )
    used = re.findall(r"url\(#([^)]*)\)", page.html)
    assert used and set(used) <= set(ids)
    assert "prefers-color-scheme: dark" in page.html
    assert len(page.all("figure")) >= 5 and len(page.all("h1")) == 1
    assert [html["lang"] for html in page.all("html")] == ["en"]


def test_charts_take_their_colors_from_the_page(page: Page) -> None:
    svgs = re.findall("<svg viewBox.*?</svg>", page.html, re.DOTALL)
    charts = [svg for svg in svgs if "step</text>" in svg]
    assert len(charts) == 5
    for svg in charts:
        assert "var(--c" in svg and "var(--ink)" in svg and "a0a1" not in svg
        # matplotlib's own black and white would vanish on one of the two backgrounds
        colors = re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)
        assert {color for color in colors if color != "none"} <= {
            *(f"var(--c{n})" for n in range(8)),
            "var(--ink)",
            "var(--line)",
        }


def test_the_numbers_are_those_of_the_metrics(page: Page, run: Path) -> None:
    for step in range(0, 145, 36):
        (row,) = [row for row in page.cells if len(row) == 3 and row[0] == str(step)]
        assert row[2] == f"{eval_at(step):.4g}"
    assert "best: checkpoint-108 (eval 0.1)" in page.text
    assert ["checkpoint-108 (best)", "0.1", "--checkpoint-every"] in page.cells
    assert ["checkpoint-72", f"{eval_at(72):.4g}", "--checkpoint-every"] in page.cells
    assert "finished: all of its 144 steps" in page.text
    assert "1 skipped step" in page.text and "charts): 50." in page.text
    assert "1.50 GB" in page.text and "1% of the time spent waiting" in page.text
    assert ["140", "0.02", "0.05", "0.1", "0.2"] in page.cells
    words = "generate --base miniature --lora cats/checkpoints/checkpoint-108 --prompt TEXT"
    assert words in page.text


def test_the_sheets_are_in_the_page_by_step(page: Page) -> None:
    steps = [f["data-step"] for f in page.all("figure") if "data-step" in f]
    assert steps == ["36", "72", "108", "144"]
    images = page.all("img")
    assert len(images) == 4 and all(image["alt"] for image in images)
    assert len({image["src"] for image in images}) == 4
    (slider,) = [field for field in page.all("input") if field["type"] == "range"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "3", "3")


def table(page: Page, name: str) -> list[list[str]]:
    """The rows of one table below its head."""
    return Page(page.html.split(f'<table id="{name}">')[1].split("</table>")[0]).cells[1:]


def test_settings_that_differ_from_their_defaults(page: Page) -> None:
    # alpha, rank and targets stand in config.json too, and are what this run would have had
    assert table(page, "changed") == [
        ["--epochs", "16", "none"],
        ["--lr", "0.001", "0.0001"],
        ["--batch-size", "8", "1"],
        ["--min-snr-gamma", "5", "none"],
        ["--ema", "0.99", "0"],
        ["--eval-every", "2ep", "0"],
        ["--resume", "on", "off"],
    ]
    assert ["--alpha", "32", "Adapter"] in page.cells
    assert ["steps_per_epoch", "9", "follows from the others"] in page.cells


COMMANDS: dict[str, dict[str, Any]] = {
    "least": {"steps": 5},
    "rank": {"epochs": 2.5, "rank": 16},
    "prodigy": {"steps": 5, "optimizer": "prodigy"},
    "init": {"steps": 5, "init_lora": Path("start.safetensors")},
    "full": {"steps": 5, "full": True, "pure_bf16": True, "fused_backward": True},
    "switches": {"steps": 5, "zero_terminal_snr": False, "warm_up": True, "resume": True},
    "values": {
        "steps": 5,
        "alpha": 7.5,
        "targets": "(to_q|to k)$",
        "timesteps": "logit-normal",
        "logit_mean": -0.5,
        "timestep_range": (10, 500),
        "checkpoint_at": (3, 4),
        "checkpoint_every": Every(0.5, True),
        "caches": (CacheUse(Path("a cat's")), CacheUse(Path("-b"), 0.5, 3)),
    },
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_gives_the_settings_again(name: str) -> None:
    given = {"caches": (CacheUse(Path("cache")),), "base": "b", "out": Path("o"), **COMMANDS[name]}
    config = TrainConfig(**given)
    values = {key: train.run_folder._plain(value) for key, value in config.resolved().items()}
    values = json.loads(json.dumps(values))
    words = shlex.split(" ".join(command_line(values, TRAIN)))
    assert words[:3] == ["python", "cli.py", "train"]
    with TRAIN.make_context("train", words[3:]) as context:
        again = TRAIN.make_settings(context, context.params, None).resolved()
    expected = {**config.resolved(), "resume": False}
    if name == "values":  # what looks like an option
        assert str(again["caches"][1]) == "./-b,weight=0.5,repeats=3".replace("./", "")
    assert again == expected
    differing = {setting.name for setting in describe_settings(values, TRAIN) if setting.differs}
    assert differing == set(COMMANDS[name]) - {"caches"}


def test_text_of_users_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run(
        tmp_path / "<img src=x onerror=alert(1)>",
        base=evil,
        caches=["</code><b>", "--overwrite", "$(touch x)"],
        targets="a\u202eb",
    )
    settings = json.loads((run / "config.json").read_text())
    del settings["digest"]  # which nobody can make of half a character
    (run / "config.json").write_text(json.dumps({**settings, "wandb_project": ["<i>", "\ud800"]}))
    shutil.copytree(run, tmp_path / "2" / run.name)
    compared = write_comparison([run, tmp_path / "2" / run.name], tmp_path / "c.html", TRAIN)
    for page in (page_of(run), Page(compared.read_text())):
        assert len(page.all("script")) <= 1 and "alert" not in str(page.all("script"))
        assert not page.all("b") and not page.all("i")
        assert all("onerror" not in image for image in page.all("img"))
        assert "\u202e" not in page.html and run.name in page.text
    page = page_of(run)
    assert evil in page.text and "a\\u202eb" in page.text
    assert "'$(touch x)'" in page.text and "./--overwrite" in page.text


def test_nothing_private_stands_in_a_page(page: Page, comparison: Page, run: Path) -> None:
    for html in (page.html, comparison.html):
        assert run.name in html and str(run.parent) not in html and run.parent.name not in html


def test_a_comparison(comparison: Page) -> None:
    lr, schedule = ["--lr", "0.001", "0.003"], ["--lr-schedule", "not known", "cosine"]
    caches = ["caches", "cats,repeats=10, prior,weight=0.5", "dogs"]
    assert table(comparison, "differences-table") == [caches, lr, schedule]
    first, second = table(comparison, "results-table")
    assert first[:3] == ["cats (1)", "checkpoint-108 (eval 0.1), the lowest of all", "0.1"]
    assert second[0] == "cats (2)"
    assert "The runs differ in caches: their eval losses may answer different" in comparison.text
    rows = [row for row in comparison.cells if row[:1] == ["36"] and len(row) == 3]
    assert rows[0] == ["36", f"{eval_at(36):.4g}", f"{eval_at(36):.4g}"]


def damage_metrics(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[20] = lines[20][:15]
    lines[30] = '{"step": "x", "train/loss": 1}'
    lines[40] = '{"step": 39, "train/loss": "high"}'
    lines[41] = "[" * 250_000
    path.write_text("\n".join(lines)[:-5])


def without_evals(run: Path) -> None:
    write_metrics(run, [train_row(step) for step in range(1, 20)])


def without_numbers(run: Path) -> None:
    rows = [{**train_row(n), "train/loss": None, "train/grad_norm": None} for n in range(1, 20)]
    write_metrics(run, rows)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "train/loss": NaN, "train/lr": 1e999}\n')


DAMAGES: dict[str, tuple[Any, str]] = {
    "lines": (damage_metrics, "5 lines of metrics.jsonl are damaged and left out."),
    "no evals": (without_evals, "19 of 144 steps: still running, or stopped"),
    "nothing finite": (without_numbers, "20 of 144 steps"),
    "no rows": (lambda run: write_metrics(run, []), "The run has no metrics yet."),
    "no metrics": (
        lambda run: (run / "metrics.jsonl").unlink(),
        "metrics.jsonl is missing, so there are no curves.",
    ),
    "settings": (
        lambda run: (run / "config.json").write_text('{"steps_per_epoch": 9, "digest": "0"}'),
        "config.json is damaged, so no settings are shown.",
    ),
    "other types": (
        lambda run: write_settings(run, num_steps="many", caches={"a": [1]}, lr=[], rank=True),
        "144 steps done",
    ),
    "a preview": (
        lambda run: (run / "previews" / "step-000072.png").write_bytes(b"\x89PNG\r\n\x1a\nxx"),
        "step-000072.png cannot be read (UnidentifiedImageError), and is left out.",
    ),
    "half a preview": (
        lambda run: cut(run / "previews" / "step-000072.png"),
        "step-000072.png cannot be read (OSError), and is left out.",
    ),
    "no previews": (lambda run: shutil.rmtree(run / "previews"), "best: checkpoint-108"),
    "a checkpoint": (
        lambda run: cut(run / "checkpoints" / "checkpoint-108" / "state.json"),
        "its state.json is damaged",
    ),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "There are none."),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_costs_itself_alone(name: str, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "cats")
    damage, words = DAMAGES[name]
    damage(copy)
    page = page_of(copy)
    assert words in page.text
    assert ("best: checkpoint" in page.text) == (name != "no checkpoints")
    if name == "a checkpoint":
        assert f"best: checkpoint-72 (eval {eval_at(72):.4g})" in page.text
    num_images = {"a preview": 3, "half a preview": 3, "no previews": 0}.get(name, 4)
    assert len(page.all("img")) == num_images


def test_the_later_row_of_a_step_counts(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "cats")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 36, "eval/loss": 0.011}\n')
    series = read_run(copy).series("eval/loss")
    assert series.steps.tolist() == [0, 36, 72, 108, 144] and series.values[1] == 0.011


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    assert "nowhere: no such folder" in refused("report", tmp_path / "nowhere")
    assert "give the run's folder" in refused("report", run / "metrics.jsonl")
    assert "no run of shardtune" in refused("report", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no run of shardtune" in refused("report", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_text("{}")
    assert f"a cache, not a run; `python cli.py inspect {tmp_path}`" in refused("report", tmp_path)
    assert "give 2 to 32 runs" in refused("compare", run, "--out", tmp_path / "page.html")
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for command in (["report", run], ["compare", run, run]):
        assert "not written by shardtune" in refused(*command, "--out", notes)
        assert "a folder; name a file" in refused(*command, "--out", tmp_path)
    assert notes.read_text() == "mine"


def test_the_commands_write_and_replace_their_pages(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    for _ in range(2):
        result = invoke("report", run, "--out", out)
        assert result.output == f"{out}: open it in a browser\n" and not result.exit_code
    assert "best: checkpoint-108" in Page(out.read_text()).text
    result = invoke("compare", run, run, "--out", out)
    assert not result.exit_code and "2 runs compared" in Page(out.read_text()).text


def test_without_the_packages_a_line_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = cli_pages.find_spec
    monkeypatch.setattr(
        cli_pages, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert "pages need matplotlib: pip install '.[pages]'" in refused("report", run)
    copy = shutil.copytree(run, tmp_path / "cats")
    (copy / REPORT).unlink(missing_ok=True)
    cli_pages.report_at_end(copy, TRAIN)
    assert not (copy / REPORT).exists() and not capsys.readouterr().out
    monkeypatch.undo()
    cli_pages.report_at_end(copy, TRAIN)
    assert (copy / REPORT).exists() and capsys.readouterr().out.startswith(f"{copy / REPORT}: ")
    (copy / REPORT).write_text("of the user")
    cli_pages.report_at_end(copy, TRAIN)
    error = capsys.readouterr().err
    assert error.startswith("Warning: the run's page is not written") and "Traceback" not in error


def test_a_page_is_written_at_checkpoints_beside_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "cats")
    (copy / REPORT).unlink(missing_ok=True)
    clock = [0.0]
    monkeypatch.setattr(cli_pages.time, "monotonic", lambda: clock[0])
    with cli_pages.CheckpointPages(copy) as write_page:
        write_page()  # a run that is over within a minute needs none in between
        assert write_page._process is None
        clock[0] = 61
        write_page()
        first = write_page._process
        write_page()  # while that one is at work
        assert first is not None and write_page._process is first
        assert first.wait(60) == 0
        assert "best: checkpoint-108" in Page((copy / REPORT).read_text()).text
        write_page()  # within the same minute
        assert write_page._process is first
        clock[0] = 130
        write_page()
        second = write_page._process
        assert second is not None and second is not first
    assert second.returncode is not None, "ended with the run"


def test_the_trainer_knows_the_name_of_the_page() -> None:
    assert train.run_folder.REPORT == REPORT and REPORT in train.run_folder.ENTRIES


def test_a_page_is_drawn_without_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys, cli\n"
        f"try: cli.commands(['report', {str(run)!r}, '--out', {str(tmp_path / 'p.html')!r}])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert not {'torch', 'diffusers', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_smoothing_is_the_plain_average_of_what_came_before() -> None:
    rng = np.random.default_rng(1)
    steps, values = np.arange(1.0, 91.0), rng.normal(size=90)
    values[[4, 50]] = np.nan
    result, over = smoothed(Series(steps, values))
    kept = [
        (step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)
    ]
    span = len(kept) / 15
    decay = 1 - 2 / (span + 1)
    assert over == pytest.approx(span * 89 / 87) and result.steps.tolist() == [s for s, _ in kept]
    for number in (0, 1, 40, 87):
        weights = [decay ** (number - k) for k in range(number + 1)]
        mean = sum(w * kept[k][1] for k, w in enumerate(weights)) / sum(weights)
        assert result.values[number] == pytest.approx(mean)


def test_many_steps_are_a_band_from_least_to_most_around_their_average() -> None:
    num = 50 * MOST_POINTS
    steps, rng = np.arange(1.0, num + 1), np.random.default_rng(1)
    series = Series(steps, np.sin(steps / num) + rng.normal(size=num) / 10)
    line, _ = smoothed(series)
    assert len(line) == MOST_POINTS
    assert np.abs(line.values[100:] - np.sin(line.steps[100:] / num)).max() < 0.1
    chart = draw_chart("Loss", "", [Line("loss", line, raw=series)])
    few = draw_chart("Loss", "", [Line("loss", line)])
    assert chart is not None and few is not None
    assert len(few.svg) < len(chart.svg) < 100_000
    assert chart.notes == []
    series.values[::1000] = 50
    chart = draw_chart("Loss", "", [Line("loss", line, raw=series)])
    assert chart is not None and "300 of the single steps lie" in chart.notes[0]  # a hundredth


def test_a_logarithmic_axis_where_values_are_far_apart() -> None:
    steps = np.arange(1.0, 20.0)
    for values, words in ((10.0**-steps, ["The axis is logarithmic."]), (steps, []), (-steps, [])):
        chart = draw_chart("Loss", "", [Line("loss", Series(steps, values))])
        assert chart is not None and chart.notes == words
    assert draw_chart("Loss", "", [Line("loss", Series(steps, steps * np.nan))]) is None


def test_many_large_previews_make_a_bounded_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(0).randbytes(300 * 200 * 3)
    paths = [tmp_path / f"step-{step:06d}.png" for step in range(60)]
    Image.frombytes("RGB", (300, 200), noise).save(paths[0], compress_level=0)
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    monkeypatch.setattr(pages.images, "MAX_BYTES", 200_000)
    embedded, notes = embed_images(paths)
    assert notes == ["40 of 60 previews are shown, evenly spaced."]
    assert paths[0] in embedded and paths[-1] in embedded and len(embedded) == 40
    size = sum(len(image.uri) for image in embedded.values())
    assert 100_000 < size < 200_000 * 4 / 3 + 40 * 40
    assert thinned(range(5), 9) == [0, 1, 2, 3, 4] and thinned(range(9), 3) == [0, 4, 8]
    draw_sheet(paths[0], 3)
    assert embed_images(paths[:1])[0][paths[0]].uri.startswith("data:image/png;base64,")


@pytest.mark.slow
def test_a_million_steps_take_bounded_time(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "cats")
    write_metrics(copy, [train_row(step) for step in range(1, 1_000_001)])
    start = time.process_time()
    page = page_of(copy)
    assert time.process_time() - start < 60
    assert "1,000,000" in page.text and len(page.html) < 1_500_000


def test_a_file_of_the_user_is_no_page_of_the_run(tmp_path: Path) -> None:
    """Also where --overwrite asks what belongs to the run."""
    run = make_run(tmp_path / "run", 36)
    page = run / "report.html"
    page.write_text("<html>mine</html>")
    assert page not in train.run_folder.run_entries(run)
    with pytest.raises(ValueError, match="not written by shardtune"):
        write_report(run, None, TRAIN)
    page.unlink()
    assert write_report(run, None, TRAIN) == page and page in train.run_folder.run_entries(run)
