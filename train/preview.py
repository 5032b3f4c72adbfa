"""Previews: the cached prompts drawn by the UNet alone, all on one sheet.

No text encoder is needed, as the cache holds the embeddings, and no VAE, as it holds a linear map
from latents to colors. Seeds are fixed, so the sheets of one run differ by what it has learned.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from runtime.files import durable_file, writing
from sdxl.base import Base, find_weights
from sdxl.contact_sheet import MAX_TILES, contact_sheet
from sdxl.latent_rgb import latents_to_rgb
from sdxl.load import load_scheduler, load_vae
from sdxl.prompts import Prompt
from sdxl.sampling import decode_latents, sample_latents, starting_noise, time_ids_of
from sdxl.text_encoders import Conditioning
from shards.buckets import Size
from shards.format import CacheError
from shards.manifest import PROMPTS, read_side_file
from shards.previews import PreviewFile
from shards.reader import Cache
from train.config import TrainConfig
from train.learner import Learner

FOLDER = "previews"
TILE = 512  # pixels; four for each of a 1024² image's latents
REMEDY = "make it again with `python cli.py prompts`"


@dataclass(frozen=True, kw_only=True, eq=False)
class PreviewPrompts:
    """N prompts with their embeddings, and how their latents become colors."""

    prompts: tuple[Prompt, ...]
    prompt: Conditioning  # N rows, as cached
    negative: Conditioning  # N rows; the base's unconditional where a prompt has no negative
    size: Size  # (width, height) in pixels where a prompt has none
    weight: torch.Tensor  # [C, 3] fp32, of ``latents_to_rgb``
    bias: torch.Tensor  # [3] fp32


def read_preview_prompts(cache: Cache) -> PreviewPrompts | None:
    """The preview prompts of a cache; None where it has none.

    Where a prompt has no size of its own, it is drawn in the cache's largest bucket.

    Raises:
        CacheError: they are damaged or missing, or the cache holds no image.
    """
    manifest = cache.manifest
    if PROMPTS not in manifest["side_files"]:
        return None
    if not cache.groups():
        raise CacheError(f"{cache.folder}: holds no image, so previews have no size and colors")
    if "latent_rgb" not in manifest:
        raise CacheError(f"{cache.folder}: its manifest has no latent_rgb map; encode it again")
    data = read_side_file(cache.folder, manifest, PROMPTS, REMEDY)
    try:
        file = PreviewFile.from_bytes(data)
        prompts = tuple(Prompt(**fields) for fields in file.prompts)
    except (ValueError, TypeError) as error:
        raise CacheError(f"{cache.folder / PROMPTS}: {error}; {REMEDY}") from None
    tensors, colors = file.tensors, manifest["latent_rgb"]
    largest = max(cache.groups(), key=lambda g: (g.bucket[0] * g.bucket[1], g.count, g.bucket))
    return PreviewPrompts(
        prompts=prompts,
        prompt=Conditioning(tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]),
        negative=Conditioning(
            tensors["negative.prompt_embeds"], tensors["negative.pooled_prompt_embeds"]
        ),
        size=largest.bucket,
        weight=torch.tensor(colors["weight"]),
        bias=torch.tensor(colors["bias"]),
    )


def draw_previews(
    unet: Any,
    scheduler: Any,
    previews: PreviewPrompts,
    *,
    autocast: torch.dtype | None = None,
    vae: Any = None,
    num_steps: int = 20,
    guidance_scale: float = 5.0,
) -> Image.Image:
    """One sheet of the first 100 prompts, as their file has them, each with the start of its text.

    ``scheduler`` is of ``load_scheduler``. What a prompt says of size, seed, steps and guidance
    wins over the defaults; prompt i has seed i. ``autocast`` is the dtype of the forward pass where
    the UNet trains under autocast; None is no autocast, whatever the caller's. With a ``vae`` the
    colors are true, without they are of the cache's linear map. One prompt at a time, so that it
    takes less memory than training does.

    The UNet's modes and torch's generators are afterwards what they were. Of a sharded UNet every
    rank must call this, with the same arguments but for the ``vae``.
    """
    tiles: list[tuple[Any, str]] = []
    with _eval_mode(unet):
        for row, prompt in enumerate(previews.prompts[:MAX_TILES]):
            latents = _sample(unet, scheduler, previews, row, autocast, num_steps, guidance_scale)
            with torch.autocast(latents.device.type, enabled=False):
                if vae is None:
                    image = latents_to_rgb(latents, previews.weight, previews.bias)
                else:
                    image = decode_latents(vae, latents)
            tiles.append((_to_image(image[0]), prompt.text))
    return contact_sheet(tiles, TILE)


def _sample(
    unet: Any,
    scheduler: Any,
    previews: PreviewPrompts,
    row: int,
    autocast: torch.dtype | None,
    num_steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Latents [1, C, h, w] of one prompt."""
    prompt, rows = previews.prompts[row], slice(row, row + 1)
    width, height = prompt.width or previews.size[0], prompt.height or previews.size[1]
    generator = torch.Generator().manual_seed(row if prompt.seed is None else prompt.seed)
    shape = (unet.config.in_channels, height // 8, width // 8)
    if prompt.guidance_scale is not None:
        guidance_scale = prompt.guidance_scale
    # No cache of cast weights: filled here it has no gradients, and some versions of torch would
    # train on with it where the caller is under autocast too.
    with torch.autocast(
        unet.device.type, autocast, enabled=autocast is not None, cache_enabled=False
    ):
        return sample_latents(
            unet,
            copy.deepcopy(scheduler),
            previews.prompt[rows],
            previews.negative[rows],
            noise=starting_noise([generator], shape),
            time_ids=_time_ids(prompt, width, height),
            num_steps=prompt.num_steps or num_steps,
            guidance_scale=guidance_scale,
            generators=[generator],
        )


def _time_ids(prompt: Prompt, width: int, height: int) -> torch.Tensor:
    original = (prompt.original_width or width, prompt.original_height or height)
    return time_ids_of((width, height), original, (prompt.crop_left or 0, prompt.crop_top or 0))


@dataclass(kw_only=True, eq=False)
class Previewer:
    """Draws a run's previews into its folder."""

    config: TrainConfig
    base: Base
    previews: PreviewPrompts
    scheduler: Any
    learner: Learner

    @classmethod
    def of(
        cls, config: TrainConfig, base: Base, caches: Sequence[Cache], learner: Learner
    ) -> "Previewer | None":
        """With the prompts of the first cache that has some; None where none are asked for.

        Raises:
            ValueError: they are damaged, or no cache has any.
        """
        if not config.preview_every:
            return None
        if config.preview_vae:
            vae = base.vae  # refused now, and not at the first preview
            if vae.config and vae.file is None:
                find_weights(vae.path)
        for cache in caches:
            previews = read_preview_prompts(cache)
            if previews is not None:
                scheduler = load_scheduler(base, *astuple(learner.schedule))
                return cls(
                    config=config,
                    base=base,
                    previews=previews,
                    scheduler=scheduler,
                    learner=learner,
                )
        raise ValueError(
            f"--preview-every: {caches[0].folder} has no preview prompts; add some with "
            f"`python cli.py prompts {caches[0].folder} FILE --base {base}`"
        )

    def draw(self, step: int) -> Path:
        """The sheet after ``step`` steps, with the averaged weights if there are any. Of several
        ranks all must draw; the main one writes."""
        learner, precision, vae = self.learner, self.learner.precision, None
        if self.config.preview_vae and learner.world.is_main:
            vae = load_vae(self.base.vae, torch.float32).to(learner.world.device)
        with learner.eval_mode() as unet:
            sheet = draw_previews(
                unet,
                self.scheduler,
                self.previews,
                autocast=precision.dtype if precision.autocast else None,
                vae=vae,
            )
        path = self.config.out / FOLDER / f"step-{step:06d}.png"
        if learner.world.is_main:
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                with durable_file(path) as file:
                    sheet.save(file, format="PNG")
        return path


@contextmanager
def _eval_mode(unet: Any) -> Iterator[None]:
    """The UNet in eval mode; its modes and torch's generators come back as they were."""
    modes = [(module, module.training) for module in unet.modules()]
    devices = [unet.device] if unet.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # A few samplers draw from the global generator, whose state is of the step.
        torch.default_generator.manual_seed(0)
        unet.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _to_image(image: torch.Tensor) -> Image.Image:
    """[3, H, W] in 0..1; what is not finite, of a run that went astray, is black."""
    levels = (image.float().cpu().nan_to_num(0) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
