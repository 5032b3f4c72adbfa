"""The miniature's VAE: SDXL's AutoencoderKL, 64 pixels to 8x8 latents of 4 channels, trained here.

Shapes: B images, H W their size in pixels, h = H / 8 and w = W / 8 that of their latents.
"""

import math
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm

from runtime.files import write_durable
from tools.miniature.drawing import (
    BASIC_SHAPES,
    NEW_SHAPES,
    TINY,
    draw_doodle,
    draw_scene,
    random_scene,
    shrink,
)
from tools.small_sdxl import make_vae

CHANNELS = (16, 32, 48, 48)  # of the four levels
NUM_TRAINING_IMAGES = 8000
BATCH_SIZE = 16
PEAK_LR = 3e-3
KL_WEIGHT = 5e-4
NUM_CROP_STEPS = 3450  # on crops of 32x32, four times as fast; whole images after
NUM_STEPS = 4600
NUM_DECODER_STEPS = 1000  # more, of the decoder alone
DECODER_LR = 1.5e-3
CHECKPOINT_EVERY = 250


def draw_images(num: int, seed: int) -> torch.Tensor:
    """[num, 3, 64, 64] uint8: half basic shapes, half doodles, to see all others by.

    A quarter of both is blurred: a decoder that only met sharp edges can draw no others.
    """
    choices = random.Random(seed)
    images = []
    for number in tqdm(range(num), unit="img", desc="draw for the VAE"):
        if number % 2:
            image = draw_doodle(choices)
        else:
            image = draw_scene(random_scene(choices, BASIC_SHAPES), choices)
        if number % 8 < 2:
            small = shrink(image, choices.randint(*TINY))
            image = small.resize(image.size, Image.Resampling.LANCZOS)
        images.append(image)
    return torch.stack([_pixels(image) for image in images])


def _pixels(image: Image.Image) -> torch.Tensor:
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1)


def vae_loss(vae: Any, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The loss on images [B, 3, H, W] in -1..1: L1 + MSE + edges, and KL to N(0, 1), a scalar."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    loss = l1_loss(decoded, images) + mse_loss(decoded, images)
    for axis in (2, 3):  # differences between neighbours: without them all edges are soft
        loss = loss + 0.25 * l1_loss(decoded.diff(dim=axis), images.diff(dim=axis))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    total: torch.Tensor = loss + KL_WEIGHT * kl
    return total


def train_vae(checkpoint: Path) -> Any:
    """A trained VAE in fp32; goes on from ``checkpoint`` where there is one."""
    num_steps = NUM_STEPS + NUM_DECODER_STEPS
    torch.manual_seed(0)
    vae = make_vae(CHANNELS).train().to(memory_format=torch.channels_last)  # a tenth faster
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, weight_decay=1e-3, fused=True)
    start = _restore(checkpoint, vae, optimizer)
    if start == num_steps:
        return vae.eval()
    images = draw_images(NUM_TRAINING_IMAGES, seed=1)
    bar = tqdm(total=num_steps, initial=start, unit="step", desc="train the VAE", mininterval=5)
    for step in range(start, num_steps):
        batch, generator = _batch(images, step)
        optimizer.param_groups[0]["lr"] = _learning_rate(step)
        for part in (vae.encoder, vae.quant_conv):  # the optimizer passes over what has no gradient
            part.requires_grad_(step < NUM_STEPS)
        loss = vae_loss(vae, batch, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == num_steps:
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{held_out_psnr(vae):.2f}")
            _save(checkpoint, vae, optimizer, step + 1)
    bar.close()
    return vae.eval()


def _learning_rate(step: int) -> float:
    """A short warmup, then half a cosine to 0; for the decoder alone another half."""
    if step >= NUM_STEPS:
        return DECODER_LR * _half_cosine((step - NUM_STEPS) / NUM_DECODER_STEPS)
    return PEAK_LR * min(1.0, (step + 1) / 100) * _half_cosine(step / NUM_STEPS)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _batch(images: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Generator]:
    """The batch of a step, [B, 3, H, W] in -1..1, and the step's own chance."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
    batch = images[rows].float() / 127.5 - 1
    if step < NUM_CROP_STEPS:
        top, left = torch.randint(33, (2,), generator=generator).tolist()
        batch = batch[:, :, top : top + 32, left : left + 32]
    if torch.rand((), generator=generator) < 0.5:
        batch = batch.flip(3)
    return batch.contiguous(memory_format=torch.channels_last), generator


def _save(checkpoint: Path, vae: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{field}": value for field, value in state.items()}
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, metadata={"step": str(step)})
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_durable(checkpoint, data)


def _restore(checkpoint: Path, vae: Any, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint in place; returns the steps done, 0 without one."""
    if not checkpoint.exists():
        return 0
    with safetensors.safe_open(checkpoint, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {n.removeprefix("vae."): t for n, t in tensors.items() if n.startswith("vae.")}
    vae.load_state_dict(weights)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, number, field = name.split(".")
            if tensor.ndim == 4:  # as its parameter lies in memory: the fused step needs it
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            state.setdefault(int(number), {})[field] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


def held_out_psnr(vae: Any) -> float:
    """dB of decoded images of the new shapes, which the VAE is never trained on."""
    choices = random.Random(2)
    drawn = [draw_scene(random_scene(choices, NEW_SHAPES), choices) for _ in range(64)]
    return reconstruction_psnr(vae, drawn)


@torch.inference_mode()
def reconstruction_psnr(vae: Any, drawn: list[Image.Image]) -> float:
    """Mean dB of images encoded and decoded again."""
    images = _batch_of(drawn)
    decoded = _decoded(vae, images)
    errors = ((decoded - images) / 2).square().flatten(1).mean(dim=1)
    return float((-10 * errors.log10()).mean())


@torch.inference_mode()
def reconstruct_images(vae: Any, drawn: list[Image.Image]) -> list[Image.Image]:
    """Images encoded and decoded again."""
    levels = ((_decoded(vae, _batch_of(drawn)) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.numpy()) for image in levels.permute(0, 2, 3, 1)]


def _decoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    decoded: torch.Tensor = vae.decode(vae.encode(images).latent_dist.mean).sample
    return decoded.clamp(-1, 1)


@torch.inference_mode()
def give_unit_variance(vae: Any, num: int = 256) -> None:
    """Set ``scaling_factor`` so that scaled latents of scenes, as sampled, have variance 1."""
    choices = random.Random(3)
    images = _batch_of([draw_scene(random_scene(choices), choices) for _ in range(num)])
    latents = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))


def _batch_of(drawn: list[Image.Image]) -> torch.Tensor:
    """[B, 3, H, W] in -1..1."""
    return torch.stack([_pixels(image) for image in drawn]).float() / 127.5 - 1
