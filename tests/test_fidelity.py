"""What is cached is what the reference computes; what is trained is what the plain loop trains."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Encode
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image

from shards.batches import Reader
from shards.buckets import cover
from shards.format import Sample
from shards.plan import Plan, RankShare
from shards.reader import Cache
from tests.made import learner_for
from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import train_step
from train.objective import (
    add_noise,
    alphas_cumprod,
    errors,
    masked_mean,
    target_of,
    timesteps_of,
)
from train.option_values import CacheUse

SCALING = 0.25  # of the random base's VAE; SDXL's is 0.13025


def samples_of(folder: Path) -> dict[str, Sample]:
    """Read by tarfile alone: path -> sample."""
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, extension = member.name.split(".")
                file = archive.extractfile(member)
                assert file is not None
                members.setdefault(key, {})[extension] = file.read()
    results = [Sample.from_members(key, parts) for key, parts in members.items()]
    return {sample.path: sample for sample in results}


def pixels_of(path: Path, sizes: list[int]) -> torch.Tensor:
    """The crop that ``sizes`` describe, by Pillow and numpy alone, in -1..1."""
    height, width, top, left, target_height, target_width = sizes
    image = Image.open(path).convert("RGB")
    assert image.size == (width, height)
    scale = max(target_width / width, target_height / height)
    size = max(target_width, round(width * scale)), max(target_height, round(height * scale))
    array = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    array = array[top : top + target_height, left : left + target_width]
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(str(base))


def test_latents_are_the_vaes_scaled(cache: Path, images: Path, base: Path) -> None:
    """Bit for bit, when the reference sees the same batch."""
    vae = AutoencoderKL.from_pretrained(str(base), subfolder="vae")
    samples = samples_of(cache)
    assert len(samples) == 14
    by_bucket: dict[tuple[int, ...], list[Sample]] = {}
    for sample in sorted(samples.values(), key=lambda sample: sample.key):
        shape = tuple(sample.tensors["latents.mean"].shape)
        by_bucket.setdefault(shape, []).append(sample)
    for members in by_bucket.values():
        for start in range(0, len(members), 4):
            batch = members[start : start + 4]
            sizes = [sample.tensors["sizes"][0].tolist() for sample in batch]
            inputs = [pixels_of(images / s.path, z) for s, z in zip(batch, sizes, strict=True)]
            inputs += [torch.zeros_like(inputs[0])] * (4 - len(batch))  # always a batch of 4
            with torch.no_grad():
                posterior = vae.encode(torch.stack(inputs)).latent_dist
            for row, sample in enumerate(batch):
                mean, std = sample.tensors["latents.mean"][0], sample.tensors["latents.std"][0]
                assert torch.equal(mean, posterior.mean[row] * SCALING)
                assert torch.equal(std, posterior.std[row] * SCALING)


def test_half_precision_is_the_same_values_rounded_once(
    cache: Path, images: Path, encode_to: Encode, tmp_path: Path
) -> None:
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        half = samples_of(encode_to(images, tmp_path / name, dtype=name))
        for path, sample in samples_of(cache).items():
            for tensor, values in sample.tensors.items():
                expected = values if tensor == "sizes" else values.to(dtype)
                assert torch.equal(half[path].tensors[tensor], expected), (path, tensor)


def test_text_is_what_the_pipeline_encodes(cache: Path, pipeline: Any) -> None:
    for sample in samples_of(cache).values():
        (caption,) = sample.captions
        prompts = [caption, "", "", ""]  # the batch size decides the last bits
        prompt, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        assert torch.equal(sample.tensors["prompt_embeds"][0], prompt[0])
        assert torch.equal(sample.tensors["pooled_prompt_embeds"][0], pooled[0])


def test_the_unconditional_is_zeros_and_the_empty_prompt(cache: Path, pipeline: Any) -> None:
    stored = safetensors.torch.load_file(cache / "unconditional.safetensors")
    prompt, _, pooled, _ = pipeline.encode_prompt([""] * 4, do_classifier_free_guidance=False)
    assert torch.equal(stored["empty.prompt_embeds"][0], prompt[0])
    assert torch.equal(stored["empty.pooled_prompt_embeds"][0], pooled[0])
    assert stored["empty.prompt_embeds"].abs().max() > 0
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(stored[f"zeros.{name}"], torch.zeros_like(stored[f"empty.{name}"]))


def test_captions_stay_with_their_images(cache: Path, images: Path) -> None:
    for path, sample in samples_of(cache).items():
        assert sample.captions == ((images / path).with_suffix(".txt").read_text().strip(),)


def test_sizes_are_of_each_image(cache: Path, images: Path) -> None:
    for path, sample in samples_of(cache).items():
        with Image.open(images / path) as image:
            width, height = image.size
        latents = sample.tensors["latents.mean"]
        target = (latents.shape[3] * 8, latents.shape[2] * 8)
        assert sample.tensors["sizes"][0].tolist() == cover((width, height), target).sizes


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_the_schedule_is_ddpms(kind: str) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": kind}
    reference = DDPMScheduler(num_train_timesteps=1000, **config)
    actual = alphas_cumprod({**config, "num_train_timesteps": 1000})
    assert torch.equal(actual, reference.alphas_cumprod)
    latents, noise = torch.randn(2, 6, 4, 8, 8)
    timesteps = timesteps_of(torch.rand(6), 0, 1000)
    alphas = actual[timesteps]
    noised = reference.add_noise(latents, noise, timesteps)
    assert torch.equal(add_noise(latents, noise, alphas), noised)
    velocity = reference.get_velocity(latents, noise, timesteps)
    assert torch.equal(target_of("v_prediction", latents, noise, alphas), velocity)
    assert torch.equal(target_of("epsilon", latents, noise, alphas), noise)


def test_zero_terminal_snr_is_ddpms() -> None:
    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
    }
    actual, reference = alphas_cumprod(config), DDPMScheduler(**config).alphas_cumprod
    assert actual[-1] == 0
    assert torch.allclose(actual[:-1], reference[:-1], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("change", [{"beta_start": None}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_an_unknown_schedule_is_refused(change: dict[str, Any]) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
    with pytest.raises(ValueError, match="the base's scheduler has"):
        alphas_cumprod({**config, **change})


def test_times_cover_all_timesteps_evenly() -> None:
    assert timesteps_of(torch.tensor([0.0, 0.0009, 0.001, 0.9995, 1.0]), 0, 1000).tolist() == [
        0,
        0,
        1,
        999,
        999,
    ]


def plain_loss(unet: Any, schedule: DDPMScheduler, kind: str, batch: Any) -> torch.Tensor:
    """The training loss as the diffusers example script computes it."""
    timesteps = (batch.times * 1000).long()
    noised = schedule.add_noise(batch.latents, batch.noise, timesteps)
    predicted = unet(
        noised,
        timesteps,
        encoder_hidden_states=batch.prompt,
        added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids},
    ).sample
    if kind == "epsilon":
        target = batch.noise
    else:
        target = schedule.get_velocity(batch.latents, batch.noise, timesteps)
    loss = torch.nn.functional.mse_loss(predicted, target, reduction="none")
    return loss.mean(dim=[1, 2, 3])


def make_config(cache: Path, base: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"out": Path("unused"), "device": "cpu", "steps": 1}
    return TrainConfig(caches=(CacheUse(cache),), base=str(base), **{**defaults, **settings})


def batches_of(cache: Path, size: int, batch_size: int | None = None) -> Any:
    opened = Cache(cache)
    plan = Plan(opened.groups(), 0, size)
    share = RankShare(batch_size=batch_size or size, world=1, rank=0)
    return Reader([opened], plan, share).epochs()


def schedule_of(base: Path) -> DDPMScheduler:
    return DDPMScheduler.from_pretrained(str(base), subfolder="scheduler")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("full", [False, True])
def test_loss_and_gradients_are_the_plain_loops(
    cache: Path, base: Path, kind: str, full: bool
) -> None:
    torch.manual_seed(0)
    targets = None if full else "all"
    config = make_config(cache, base, full=full, prediction_type=kind, targets=targets)
    learner = learner_for(config, DistContext(torch.device("cpu")))
    for parameter in learner.unet.parameters():  # LoRA starts at zero: half its gradients too
        if parameter.requires_grad and not full:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = next(batches_of(cache, 3))
    losses = learner.losses(learner.unet, batch)
    losses.mean().backward()
    actual = {n: p.grad.clone() for n, p in learner.unet.named_parameters() if p.grad is not None}
    learner.unet.zero_grad()
    expected = plain_loss(learner.unet, schedule_of(base), kind, batch)
    expected.mean().backward()
    assert torch.allclose(losses, expected, atol=1e-6, rtol=0)
    assert len(actual) > 50
    for name, parameter in learner.unet.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(actual[name], parameter.grad, atol=1e-6, rtol=1e-6), name


def test_accumulated_micro_batches_are_one_batch(cache: Path, base: Path) -> None:
    """Also where a batch is short: 5 samples as 2 + 2 + 1 weigh the same as 5 at once."""
    results = []
    for batch_size in (5, 2):
        learner = learner_for(
            make_config(cache, base, targets="all"), DistContext(torch.device("cpu"))
        )
        learner.max_grad_norm = 0.0
        batches = batches_of(cache, 5, batch_size)
        steps = [train_step(learner, batches, number, 1e-3) for number in range(3)]
        batches.close()
        results.append([[float(s.loss), float(s.grad_norm), s.num_samples] for s in steps])
    assert {row[2] for row in results[0]} == {4, 5}
    assert np.allclose(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_twenty_steps_from_the_cache_are_twenty_steps_encoding_online(
    cache: Path, images: Path, base: Path, pipeline: Any
) -> None:
    """The same noise, times and order; the reference opens images and runs VAE and encoders."""
    config = make_config(cache, base, targets="all")
    paths = {sample.key: sample for sample in samples_of(cache).values()}
    actual = learner_for(config, DistContext(torch.device("cpu")))
    reference = learner_for(config, DistContext(torch.device("cpu")))
    schedule = schedule_of(base)
    trained = [p for p in reference.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-2)
    batches, again = batches_of(cache, 2), batches_of(cache, 2)
    for number in range(20):
        loss = train_step(actual, batches, number, 1e-3).loss
        batch = next(again)
        members = [paths[key] for key in batch.keys]
        inputs = [
            pixels_of(images / member.path, member.tensors["sizes"][0].tolist())
            for member in members
        ]
        with torch.no_grad():
            posterior = pipeline.vae.encode(torch.stack(inputs)).latent_dist
            captions = [member.captions[0] for member in members]
            prompt, _, pooled, _ = pipeline.encode_prompt(
                captions, do_classifier_free_guidance=False
            )
        # The latent's draw is the reader's: its noise is what the cached posterior was drawn with.
        std = torch.stack([member.tensors["latents.std"][0] for member in members])
        mean = torch.stack([member.tensors["latents.mean"][0] for member in members])
        draw = (batch.latents - mean) / std
        online = posterior.mean * SCALING + posterior.std * SCALING * draw
        encoded = replace(batch, latents=online, prompt=prompt, pooled=pooled)
        optimizer.zero_grad()
        expected = plain_loss(reference.unet, schedule, "epsilon", encoded).mean()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], 1.0
        )
        optimizer.step()
        assert abs(float(loss) - float(expected.detach())) <= 1e-5
    batches.close(), again.close()


def test_the_latent_is_drawn_afresh_from_the_posterior(cache: Path) -> None:
    stored = {s.key: s.tensors for s in samples_of(cache).values()}
    draws: dict[str, list[torch.Tensor]] = {}
    batches = batches_of(cache, 7)
    for _ in range(2 * 3):  # two epochs: 5, 5 and 4 samples
        batch = next(batches)
        for key, latents in zip(batch.keys, batch.latents, strict=True):
            standard = (latents - stored[key]["latents.mean"][0]) / stored[key]["latents.std"][0]
            draws.setdefault(key, []).append(standard)
    batches.close()
    assert len(draws) == 14
    for first, second in draws.values():
        assert not torch.allclose(first, second, atol=0.1)
    every = torch.cat([part.flatten() for pair in draws.values() for part in pair])
    assert abs(float(every.mean())) < 0.05 and abs(float(every.std()) - 1) < 0.05


def test_a_latent_mapped_by_the_fitted_colors_looks_like_its_image(
    cache: Path, images: Path
) -> None:
    """The map is the least-squares one: numpy finds the same from the samples."""
    manifest = json.loads((cache / "manifest.json").read_text())
    rows, colors = [], []
    for path, sample in samples_of(cache).items():
        pixels = pixels_of(images / path, sample.tensors["sizes"][0].tolist())
        small = torch.nn.functional.avg_pool2d(pixels[None], 8)[0]
        colors.append(small.flatten(1).T.numpy())
        rows.append(sample.tensors["latents.mean"][0].flatten(1).T.numpy())
    latents = np.concatenate(rows).astype(np.float64)
    design = np.concatenate([latents, np.ones((len(latents), 1))], axis=1)
    solved = np.linalg.lstsq(design, np.concatenate(colors).astype(np.float64), rcond=None)[0]
    fitted = np.array([*manifest["latent_rgb"]["weight"], manifest["latent_rgb"]["bias"]])
    assert np.allclose(fitted, solved, atol=1e-3)
    assert np.allclose(manifest["latents"]["mean"], latents.mean(axis=0), atol=1e-6)
    assert np.allclose(manifest["latents"]["std"], latents.std(axis=0), atol=1e-6)


def test_the_loss_is_a_mean_per_sample() -> None:
    a, b = torch.randn(2, 3, 4, 5, 6)
    result = masked_mean(errors(a, b, "mse", 0.1), None)
    assert torch.allclose(result, ((a - b) ** 2).mean(dim=(1, 2, 3)))
