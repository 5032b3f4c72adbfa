"""Each sampler draws what diffusers' pipeline does with the same scheduler, on any schedule."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from drawing import PROMPTS, check_same, differ, draw, drawn_by, reference

from sdxl.base import open_base
from sdxl.metadata import Schedule
from sdxl.prompt_files import SAMPLERS
from sdxl.sampling import load_sampler

DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
}
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def base_with(base: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a base whose scheduler's config is another."""
    shutil.copytree(base, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "schedule",
    [pytest.param({}, marks=pytest.mark.slow), ZERO_SNR],
    ids=["epsilon", "zero-SNR v-prediction"],
)
def test_each_sampler_draws_as_the_pipeline_does(
    base: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    base = base_with(base, tmp_path / "base", **schedule)
    lines = [
        f"{text} --ss {name} --d {11 + number}"
        for name in SAMPLERS
        for number, text in enumerate(PROMPTS[:2])
    ]
    rescale = 0.7 if schedule else 0.0
    actual = draw(base, tmp_path / "out", lines, batch_size=2, guidance_rescale=rescale)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler.config
    expected = {}
    for name in SAMPLERS:
        kind, options = DIFFUSERS[name]
        pipeline.scheduler = getattr(diffusers, kind).from_config(own, **options)
        expected[name] = drawn_by(pipeline, PROMPTS[:2], guidance_rescale=rescale)
    for number, name in enumerate(SAMPLERS):
        check_same(actual[2 * number : 2 * number + 2], expected[name])
    # With exactly predicted noise Euler and DDIM do the same, and so do Euler ancestral and DDPM.
    for first, other in combinations(("euler", "euler-a", "dpm++2m"), 2):
        assert differ(expected[first], expected[other]) > 0.1


def test_guidance_rescale_changes_what_it_should(base: Path, tmp_path: Path) -> None:
    actual = draw(base, tmp_path / "out", PROMPTS, guidance_rescale=0.5)
    check_same(actual, reference(base, PROMPTS, guidance_rescale=0.5))
    assert differ(actual, reference(base, PROMPTS)) > 0.5


@pytest.mark.slow
def test_noise_on_the_way_is_each_images_own(base: Path, tmp_path: Path) -> None:
    lines = [f"{text} --ss {name}" for name in ("euler-a", "ddpm") for text in PROMPTS]
    at_once = draw(base, tmp_path / "3", lines, batch_size=3)
    one_by_one = draw(base, tmp_path / "1", lines, batch_size=1)
    assert differ(at_once, one_by_one) <= 1e-4 * 255
    assert differ(at_once[:3], at_once[3:]) > 1


@pytest.mark.parametrize("name", [None, *SAMPLERS])
def test_a_fine_tunes_schedule_wins_over_the_bases(base: Path, name: str | None) -> None:
    sampler = load_sampler(open_base(base), name, Schedule("v_prediction", True))
    config = sampler.config
    assert config.prediction_type == "v_prediction" and config.timestep_spacing == "trailing"
    assert config.rescale_betas_zero_snr and config.beta_end == 0.012
    sampler.set_timesteps(4)
    assert sampler.timesteps[0] == 999
    assert torch.as_tensor(sampler.alphas_cumprod)[-1] < 1e-6


def test_what_sdxl_is_told_of_size_and_crop(base: Path, tmp_path: Path) -> None:
    lines = [f"{text} --ow 48 --oh 96 --cl 8 --ct 24" for text in PROMPTS]
    sizes = {"original_size": (96, 48), "crops_coords_top_left": (24, 8)}
    actual = draw(base, tmp_path / "lines", lines)
    check_same(actual, reference(base, PROMPTS, **sizes))
    check_same(draw(base, tmp_path / "set", PROMPTS, original_size="48x96", crop="8,24"), actual)
    assert differ(actual, reference(base, PROMPTS)) > 0.1
