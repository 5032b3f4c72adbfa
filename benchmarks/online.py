"""Trains a LoRA as the example scripts for SDXL that come with diffusers do, from the same parts.

Online, as the LoRA script: images are decoded and cut in the data loader, VAE and both text
encoders run in every step, and all five models stay in memory. With ``--cached``, as the script
that trains the whole UNet: at its start it encodes each image and caption once and keeps latents
and embeddings in memory, then it drops the encoders. Both then take peft on the UNet and AdamW.

Neither does what a cache on disk is for: the encoding of ``--cached`` is lost with its process, its
latents are one draw of the posterior for all epochs, and everything must fit in memory. Neither has
buckets (images are cut square), checks, logs, checkpoints or a resume.

    python -m benchmarks.online DATASET --base BASE --epochs 3 [--cached]
"""

import gc
import json
import resource
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl.base import base_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


class ImageDataset(Dataset[dict[str, Any]]):
    """Center squares in -1..1, with their captions and SDXL's sizes."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths, self.side = sorted(folder.glob("*.png")), side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path = self.paths[number]
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        scale = self.side / min(image.size)
        width, height = (round(length * scale) for length in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        square = resized.crop((left, top, left + self.side, top + self.side))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
        sizes = (image.height, image.width, top, left, self.side, self.side)
        return {
            "pixels": pixels,
            "caption": path.with_suffix(".txt").read_text().strip(),
            "time_ids": torch.tensor(sizes, dtype=torch.float32),
        }


class Online:
    """All models on one device, and one step."""

    def __init__(
        self, base: str, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype, rank: int
    ) -> None:
        self.device, self.dtype = device, dtype
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(base, subfolder=name)
            for name in ("tokenizer", "tokenizer_2")
        ]
        self.encoders = [
            kind.from_pretrained(base, subfolder=name, dtype=dtype).to(device).requires_grad_(False)
            for kind, name in (
                (CLIPTextModel, "text_encoder"),
                (CLIPTextModelWithProjection, "text_encoder_2"),
            )
        ]
        self.vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=vae_dtype)
        self.vae.to(device).requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype)
        self.unet.to(device).requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=ATTENTION), "default"
        )
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        if device.type == "cuda":
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-2)
        self.schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings [B, 77, D] and pooled [B, P]."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            result = encoder(ids.to(self.device), output_hidden_states=True)
            hidden.append(result.hidden_states[-2])
        return torch.cat(hidden, dim=-1), result.text_embeds

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, 4, h, w]."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        latents: torch.Tensor = posterior.sample().float() * self.vae.config.scaling_factor
        return latents

    def precompute(self, images: ImageDataset, batch_size: int) -> list[dict[str, Any]]:
        """Each sample's latents and embeddings, in main memory; then the encoders are dropped."""
        samples = []
        for batch in DataLoader(images, batch_size=batch_size):
            tensors = {
                "latents": self.encode_images(batch["pixels"]),
                "time_ids": batch["time_ids"],
            }
            tensors["prompt"], tensors["pooled"] = self.encode_text(batch["caption"])
            rows = zip(*(tensor.cpu() for tensor in tensors.values()), strict=True)
            samples += [dict(zip(tensors, row, strict=True)) for row in rows]
        del self.vae, self.encoders, self.tokenizers
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return samples

    def step(self, batch: dict[str, Any]) -> None:
        if "latents" in batch:
            latents, prompt, pooled = (
                batch[name].to(self.device) for name in ("latents", "prompt", "pooled")
            )
        else:
            latents = self.encode_images(batch["pixels"])
            prompt, pooled = self.encode_text(batch["caption"])
        noise = torch.randn_like(latents)
        num = self.schedule.config.num_train_timesteps
        timesteps = torch.randint(0, num, (len(latents),), device=self.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.unet(
                noisy.to(self.dtype),
                timesteps,
                prompt,
                added_cond_kwargs={
                    "text_embeds": pooled,
                    "time_ids": batch["time_ids"].to(self.device),
                },
            ).sample
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--base", required=True)
@click.option("--epochs", default=1)
@click.option("--resolution", default=1024)
@click.option("--batch-size", default=1)
@click.option("--rank", default=4)
@click.option("--precision", type=click.Choice([*DTYPES]), default="fp32")
@click.option("--vae-dtype", type=click.Choice([*DTYPES]), default="fp32")
@click.option("--device", default="cpu")
@click.option("--cached", is_flag=True, help="Encode once, before the first step.")
def main(
    dataset: Path,
    base: str,
    epochs: int,
    resolution: int,
    batch_size: int,
    rank: int,
    precision: str,
    vae_dtype: str,
    device: str,
    cached: bool,
) -> None:
    """Train, and print one JSON object."""
    torch.manual_seed(0)
    place = torch.device(device)
    online = Online(str(base_path(base)), place, DTYPES[precision], DTYPES[vae_dtype], rank)
    images = ImageDataset(dataset, resolution)
    samples: Any = online.precompute(images, batch_size) if cached else images
    loader = DataLoader(samples, batch_size=batch_size, shuffle=True)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in loader:
            online.step(batch)
    if place.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = epochs * len(images) / (time.perf_counter() - start)
    click.echo(json.dumps({"images_per_second": rate, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
