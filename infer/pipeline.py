"""Generates the requested images: text encoders, then the UNet, then the VAE, window by window.

On a small card one model is on the device at a time; on a big one all stay there, and each batch
is decoded as soon as it is sampled.
"""

import copy
import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from infer.requests import Batch, ImageRequest, make_batches, make_windows
from infer.settings import GenerateSettings
from infer.weights import Weights, enable_loras, has_loras
from runtime.devices import exact_fp32, has_tf32, tf32
from runtime.errors import echo
from runtime.files import format_bytes
from runtime.options import AUTO, parse_memory
from runtime.work_queue import WorkQueue
from sdxl.lora.apply import apply_text_loras
from sdxl.sampling import decode_latents, sample_latents, starting_noise, time_ids_of
from sdxl.text_encoders import Conditioning, TextEncoders

TEXT, UNET, VAE = "text encoders", "unet", "vae"
PLAIN_TEXT, PLAIN_UNET = "text encoders without", "unet without"  # of --compare
CPU = torch.device("cpu")


class ModelSlots:
    """Loads each model when it is first needed. On a small card one is on the device at a time, and
    the others wait in the CPU's memory.

    ``loaders`` give models on the CPU; ``working_bytes`` is the memory for activations.
    ``low_memory`` None means: the card is small if the models do not all fit in its free memory, or
    in ``budget`` bytes.
    """

    def __init__(
        self,
        device: torch.device,
        loaders: dict[str, Callable[[], Any]],
        working_bytes: int,
        low_memory: bool | None,
        budget: int | None = None,
    ) -> None:
        self.device, self.loaders, self.working_bytes = device, dict(loaders), working_bytes
        self._takes_turns, self._budget = low_memory, budget
        self._loaded: dict[str, Any] = {}
        self._on_device: set[str] = set()  # names of those on the device

    @property
    def takes_turns(self) -> bool:
        """Whether one model is on the device at a time. It is decided at the first access, for
        which the models are loaded."""
        if self._takes_turns is None:
            self._takes_turns = self.device.type == "cuda" and not self._fit()
        return self._takes_turns

    def sizes(self) -> dict[str, int]:
        """The bytes of each model's weights; all are loaded for it, on the CPU."""
        return {name: _num_bytes(self._load(name)) for name in self.loaders}

    def _fit(self) -> bool:
        if self._budget is not None:
            return sum(self.sizes().values()) + self.working_bytes <= self._budget
        missing = [name for name in self.loaders if name not in self._on_device]
        needed = sum(_num_bytes(self._load(name)) for name in missing)
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return needed + self.working_bytes <= free + unused

    def _load(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self.loaders[name]()
        return self._loaded[name]

    def acquire(self, name: str) -> Any:
        """A model, moved to the device; where the models take turns, the others leave it."""
        model = self._load(name)
        if name not in self._on_device:
            if self._on_device and self.takes_turns:
                for other in self._on_device:
                    self._loaded[other].to(CPU)
                self._on_device.clear()
                _release(self.device)
            model.to(self.device)
            self._on_device.add(name)
        return model

    def drop(self, name: str) -> None:
        """Free a model that is not needed any more."""
        self.loaders.pop(name, None)
        self._on_device.discard(name)
        if self._loaded.pop(name, None) is not None:
            gc.collect()
            _release(self.device)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _num_bytes(model: Any) -> int:
    """The bytes of the weights of a model, or of both text encoders."""
    parts = getattr(model, "models", (model,))
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


# The embeddings that a window of batches needs, each text encoded once.

EmbeddingsByText = dict[str | None, Conditioning]


class TextEmbeddings:
    """Embeddings on the CPU, by text; None is the base's unconditional.

    They are kept as long as a later window needs them. With ``compare`` and a LoRA that changes the
    text encoders there are two of each: without it and with it. ``plain`` is the name of separate
    text encoders without the LoRA, for one that cannot be switched off.
    """

    def __init__(self, batch_size: int, compare: bool, plain: str | None = None) -> None:
        self.batch_size, self.compare, self.plain = batch_size, compare, plain
        self._embeddings: dict[bool, EmbeddingsByText] = {}

    def of(self, text: str | None, with_loras: bool) -> Conditioning:
        return self._embeddings.get(with_loras, self._embeddings[True])[text]

    def encode(self, models: ModelSlots, window: list[Batch], later: Iterable[Batch]) -> None:
        """Encode the new texts of ``window``; drop the embeddings that no batch needs any more."""
        needed, still = _texts(window), _texts(later)
        embeddings = self._embeddings.get(True, {})
        if new := sorted(needed - embeddings.keys()):
            encoders: TextEncoders = models.acquire(TEXT)
            for with_loras in self._variants(encoders):
                model = TEXT if with_loras or self.plain is None else self.plain
                self._encode(models.acquire(model), new, with_loras)
            if cut := [text for text in new if encoders.is_cut(text)]:
                most = 77 * encoders.num_chunks
                warnings.warn(
                    f"{len(cut)} prompts are cut at {most} tokens, e.g. {cut[0][:60]!r}",
                    stacklevel=2,
                )
        kept = needed | still | {None}
        for with_loras, encoded in self._embeddings.items():
            self._embeddings[with_loras] = {
                text: conditioning for text, conditioning in encoded.items() if text in kept
            }

    def _variants(self, encoders: TextEncoders) -> tuple[bool, ...]:
        changed = self.plain is not None or any(has_loras(encoder) for encoder in encoders.models)
        return (False, True) if self.compare and changed else (True,)

    def _encode(self, encoders: TextEncoders, texts: list[str], with_loras: bool) -> None:
        for model in encoders.models:
            enable_loras(model, with_loras)
        embeddings = self._embeddings.setdefault(with_loras, {})
        if None not in embeddings:
            embeddings |= encoders.encode_each(texts, self.batch_size)
            return
        rows = encoders.encode(texts, self.batch_size)
        embeddings |= {text: rows[row : row + 1] for row, text in enumerate(texts)}


def _texts(batches: Iterable[Batch]) -> set[Any]:
    every = [request for batch in batches for request in batch]
    texts = [text for request in every for text in (request.prompt, request.negative)]
    return {text for text in texts if text is not None}


# Generation.

UNET_BYTES = 500  # of activations for each pixel of each row of a batch in fp16; estimated
VAE_BYTES = 3100  # for each pixel in fp32
MIN_DECODED_PIXELS = 1024 * 1024  # memory is reserved for decoding at least as many
TakeImages = Callable[[ImageRequest, list[torch.Tensor]], None]


@dataclass(frozen=True)
class Variant:
    """The weights that an image is generated with; ``plain`` means without the fine-tune."""

    model: str
    with_loras: bool
    plain: bool


class Pipeline:
    """The models on one device, and the run of a list of requests through them."""

    def __init__(
        self,
        settings: GenerateSettings,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        keep_loaded: bool = False,
    ) -> None:
        exact_fp32()
        self.settings, self.weights, self.dtype, self.device = settings, weights, dtype, device
        # An image decoded in TF32 is that of fp32 to one level of 255, in bf16 it is not
        # (docs/benchmarks.md, "Precision of the VAE"). --precision fp32 is exact.
        half = dtype != torch.float32 and weights.vae_dtype(dtype) == torch.float32
        self.decodes_in_tf32 = half and has_tf32(device)
        self.keep_loaded = keep_loaded  # whether the models stay loaded when all is done
        self._models: ModelSlots | None = None
        self.variants = [Variant(UNET, True, False)]
        if settings.compare:
            switched = weights.loras and "unet" not in weights.merged_parts
            other = UNET if switched else PLAIN_UNET
            self.variants.insert(0, Variant(other, False, True))
        self._samplers: dict[tuple[str | None, bool], Any] = {}

    def generate(
        self, requests: list[ImageRequest], queue: WorkQueue, take_images: TakeImages
    ) -> None:
        """Generate this process's part of ``requests``, which are the same in all; ``take_images``
        is called with each request and its image [3, H, W] in 0..1, on the CPU (with ``--compare``
        two images: without and with the fine-tune).

        Raises:
            FloatingPointError: an image is not finite.
        """
        models = self._models or self._new_models(requests, self.settings.batch_size)
        batch_size = self._fit_batch(models, requests, queue)
        batches = make_batches(requests, batch_size)
        windows = make_windows(batches, self.settings.window)
        self._models = models if self.keep_loaded else None
        plain = PLAIN_TEXT if PLAIN_TEXT in models.loaders else None
        texts = TextEmbeddings(batch_size, self.settings.compare, plain)
        for number, window in enumerate(windows):
            is_last = number == len(windows) - 1 and not self.keep_loaded
            texts.encode(models, window, chain.from_iterable(windows[number + 1 :]))
            if is_last:
                models.drop(TEXT)
                models.drop(PLAIN_TEXT)
            waiting = []
            for which in queue.claim(f"window {number}", len(window)):
                batch = window[which]
                latents = [
                    self._sample(models, variant, batch, texts, lambda: queue.add("steps", 1))
                    for variant in self.variants
                ]
                if models.takes_turns:
                    waiting.append(
                        (batch, [variant_latents.to(CPU) for variant_latents in latents])
                    )
                else:
                    self._decode(models, batch, latents, take_images)
            if is_last:
                models.drop(UNET)
                models.drop(PLAIN_UNET)
            for batch, latents in waiting:
                self._decode(models, batch, latents, take_images)

    def _fit_batch(self, models: ModelSlots, requests: list[ImageRequest], queue: WorkQueue) -> int:
        """How many images are drawn at a time: ``--batch-size``, or with ``--fit`` as many of them
        as fit beside one model. It is the same in all processes.

        Raises:
            ValueError: not even one image fits.
        """
        batch_size, budget = self.settings.batch_size, parse_memory(self.settings.fit or AUTO)
        if budget is None:
            return batch_size
        sizes = models.sizes()
        while (peak := self._peak(sizes, requests, batch_size)) > budget and batch_size > 1:
            batch_size //= 2
        if peak > budget:
            raise ValueError(
                f"--fit {self.settings.fit}: one image at a time takes about {format_bytes(peak)}, "
                "with one model on the card; a smaller --size or --precision fp16 takes less"
            )
        models.working_bytes = max(self._working_bytes(requests, batch_size))
        if queue.is_main:
            turns = "one model at a time on the card" if models.takes_turns else "all models stay"
            echo(f"--fit {self.settings.fit}: batches of {batch_size}, {turns}")
        return batch_size

    def _working_bytes(self, requests: list[ImageRequest], batch_size: int) -> tuple[int, int]:
        """Activations of the UNet and of the VAE, estimated."""
        most = max(request.width * request.height for request in requests)
        rows = 2 * min(batch_size, len(requests))
        unet = UNET_BYTES * most * rows * self.dtype.itemsize // 2
        return unet, VAE_BYTES * max(most, MIN_DECODED_PIXELS)

    def _peak(self, sizes: dict[str, int], requests: list[ImageRequest], batch_size: int) -> int:
        """With one model at a time on the card; bytes."""
        unet, vae = self._working_bytes(requests, batch_size)
        working = {UNET: unet, PLAIN_UNET: unet, VAE: vae}
        return max(size + working.get(name, 0) for name, size in sizes.items())

    def _new_models(self, requests: list[ImageRequest], batch_size: int) -> ModelSlots:
        loaders: dict[str, Callable[[], Any]] = {
            TEXT: self._load_text,
            UNET: lambda: self.weights.load_unet(self.dtype),
            VAE: lambda: self.weights.load_vae(self.dtype),
        }
        if any(variant.model == PLAIN_UNET for variant in self.variants):
            loaders[PLAIN_UNET] = lambda: self.weights.load_plain_unet(self.dtype)
        if self.settings.compare and self.weights.merged_parts - {"unet"}:
            loaders[PLAIN_TEXT] = self._load_plain_text
        working = max(self._working_bytes(requests, batch_size))
        budget = parse_memory(self.settings.fit or AUTO)
        return ModelSlots(self.device, loaders, working, self.settings.low_memory, budget)

    def _load_plain_text(self) -> TextEncoders:
        return TextEncoders(self.weights.base, self.dtype, CPU, self.weights.num_chunks)

    def _load_text(self) -> TextEncoders:
        encoders = self._load_plain_text()
        if self.weights.loras:
            apply_text_loras(encoders.models, self.weights.loras)
            for model in encoders.models:
                model.to(dtype=self.dtype)
        return encoders

    def _sampler(self, name: str | None, plain: bool) -> Any:
        if (name, plain) not in self._samplers:
            self._samplers[name, plain] = self.weights.sampler(name, plain)
        return copy.deepcopy(self._samplers[name, plain])

    def _sample(
        self,
        models: ModelSlots,
        variant: Variant,
        batch: Batch,
        texts: TextEmbeddings,
        on_step: Callable[[], object],
    ) -> torch.Tensor:
        """Latents [N, C, h, w] of requests of one kind, on the device."""
        unet, first = models.acquire(variant.model), batch[0]
        if self.settings.compare:
            enable_loras(unet, variant.with_loras)
        generators = [torch.Generator().manual_seed(request.seed) for request in batch]
        shape = (unet.config.in_channels, first.height // 8, first.width // 8)
        return sample_latents(
            unet,
            self._sampler(first.sampler, variant.plain),
            Conditioning.cat(texts.of(request.prompt, variant.with_loras) for request in batch),
            Conditioning.cat(texts.of(request.negative, variant.with_loras) for request in batch),
            noise=starting_noise(generators, shape),
            time_ids=torch.cat([_time_ids(request) for request in batch]),
            num_steps=first.num_steps,
            guidance_scale=first.guidance_scale,
            guidance_rescale=first.guidance_rescale,
            generators=generators,
            on_step=on_step,
        )

    def _decode(
        self, models: ModelSlots, batch: Batch, latents: list[torch.Tensor], take_images: TakeImages
    ) -> None:
        vae = models.acquire(VAE)
        vae.use_tiling = batch[0].tiled
        with tf32(self.decodes_in_tf32):
            variants = [_decode_images(vae, variant_latents) for variant_latents in latents]
        for request, *images in zip(batch, *variants, strict=True):
            if not all(image.isfinite().all() for image in images):
                raise FloatingPointError(
                    f"image {request.number} ({request.prompt[:60]!r}) is not finite: are the "
                    "weights whole? --precision fp32 tells"
                )
            take_images(request, images)


def _time_ids(request: ImageRequest) -> torch.Tensor:
    original = (request.original_width, request.original_height)
    return time_ids_of(
        (request.width, request.height), original, (request.crop_left, request.crop_top)
    )


def _decode_images(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, H, W] in 0..1, on the CPU; decoded in fp32 if the VAE's own dtype overflows."""
    images = decode_latents(vae, latents)
    if vae.dtype == torch.float32 or images.isfinite().all():
        return images
    dtype = vae.dtype
    images = decode_latents(vae.to(torch.float32), latents)
    vae.to(dtype)
    return images
