"""The images to generate: prompt, seed, size and sampler of each, in batches and windows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, cycle, groupby, islice, repeat

from infer.settings import GenerateSettings
from sdxl.prompt_files import Prompt

MAX_UNTILED = 1536 * 1536  # pixels: the VAE takes 3 kB for each in fp32
MAX_IMAGES = 10_000_000  # of one run
Batch = list["ImageRequest"]


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image. Sizes and crops in pixels; ``sampler`` None is the base's own."""

    number: int
    prompt: str
    negative: str | None
    width: int
    height: int
    seed: int
    num_steps: int
    guidance_scale: float
    guidance_rescale: float
    sampler: str | None
    original_width: int
    original_height: int
    crop_left: int
    crop_top: int
    tiled: bool
    compare: bool

    @property
    def kind(self) -> tuple[int, int, int, float, str]:
        """What images of one batch have in common."""
        return self.width, self.height, self.num_steps, self.guidance_scale, self.sampler or ""


def make_requests(
    settings: GenerateSettings, prompts: list[Prompt], default_side: int
) -> list[ImageRequest]:
    """The requests of ``num_images`` images: prompts in rotation, each as often in turn as its line
    says. Settings in a line take precedence.

    Image i has seed + i. A line's own seed grows by one each time the line comes round.
    """
    num = settings.num_images or sum(prompt.num_images or 1 for prompt in prompts)
    if num > MAX_IMAGES:
        raise ValueError(f"{num:,} images are asked for; at most {MAX_IMAGES:,} at a time")
    rotation = chain.from_iterable(
        repeat(prompt_index, prompts[prompt_index].num_images or 1)
        for prompt_index in cycle(range(len(prompts)))
    )
    turns: Counter[int] = Counter()
    requests = []
    for number, prompt_index in enumerate(islice(rotation, num)):
        prompt = prompts[prompt_index]
        own = prompt.seed
        seed = settings.seed + number if own is None else own + turns[prompt_index]
        turns[prompt_index] += 1
        requests.append(_request(settings, prompt, default_side, number, seed % 2**64))
    return requests


def _request(
    settings: GenerateSettings, prompt: Prompt, default_side: int, number: int, seed: int
) -> ImageRequest:
    width, height = settings.pixels or (default_side, default_side)
    width, height = prompt.width or width, prompt.height or height
    original, crop = settings.original_pixels or (width, height), settings.crop_pixels
    tiled = settings.vae_tiling
    scale = prompt.guidance_scale
    return ImageRequest(
        number=number,
        prompt=prompt.text,
        negative=settings.negative if prompt.negative is None else prompt.negative,
        width=width,
        height=height,
        seed=seed,
        num_steps=prompt.num_steps or settings.num_steps,
        guidance_scale=settings.guidance_scale if scale is None else scale,
        guidance_rescale=settings.guidance_rescale,
        sampler=prompt.sampler or settings.sampler,
        original_width=prompt.original_width or original[0],
        original_height=prompt.original_height or original[1],
        crop_left=crop[0] if prompt.crop_left is None else prompt.crop_left,
        crop_top=crop[1] if prompt.crop_top is None else prompt.crop_top,
        tiled=width * height > MAX_UNTILED if tiled is None else tiled,
        compare=settings.compare,
    )


def make_batches(requests: Iterable[ImageRequest], size: int) -> list[Batch]:
    """Batches of one kind each. Images of the same prompt come together, so that few windows
    need it; else they are in the order of their numbers."""
    ordered = sorted(requests, key=lambda request: request.number)
    first: dict[tuple[str, str | None], int] = {}
    for request in ordered:
        first.setdefault((request.prompt, request.negative), request.number)
    ordered.sort(key=lambda request: (request.kind, first[request.prompt, request.negative]))
    batches = []
    for _, group in groupby(ordered, key=lambda request: request.kind):
        members = list(group)
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


def make_windows(batches: list[Batch], size: int) -> list[list[Batch]]:
    """Consecutive batches of up to ``size`` images in all; a larger batch is one by itself."""
    windows: list[list[Batch]] = []
    num_free = 0
    for batch in batches:
        if len(batch) > num_free:
            windows.append([])
            num_free = size
        windows[-1].append(batch)
        num_free -= len(batch)
    return windows
