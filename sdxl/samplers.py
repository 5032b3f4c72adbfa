"""The samplers that can be asked for by name, as diffusers' schedulers on the base's schedule."""

import warnings
from dataclasses import astuple
from typing import Any

from sdxl.load import load_scheduler
from sdxl.schedule import Schedule

# Latents go beyond [-1, 1], where DDIM and DDPM would clip them unless told; and Stable Diffusion's
# schedules end at their own first step, not at alpha 1.
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
}


def load_sampler(base: str, name: str | None, schedule: Schedule) -> Any:
    """The sampler ``name`` (of ``sdxl.prompts.SAMPLERS``), or None: the one that the base names.

    It takes noise schedule, timestep spacing and all else that it knows from the base's config;
    ``schedule`` is what a fine-tune says otherwise.

    Raises:
        BaseError: the base has no scheduler that diffusers knows.
    """
    if name is None:
        return load_scheduler(base, *astuple(schedule))
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the base's own sampler does not know
        own = load_scheduler(base, *astuple(schedule))
    kind, options = _SAMPLERS[name]
    told = {key: value for key, value in schedule.to_config().items() if value is not None}
    if schedule.zero_snr:
        told["timestep_spacing"] = "trailing"
    return getattr(diffusers, kind).from_config(own.config, **options, **told)
