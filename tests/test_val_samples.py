"""The losses of validation samples: what a run keeps of them, and how its page shows them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folders import eval_at, make_run
from runs import at_step, run, sample_losses, stop_by
from test_pages import TRAIN, Page, invoke, page_of, refused

import train.evaluation
from pages.report import write_report
from runtime.files import canonical_json, seal
from runtime.signals import Stopped
from shards.reader import Cache
from train.evaluation import EVALS, Evaluation, cut_evaluations, write_evaluation
from train.option_values import Every
from train.saved_options import recall_val


def keys_of(cache: Path) -> list[str]:
    shards = Cache(cache).shards()
    return [shard.index.key(row) for shard in shards for row in range(len(shard.index))]


def evaluated(folder: Path, cache: Path, *losses: list[float], step: int = 36) -> Path:
    """A run with evaluations ``step`` steps apart, whose losses are of the cache's samples."""
    made = make_run(folder, 36 * len(losses))
    keys = keys_of(cache)
    for number, values in enumerate(losses):
        samples = dict(zip(keys, values, strict=False))
        data = Cache(cache).data_digest
        write_evaluation(made, step * number, Evaluation(0.1, samples, data))
    return made


def cards(page: Page) -> list[str]:
    """The HTML of each sample, in order."""
    return [
        card.split("</li>")[0]
        for part in page.html.split('<ul class="cards">')[1:]
        for card in part.split("</ul>")[0].split("<li>")[1:]
    ]


@pytest.fixture
def val(split_cache: Path) -> Path:
    return split_cache / "val"


def test_samples_stand_by_their_loss_with_image_and_caption(val: Path, tmp_path: Path) -> None:
    keys = keys_of(val)
    first, last = [0.3, 0.25, 0.2], [0.2, float("nan"), 0.5]
    made = evaluated(tmp_path / "cats", val, first, [9.0] * 3, last)
    result = invoke("report", made, "--val", val.parent)
    assert not result.exit_code, result.output
    page = Page((made / "report.html").read_text())
    shown = cards(page)
    order = [1, 2, 0, 1, 2]  # the highest, then those that got worse most
    assert [keys[number] in card for number, card in zip(order, shown, strict=True)] == [True] * 5
    for number, text in zip((0, 1, 2, 3), ("not finite", "0.5", "0.2", "not finite"), strict=True):
        assert f"<strong>{text}</strong>" in shown[number]
    assert "0.2 at step 0" in shown[1] and "after step 72, of 3" in page.text
    fields = {
        shard.index.key(row): shard.metadata(row)
        for shard in Cache(val).shards()
        for row in range(len(shard.index))
    }
    for number, card in zip(order, shown, strict=True):
        expected = fields[keys[number]]
        assert expected["path"] in card and expected["captions"][0].strip() in card
        assert 'src="data:image/webp;base64,' in card
    assert "The validation cache" not in page.text
    assert str(val) not in page.html and str(tmp_path) not in page.html


def forget(run: Path, val: Path) -> Path | None:
    return None


def moved(run: Path, val: Path) -> Path | None:
    return val / "moved"


def other_data(run: Path, val: Path) -> Path | None:
    for path in (run / EVALS).iterdir():
        fields = json.loads(path.read_text())
        path.write_text(canonical_json(seal({**fields, "val": "0" * 64})))
    return val


def damaged_shard(run: Path, val: Path) -> Path | None:
    copy = shutil.copytree(val, run.parent / "val")
    for path in copy.glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[len(data) // 4 : -len(data) // 4] = bytes(len(data[len(data) // 4 : -len(data) // 4]))
        path.write_bytes(data)
    return copy


def no_shard(run: Path, val: Path) -> Path | None:
    copy = shutil.copytree(val, run.parent / "val")
    for path in copy.glob("*.tar"):
        path.unlink()
    return copy


def no_manifest(run: Path, val: Path) -> Path | None:
    copy = shutil.copytree(val, run.parent / "val")
    (copy / "manifest.json").write_text("{")
    return copy


def damaged_last(run: Path, val: Path) -> Path | None:
    path = run / EVALS / "step-000036.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    return val


def damaged_all(run: Path, val: Path) -> Path | None:
    for path in (run / EVALS).iterdir():
        path.write_bytes(b"[" * 100_000)
    return val


def other_fields(run: Path, val: Path) -> Path | None:
    for path in (run / EVALS).iterdir():
        path.write_text(canonical_json(seal({"step": 1, "losses": {"a": "high"}})))
    return val


LACKS: dict[str, tuple[Any, str, int]] = {
    "not known": (forget, "validation cache is not known on this machine, so samples", 4),
    "moved": (moved, "The validation cache is not where it was, so samples", 4),
    "other data": (other_data, "changed since the last evaluation: images and captions", 4),
    "damaged shard": (damaged_shard, "the validation cache cannot be read; `python cli.py ver", 4),
    "no shard": (no_shard, "The validation cache is damaged; `python cli.py verify`", 4),
    "no manifest": (no_manifest, "The validation cache cannot be read, so samples", 4),
    "damaged last": (damaged_last, "evals/step-000036.json is damaged, and is left out.", 2),
    "damaged all": (damaged_all, "The losses of single samples cannot be read.", 0),
    "other fields": (other_fields, "The losses of single samples cannot be read.", 0),
    "earlier": (
        lambda run, _: shutil.rmtree(run / EVALS),
        "The losses of single samples were not kept: the run is of an earlier version.",
        0,
    ),
}


@pytest.mark.parametrize("name", LACKS)
def test_what_is_missing_is_said_and_costs_itself_alone(
    name: str, val: Path, tmp_path: Path
) -> None:
    made = evaluated(tmp_path / "cats", val, [0.2, 0.4], [0.5, 0.5])
    lack, words, num = LACKS[name]
    cache = lack(made, val)
    page = Page(write_report(made, None, TRAIN, cache).read_text())
    assert words in page.text and len(cards(page)) == num
    assert "best: checkpoint-72" in page.text and str(tmp_path) not in page.html
    if name == "damaged last":
        assert "after step 0, of 2" in page.text


def test_a_run_without_validation_has_a_page(tmp_path: Path) -> None:
    made = make_run(tmp_path / "cats", 36)
    (made / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.1}\n')
    assert "The run has no validation cache, or was not evaluated yet." in page_of(made).text
    assert "no such folder" in refused("report", made, "--val", tmp_path / "nowhere")
    assert "a run of train" in refused("report", made, "--val", made)


def test_files_are_bounded_and_the_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.evaluation, "NUM_KEPT", 3)
    monkeypatch.setattr(train.evaluation, "MAX_SAMPLES", 2)
    samples = {"c": 3.0, "a": 1.0, "b": 2.0}
    for step in range(0, 100, 10):
        write_evaluation(tmp_path, step, Evaluation(eval_at(step), samples, "digest"))
    kept = sample_losses(tmp_path)
    assert [int(name[5:11]) for name in kept] == [0, 70, 80, 90]
    assert kept["step-000090.json"]["losses"] == {"a": 1.0, "b": 2.0}
    assert kept["step-000090.json"]["num_samples"] == 3
    cut_evaluations(tmp_path, 75)
    assert [int(name[5:11]) for name in sample_losses(tmp_path)] == [0, 70]
    cut_evaluations(tmp_path, 0)
    assert not sample_losses(tmp_path)


@pytest.mark.slow
def test_a_stopped_run_keeps_what_the_straight_one_has(
    split_cache: Path, base: Path, tmp_path: Path
) -> None:
    """Every sample once an evaluation, also where a resumed run repeats some of its steps."""
    settings: dict[str, Any] = {"steps": 3, "eval_every": Every(1), "checkpoint_at": (1,)}
    run(split_cache, base, tmp_path / "straight", **settings)
    out = tmp_path / "stopped"
    with at_step(2, stop_by(15)), pytest.raises(Stopped):
        run(split_cache, base, out, **settings)
    shutil.rmtree(out / "checkpoints" / "checkpoint-2")  # as if killed before that
    late = out / EVALS / "step-000003.json"
    late.write_bytes(b"of a step after the checkpoint")
    with at_step(3, lambda: late.unlink()), pytest.raises(FileNotFoundError):
        run(split_cache, base, out, **settings, resume=True)
    run(split_cache, base, out, **settings, resume=True)
    straight = sample_losses(tmp_path / "straight")
    assert straight == sample_losses(out) and len(straight) == 4
    keys = keys_of(split_cache / "val")
    assert all(sorted(file["losses"]) == sorted(keys) for file in straight.values())
    assert recall_val(out) == (split_cache / "val").resolve()
    page = page_of(out)
    assert "samples stand by their keys" in page.text
    assert not invoke("report", out).exit_code
    shown = cards(Page((out / "report.html").read_text()))
    assert len(shown) >= len(keys) and all("data:image/webp" in card for card in shown)
