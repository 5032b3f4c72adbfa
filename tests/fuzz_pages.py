"""Damaged folders of runs, as the pages read them: what is damaged in them is left out."""

import json
import random
import shutil
from pathlib import Path

from PIL import Image, PngImagePlugin

import cli
from pages.compare import comparison_page
from pages.report import report_page, status_of
from pages.run_files import read_run
from pages.settings import command_line, describe_settings, other_values
from runtime.files import remove_path
from runtime.options import StageCommand
from sdxl.contact_sheet import KEY, contact_sheet, read_sheet, sheet_record
from tests.fuzz_runs import sealed
from tests.mutations import Try, damage, damaged_json, ending, forge, json_text
from tests.run_folders import SETTINGS, eval_at, make_run


def fuzz_page(work: Path, base: Path) -> Try:
    """``config.json``, ``metrics.jsonl``, ``state.json`` and previews of a run; one in ten of them
    is drawn too."""
    command = cli.commands.commands["train"]
    assert isinstance(command, StageCommand)
    intact, run = make_run(work / "whole", 72), work / "run"
    rows = [json.loads(line) for line in (intact / "metrics.jsonl").read_text().splitlines()]
    state = {"step": 36, "kind": "every", "eval_loss": eval_at(36)}

    def try_one(rng: random.Random) -> str:
        remove_path(run)
        shutil.copytree(intact, run)
        (run / "config.json").write_bytes(sealed(rng, SETTINGS))
        texts = [json_text(forge(rng, row) if rng.random() < 0.05 else row) for row in rows]
        text = "\n".join(texts).encode()
        (run / "metrics.jsonl").write_bytes(damage(rng, text) if rng.random() < 0.3 else text)
        for number in (36, 72):
            path = run / "checkpoints" / f"checkpoint-{number}" / "state.json"
            path.write_bytes(sealed(rng, state) if rng.random() < 0.5 else damaged_json(rng, state))
        for path in sorted((run / "previews").iterdir()):
            path.write_bytes(damage(rng, path.read_bytes()))
        if rng.random() < 0.25:
            for name in ("metrics.jsonl", "config.json", "checkpoints"):
                remove_path(run / name)

        def read() -> None:
            files = read_run(run)
            status_of(files)
            describe_settings(files.settings, command)
            other_values(files.settings, command)
            command_line(files.settings, command)
            if rng.random() < 0.1:
                report_page(files, command)
                comparison_page([files, files], command)

        return ending(read, run)

    return try_one


def fuzz_sheet(work: Path, base: Path) -> Try:
    """The record in a sheet of previews, by which ``push`` cuts it apart, and the sheet's bytes."""
    images = [(Image.new("RGB", size, "red"), f"prompt {size}") for size in ((9, 20), (20, 9))]
    path = work / "sheet.png"

    def try_one(rng: random.Random) -> str:
        sheet, info = contact_sheet(images, 24), sheet_record(images, 24)
        if rng.random() < 0.6:
            info = PngImagePlugin.PngInfo()
            record = {"tile": 24, "title": False, "images": [[11, 24, "a"], [24, 11, "b"]]}
            text = damaged_json(rng, record) if rng.random() < 0.3 else None
            text = json_text(forge(rng, record)).encode() if text is None else text
            info.add_text(KEY, text.decode("latin-1"), zip=rng.random() < 0.5)
        sheet.save(path, pnginfo=info)
        if rng.random() < 0.4:
            path.write_bytes(damage(rng, path.read_bytes()))
        return ending(lambda: read_sheet(path), path)

    return try_one
