"""Pages in a browser, where there is one: no error, no request, the slider shows what it says."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from run_folders import make_run

import cli
from pages.compare import write_comparison
from pages.grid import write_grid
from pages.report import write_report
from runtime.options import StageCommand
from train.evaluation import Evaluation, write_evaluation

TRAIN = cli.commands.commands["train"]
assert isinstance(TRAIN, StageCommand)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
)
# What the page shows at first, and with the slider at its start; how wide it and its images are.
PROBE = """<script>
addEventListener("load", () => {
  const figures = [...document.querySelectorAll("#sheets > figure")];
  const shown = () => figures.filter(f => f.offsetHeight > 0).map(f => f.dataset.step);
  const slider = document.getElementById("step");
  const result = {first: shown()};
  if (slider) {
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    result.moved = [...shown(), document.getElementById("shown").textContent];
  }
  result.widths = [...document.images].map(image => image.naturalWidth);
  const charts = [...document.querySelectorAll("figure > svg")];
  result.charts = charts.map(svg => svg.getBoundingClientRect().width > 200);
  result.colors = charts.map(svg => getComputedStyle(svg.querySelector("text")).fill);
  result.overflow = document.documentElement.scrollWidth - innerWidth;
  document.title = JSON.stringify(result);
});
</script>"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> str:
    paths = [path for name in NAMES if (path := shutil.which(name))]
    if not paths:
        pytest.skip("no Chromium is installed")
    return paths[0]


def open_page(browser: str, page: Path, work: Path, width: int) -> dict[str, Any]:
    """What PROBE finds. Fails on a message in the console, and on a request."""
    probed = work / f"{page.stem}-probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    log = work / "network.json"
    command = [browser, *QUIET, f"--user-data-dir={work / 'profile'}", f"--log-net-log={log}"]
    command += [
        f"--window-size={width},900",
        "--enable-logging=stderr",
        "--virtual-time-budget=9000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=180
    )
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not messages
    requests = re.findall(r'"initiator":"([^"]*)".*?"url":"(https?:[^"]*)"', log.read_text())
    assert not [url for who, url in requests if who != "not an origin"]  # which is the browser
    result: dict[str, Any] = json.loads(
        re.findall("<title>(.*?)</title>", done.stdout)[0].replace("&quot;", '"')
    )
    return result


@pytest.mark.parametrize("width", [1280, 500])  # headless windows are not narrower
def test_pages_in_a_browser(browser: str, tmp_path: Path, width: int) -> None:
    run = make_run(tmp_path / "cats")
    losses = {f"{number:020x}": number / 30 for number in range(30)}
    write_evaluation(run, 36, Evaluation(0.1, losses, "0" * 64))
    result = open_page(browser, write_report(run, None, TRAIN), tmp_path, width)
    assert result["first"] == ["144"] and result["moved"] == ["36", "36"]
    assert result["widths"] == [512] * 4
    assert result["charts"] == [True] * 5 and result["overflow"] <= 0
    assert result["colors"] == ["rgb(34, 38, 43)"] * 5  # not matplotlib's stand-ins
    sheets = sorted((run / "previews").glob("*.png"))[:2]
    grid = ["weight 0.5", "weight 1"], ["step 2", "step 4"], [("a cat", [sheets, sheets])]
    result = open_page(browser, write_grid(tmp_path / "grid.html", *grid), tmp_path, width)
    assert result["widths"] == [512] * 4 and result["overflow"] <= 0
    page = write_comparison([run, run], tmp_path / "compared.html", TRAIN)
    result = open_page(browser, page, tmp_path, width)
    assert result["charts"] == [True] * 5 and result["overflow"] <= 0
