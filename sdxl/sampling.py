"""Embeddings to latents: the denoising loop of the SDXL pipeline, with the UNet alone.

Legend: N images, C latent channels, h w latent height and width.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch

from sdxl.base import Base
from sdxl.load import load_scheduler
from sdxl.metadata import Schedule
from sdxl.text_encoders import Conditioning

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


def load_sampler(base: Base, name: str | None, schedule: Schedule) -> Any:
    """The sampler ``name`` (of ``sdxl.prompt_files.SAMPLERS``), or with None the one that the base
    names.

    Its noise schedule, timestep spacing and other settings are from the base's config;
    ``schedule`` has the changes of a fine-tune.

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
    overrides = {key: value for key, value in schedule.to_config().items() if value is not None}
    if schedule.zero_snr:
        overrides["timestep_spacing"] = "trailing"
    return getattr(diffusers, kind).from_config(own.config, **options, **overrides)


DECODED_AT_ONCE = 128 * 128  # latent pixels: an image of 1024², which takes 3 GB in fp32


def starting_noise(generators: list[torch.Generator], shape: tuple[int, int, int]) -> torch.Tensor:
    """[N, C, h, w] fp32, each image from its own generator, whatever the batch.

    As ``diffusers.utils.torch_utils.randn_tensor`` does: the same seeds give the same noise there.
    """
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def time_ids_of(
    size: tuple[int, int], original: tuple[int, int] | None = None, crop: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """[1, 6]: original height and width, crop's top and left, target height and width, in pixels.

    Sizes are given as (width, height), ``crop`` as (left, top).
    """
    original = original or size
    return torch.tensor([[original[1], original[0], crop[1], crop[0], size[1], size[0]]])


@torch.no_grad()  # not inference_mode: a UNet under FSDP could not be trained any more after it
def sample_latents(
    unet: Any,
    scheduler: Any,
    prompt: Conditioning,
    negative: Conditioning,
    *,
    noise: torch.Tensor,
    time_ids: torch.Tensor,
    num_steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    generators: list[torch.Generator],
    on_step: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Denoise ``noise`` [N, C, h, w] with classifier-free guidance (off at a scale <= 1).

    ``prompt`` and ``negative`` have N rows, ``time_ids`` is [N, 6]. ``generators``, one an image,
    serve samplers that add noise on the way. ``guidance_rescale`` pulls the standard deviation of
    what guidance gives towards that of the prompt's own prediction (Lin et al., "Common Diffusion
    Noise Schedules and Sample Steps are Flawed", 3.4). ``on_step`` is called before each step.
    Returns scaled latents in the UNet's dtype, on its device.
    """
    guided = guidance_scale > 1
    parts = [negative, prompt] if guided else [prompt]
    placement = {"device": unet.device, "dtype": unet.dtype}  # both are slow to ask for
    states = torch.cat([part.prompt for part in parts]).to(**placement)
    added = {
        "text_embeds": torch.cat([part.pooled for part in parts]).to(**placement),
        "time_ids": torch.cat([time_ids] * len(parts)).to(**placement),
    }
    scheduler.set_timesteps(num_steps, device=placement["device"])
    latents: torch.Tensor = noise.to(**placement) * scheduler.init_noise_sigma
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in takes else {}
    for t in scheduler.timesteps:
        on_step()
        model_input = scheduler.scale_model_input(torch.cat([latents] * len(parts)), t)
        predicted = unet(
            model_input,
            t,
            encoder_hidden_states=states,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        if guided:
            without, with_prompt = predicted.chunk(2)
            predicted = without + guidance_scale * (with_prompt - without)
            if guidance_rescale > 0:
                predicted = _rescale_guidance(predicted, with_prompt, guidance_rescale)
        stepped: torch.Tensor = scheduler.step(predicted, t, latents, **extra, return_dict=False)[0]
        latents = stepped.to(placement["dtype"])
    return latents


def _rescale_guidance(
    guided: torch.Tensor, with_prompt: torch.Tensor, amount: float
) -> torch.Tensor:
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl as pipeline

    rescaled: torch.Tensor = pipeline.rescale_noise_cfg(guided, with_prompt, amount)
    return rescaled


@torch.inference_mode()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents [N, C, h, w] to images [N, 3, 8h, 8w] in 0..1, fp32, on the CPU; NaN
    where the VAE overflows."""
    latents = unscale(vae.config, latents.to(vae.device, vae.dtype))
    at_once = max(1, DECODED_AT_ONCE // latents[0, 0].numel())
    decoded = [
        vae.decode(some, return_dict=False)[0].float().cpu()
        for some in torch.split(latents, at_once)
    ]
    images = torch.cat(decoded) / 2 + 0.5
    # Clamping would turn an overflow white: non-finite pixels stay so for the caller to see.
    return torch.where(images.isfinite(), images.clamp(0, 1), torch.nan)


def _normalization(config: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, scale) with scaled = (latent - shift) * scale, from the VAE's config."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    shape = (1, -1, 1, 1)
    return (
        like.new_tensor(mean).view(shape),
        config["scaling_factor"] / like.new_tensor(std).view(shape),
    )


def scale_mean(config: Any, latents: torch.Tensor) -> torch.Tensor:
    """A VAE's latents [N, C, h, w] as the UNet sees them."""
    shift, scale = _normalization(config, latents)
    return (latents - shift) * scale


def scale_std(config: Any, std: torch.Tensor) -> torch.Tensor:
    """The posterior's standard deviation, scaled like its mean."""
    return std * _normalization(config, std)[1]


def unscale(config: Any, latents: torch.Tensor) -> torch.Tensor:
    """The reverse of ``scale_mean``, as the pipeline does before it decodes."""
    shift, scale = _normalization(config, latents)
    return latents / scale + shift
