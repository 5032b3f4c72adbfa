"""``--fit``: every plan fits, the next one up does not, and the run learns the same."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import train_on
from runs import LORA, config_of, losses, run

from runtime.options import parse_memory
from runtime.path_kinds import checkpoints_in
from sdxl.base import open_base
from shards.reader import Cache
from train.checkpoint import read_state
from train.fit import budget_of, fit_into, fit_run, ways_to_fit
from train.memory import Estimator
from train.report import dry_run

GB = 10**9


def settings(base: Path, **more: Any) -> Any:
    return config_of(Path("x"), base, Path("y"), steps=1, device="cuda", **more)


def test_sizes_are_read_and_others_refused(base: Path) -> None:
    sizes = {"12GB": 12e9, "12 gb": 12e9, "12G": 12e9, "1.5GiB": 1.5 * 2**30, "800MB": 8e8}
    assert {text: parse_memory(text) for text in sizes} == sizes
    assert parse_memory("auto") is None
    for text in ("", "12", "0GB", "-1GB", "12TB", "much", "1e3GB", "GB"):
        with pytest.raises(ValueError, match="--fit takes a size such as 12GB, or auto, not"):
            settings(base, fit=text)


@pytest.mark.parametrize(
    "more", [{}, {"ema": 0.9}, {"full": True}, {"full": True, "ema": 0.9}], ids=str
)
def test_each_plan_fits_and_none_that_is_preferred_does(base: Path, more: dict[str, Any]) -> None:
    """Over every budget at which the choice changes. What is preferred rounds less."""
    config = settings(base, fit="1GB", batch_size=4, accumulate=3, **more)
    estimator = Estimator(open_base(base), 77)
    ways = list(ways_to_fit(config, 12, estimator, (64, 64)))
    assert len(ways) >= 20 and ways[0].prices == () and ways[0].config.batch_size == 12
    rounded = [w.config.base_quant != "none" or w.config.pure_bf16 for w in ways]
    assert rounded == sorted(rounded) and True in rounded and False in rounded
    least = min(way.peak for way in ways)
    chosen = set()
    for budget in sorted({way.peak for way in ways}):
        fitted = fit_into(budget, config, 12, estimator, (64, 64))
        changed = fitted.config
        assert fitted.peak == estimator.estimate(changed, (64, 64)).peak <= budget
        assert all(way.peak > budget for way in ways[: ways.index(fitted)])
        assert changed.batch_size * changed.accumulate == 12
        chosen.add(ways.index(fitted))
    assert len(chosen) > 3
    with pytest.raises(ValueError, match=r"--fit 1GB: the run does not fit into .* at least"):
        fit_into(least - 1, config, 12, estimator, (64, 64))


def test_what_the_user_has_set_is_kept(base: Path) -> None:
    given = {"gradient_checkpointing": False, "base_quant": "int8", "ema": 0.9, "ema_on_cpu": True}
    ways = ways_to_fit(settings(base, **given), 2, Estimator(open_base(base), 77), (64, 64))
    for way in ways:
        assert {name: getattr(way.config, name) for name in given} == given


def test_cards_and_the_real_sdxl(sdxl_configs: Path) -> None:
    """What a person with such a card would get, by the estimates."""
    estimator = Estimator(open_base(sdxl_configs), 77)
    size = (1024, 1024)
    lora = replace(settings(sdxl_configs), rank=16, targets=None, fit="auto")

    def fit(config: Any, budget: float, num_samples: int = 4) -> Any:
        return fit_into(int(budget), config, num_samples, estimator, size).config

    large, small, tiny = (fit(lora, budget) for budget in (78 * GB, 10 * GB, 5.5 * GB))
    assert not large.gradient_checkpointing and large.batch_size == 4
    assert small.gradient_checkpointing and small.base_quant == "none"
    assert tiny.base_quant == "int8"
    full = replace(settings(sdxl_configs, full=True), fit="auto")
    assert not fit(full, 78 * GB).pure_bf16 and fit(full, 40 * GB).pure_bf16
    with pytest.raises(ValueError, match=r"more would be saved by .*--optimizer adafactor"):
        fit(full, 12 * GB)


def test_free_memory_is_asked_where_there_is_a_device(base: Path) -> None:
    assert budget_of("12GB", torch.device("cuda")) == 12 * GB
    assert budget_of("auto", torch.device("cpu")) > 10**8
    with pytest.raises(ValueError, match=r"--fit auto asks the card .*\(--fit 12GB\)"):
        budget_of("auto", torch.device("cuda"))


def test_a_run_that_is_fitted_learns_what_it_would_have(
    cache: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of one in place of four: equal losses, and what it is resumed with fits as well."""
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    run(cache, base, plain, batch_size=4, steps=4, log_every=1)
    estimator = Estimator(open_base(base), 77, "cpu")
    config = config_of(cache, base, fitted, batch_size=4, steps=2, log_every=1)
    peaks = {
        way.config.batch_size: way.peak
        for way in ways_to_fit(config, 4, estimator, (64, 64))
        if way.config.base_quant == "none" and way.config.gradient_checkpointing
    }
    budget = f"{peaks[1] * 1.01 / 1e6:.6f}MB"
    lines = list(dry_run(replace(config, fit=budget)))
    assert lines[0].startswith(f"--fit {budget}: --batch-size 1 --accumulate 4")
    run(cache, base, fitted, batch_size=4, steps=2, log_every=1, fit=budget)
    assert "--batch-size 1 --accumulate 4" in capsys.readouterr().out
    run(cache, base, fitted, batch_size=2, steps=4, log_every=1, fit=budget, resume=True)
    assert dict(losses(fitted)) == pytest.approx(dict(losses(plain)), rel=1e-5)
    assert read_state(checkpoints_in(fitted)[4])["global_batch"] == 4


def test_what_a_run_began_with_is_kept_when_it_goes_on(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """However little is free, and whatever it was called with."""
    opened, caches = open_base(base), [Cache(cache)]
    config = config_of(cache, base, tmp_path, steps=1, batch_size=1, device="cuda", fit="auto")
    devices = (torch.device("cuda"), 1)
    estimator = Estimator(opened, 77)
    ways = list(ways_to_fit(config, 4, estimator, (64, 64)))
    small = min(way.peak for way in ways if way.config.base_quant == "none")
    for base_quant in ("none", "int8"):
        state = {"config": {"base_quant": base_quant, "pure_bf16": False}, "global_batch": 4}
        state["identity"] = {}
        fitted = fit_run(small, config, opened, caches, devices, (tmp_path, state)).config
        assert fitted.base_quant == base_quant
        assert fitted.batch_size * fitted.accumulate == 4
        with pytest.raises(ValueError, match="does not fit"):
            fit_run(1, config, opened, caches, devices, (tmp_path, state))


def test_a_card_without_bf16_is_given_no_pure_bf16(
    cache: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, config = open_base(base), settings(base, full=True, fit="auto")
    ways = list(ways_to_fit(config, 2, Estimator(opened, 77), (64, 64)))
    budget = min(way.peak for way in ways if not way.config.pure_bf16) - 1
    arguments = budget, config, opened, [Cache(cache)], (torch.device("cuda"), 1)
    assert fit_run(*arguments).config.pure_bf16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("train.fit.has_bf16", lambda device: False)
    with pytest.raises(ValueError, match="does not fit"):
        fit_run(*arguments)


def test_a_run_that_began_with_a_lora_is_fitted_by_that_of_its_checkpoint(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """Whether --init-lora is given again or not; its file may be gone."""
    first, out = tmp_path / "first", tmp_path / "run"
    run(cache, base, first, steps=1, rank=4)
    begun = {"targets": None, "init_lora": first / LORA}
    run(cache, base, out, steps=1, **begun)
    (first / LORA).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "cannot be read, and is not needed"
        run(cache, base, out, steps=2, resume=True, fit="auto", **begun)
    run(cache, base, out, steps=3, resume=True, fit="auto", targets=None)
    assert [step for step, _ in losses(out)] == [1, 2, 3]


def test_what_several_processes_cannot_do_is_refused_as_ever(cache: Path, base: Path) -> None:
    config = settings(base, full=True, optimizer="adafactor", fit="12GB")
    with pytest.raises(ValueError, match="take adamw"):
        fit_run(GB, config, open_base(base), [Cache(cache)], (torch.device("cuda"), 2))
    assert "bitsandbytes" in config.special_imports  # or nf4 could not be chosen in a command


@pytest.mark.slow
def test_ranks_decide_alike(cache: Path, base: Path, tmp_path: Path) -> None:
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    run(cache, base, plain, batch_size=4, steps=3, log_every=1)
    config = config_of(cache, base, fitted, batch_size=2, steps=3, log_every=1, fit="auto")
    train_on(config, 2)
    assert dict(losses(fitted)) == pytest.approx(dict(losses(plain)), rel=1e-4)
