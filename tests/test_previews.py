"""Preview prompts: as the pipeline encodes them, kept or refused, and drawn without a trace."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import Encode
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from runs import draw_sheet
from torch.distributed.fsdp import fully_shard

import cli
from precompute.images.decode import open_image
from precompute.images.variants import normalize, render
from precompute.prompts import change_prompts
from sdxl.base import open_base
from sdxl.latent_rgb import LatentSums, latents_to_rgb, mean_colors
from sdxl.load import load_scheduler, load_unet, load_vae
from sdxl.sampling import decode_latents
from shards.buckets import cover
from shards.format import CacheError
from shards.manifest import MANIFEST, PROMPTS, read_manifest
from shards.previews import PreviewFile
from shards.reader import Cache
from shards.verify import verify
from train.preview import TILE, PreviewPrompts, read_preview_prompts

LINES = "a red circle\n# mine\na blue square --n a black square --w 80 --h 48 --d 9 --s 3 --l 1.5\n"
OTHER = "a green triangle\n"
LINE_HEIGHT = 18  # of a sheet's captions, pixels
GAP = 4  # pixels between its images
BUCKETS = {(64, 64): (64, 64), (85, 53): (80, 48), (53, 85): (48, 80)}  # of the images' sizes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "cache"))


@pytest.fixture(scope="module")
def prompted(cache: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache with the prompts of LINES. Not to be changed."""
    folder = tmp_path_factory.mktemp("prompted")
    (folder / "prompts.txt").write_text(LINES)
    shutil.copytree(cache, folder / "cache")
    change_prompts(folder / "cache", folder / "prompts.txt", str(base), "cpu")
    return folder / "cache"


@pytest.fixture(scope="module")
def previews(prompted: Path) -> PreviewPrompts:
    result = read_preview_prompts(Cache(prompted))
    assert result is not None
    return result


@pytest.fixture
def unet(base: Path) -> Any:
    return load_unet(open_base(base).unet, torch.float32)


def run(*arguments: Any) -> tuple[int, str]:
    """Exit code and output of a command."""
    result = CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def refused(cache: Path, file: Path, base: Path) -> str:
    """The one line of the prompts command's refusal; the cache stays as it was."""
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    code, output = run("prompts", cache, file, "--base", base, "--device", "cpu")
    assert code == 2, output
    (line,) = (line for line in output.splitlines() if line.startswith("Error: "))
    assert before == {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    return line


def faults_of(folder: Path) -> list[str]:
    return [str(fault) for faults in verify(folder, read_manifest(folder)) for fault in faults]


def texts_of(folder: Path) -> list[str]:
    return [row["text"] for row in PreviewFile.from_bytes((folder / PROMPTS).read_bytes()).prompts]


def forward(unet: Any, previews: PreviewPrompts) -> torch.Tensor:
    """One pass as in training: a latent of 8 x 8 with the first prompt."""
    time_ids = torch.tensor([[64, 64, 0, 0, 64, 64]])
    predicted: torch.Tensor = unet(
        torch.randn(1, 4, 8, 8),
        torch.tensor(500),
        encoder_hidden_states=previews.prompt.prompt[:1],
        added_cond_kwargs={"text_embeds": previews.prompt.pooled[:1], "time_ids": time_ids},
    ).sample
    return predicted


def tiles_of(sheet: Image.Image) -> Iterator[np.ndarray]:
    """The images of a sheet of one row, [TILE, TILE, 3]."""
    pixels = np.asarray(sheet).astype(int)
    top = pixels.shape[0] - TILE - LINE_HEIGHT - GAP  # a title, where there is one
    assert top in (0, LINE_HEIGHT)
    for left in range(0, pixels.shape[1], TILE + GAP):
        yield pixels[top : top + TILE, left : left + TILE]


def test_the_embeddings_are_encode_prompts(prompted: Path, base: Path) -> None:
    """Bit for bit, when the reference sees the same batch."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    texts = ["", "a black square", "a blue square", "a red circle"]
    prompt, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    stored = safetensors.torch.load_file(prompted / PROMPTS)
    assert torch.equal(stored["prompt_embeds"], prompt[[3, 2]])
    assert torch.equal(stored["pooled_prompt_embeds"], pooled[[3, 2]])
    assert torch.equal(stored["negative.prompt_embeds"][1], prompt[1])
    assert torch.equal(stored["negative.pooled_prompt_embeds"][1], pooled[1])
    # No negative: what the pipeline takes then, zeros by this base's config.
    _, negative, _, pooled = pipeline.encode_prompt("a red circle")
    assert torch.equal(stored["negative.prompt_embeds"][:1], negative)
    assert torch.equal(stored["negative.pooled_prompt_embeds"][:1], pooled)
    assert not negative.any()


def test_a_base_of_the_other_unconditional_gives_the_encoded_empty_prompt(
    copy: Path, base: Path, file: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(
        json.dumps(index | {"force_zeros_for_empty_prompt": False})
    )
    change_prompts(copy, file, str(other), "cpu")
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(other))
    _, negative, _, _ = pipeline.encode_prompt("a red circle")
    stored = safetensors.torch.load_file(copy / PROMPTS)["negative.prompt_embeds"][:1]
    assert negative.any()
    assert torch.allclose(stored, negative, atol=1e-5)  # of another batch size


def test_the_reader_gives_what_the_file_said(previews: PreviewPrompts, prompted: Path) -> None:
    first, second = previews.prompts
    assert (first.text, first.width, first.seed) == ("a red circle", None, None)
    assert (second.text, second.negative, second.width, second.height) == (
        "a blue square",
        "a black square",
        80,
        48,
    )
    assert (second.seed, second.num_steps, second.guidance_scale) == (9, 3, 1.5)
    assert previews.size == (64, 64)  # of 48x80, 64x64 and 80x48
    assert len(previews.prompt) == len(previews.negative) == 2
    assert faults_of(prompted) == []


def test_the_command_needs_no_dataset_and_writes_the_same_bytes(
    copy: Path, prompted: Path, base: Path, file: Path
) -> None:
    code, output = run("prompts", copy, file, "--base", base, "--device", "cpu")
    assert code == 0, output
    assert output == f"{copy / PROMPTS}: 2 preview prompts\n"
    for name in (PROMPTS, MANIFEST):
        assert (copy / name).read_bytes() == (prompted / name).read_bytes()
    file.write_text(OTHER)
    assert run("prompts", copy, file, "--base", base)[0] == 0
    assert texts_of(copy) == ["a green triangle"] and faults_of(copy) == []


def test_a_split_cache_gets_them_for_training(
    split_cache: Path, base: Path, file: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(split_cache, tmp_path / "cache"))
    path, count = change_prompts(copy, file, str(base), "cpu")
    assert (path, count) == (copy / "train" / PROMPTS, 2)
    assert not (copy / "val" / PROMPTS).exists()
    assert safetensors.torch.load_file(path)["prompt_embeds"].dtype == torch.float16
    previews = read_preview_prompts(Cache(copy / "train"))
    assert previews is not None and len(previews.prompts) == 2
    assert read_preview_prompts(Cache(copy / "val")) is None


def test_other_prompts_leave_the_digest_of_the_data(cache: Path, prompted: Path) -> None:
    without, with_ = Cache(cache), Cache(prompted)
    assert without.manifest["digest"] != with_.manifest["digest"]
    assert without.data_digest == with_.data_digest == without.manifest["digest"]


def test_other_data_has_another_digest(split_cache: Path, cache: Path) -> None:
    folders = (cache, split_cache / "train", split_cache / "val")
    assert len({Cache(folder).data_digest for folder in folders}) == 3


def test_any_flipped_bit_is_found_by_verify_and_refused_by_the_reader(
    prompted: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(prompted, tmp_path / "cache"))
    path, opened = copy / PROMPTS, Cache(copy)
    complete, choices = path.read_bytes(), random.Random(0)
    for _ in range(50):
        data = bytearray(complete)
        data[choices.randrange(len(data))] ^= 1 << choices.randrange(8)
        path.write_bytes(data)
        assert faults_of(copy) == [f"{path}: damaged (sha256 differs)"]
        with pytest.raises(CacheError, match=r"prompts.safetensors: damaged, .*cli.py prompts"):
            read_preview_prompts(opened)
        with pytest.raises(ValueError):
            PreviewFile.from_bytes(bytes(data))
    path.unlink()
    assert faults_of(copy) == [f"{path}: missing"]
    with pytest.raises(CacheError, match=r"prompts.safetensors: cannot be read .*cli.py prompts"):
        read_preview_prompts(opened)


def test_only_the_prompts_are_vouched_for_anew(copy: Path, base: Path, file: Path) -> None:
    """Damage elsewhere stays damage."""
    path = copy / "unconditional.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    change_prompts(copy, file, str(base), "cpu")
    assert faults_of(copy) == [f"{path}: damaged (sha256 differs)"]


def test_a_command_that_was_killed_is_refused_by_name_and_mended(
    copy: Path,
    base: Path,
    file: Path,
    images: Path,
    encode_to: Encode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the file and the manifest; the command or an encode makes it good."""
    change_prompts(copy, file, str(base), "cpu")
    file.write_text(OTHER)
    for mend in (
        lambda: change_prompts(copy, file, str(base), "cpu"),
        lambda: encode_to(images, copy, dtype="fp32"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("precompute.prompts.update_side_file_digest", lambda *_: sys.exit(9))
            with pytest.raises(SystemExit):
                change_prompts(copy, file, str(base), "cpu")
        with pytest.raises(CacheError, match=r"not the one the manifest names; make it again"):
            read_preview_prompts(Cache(copy))
        mend()
        assert faults_of(copy) == [] and texts_of(copy) == ["a green triangle"]
        file.write_text(LINES)
        change_prompts(copy, file, str(base), "cpu")
        file.write_text(OTHER)


def test_refusals(copy: Path, base: Path, file: Path, tmp_path: Path) -> None:
    assert "nowhere: no such folder" in refused(tmp_path / "nowhere", file, base)
    assert "an SDXL base; give the cache that encode made" in refused(base, file, base)
    assert "missing.txt: no such file" in refused(copy, tmp_path / "missing.txt", base)
    file.write_text("a cat\na dog --x 3\n")
    assert "prompts.txt, line 2: unknown option --x" in refused(copy, file, base)
    file.write_text("# none\n")
    assert "prompts.txt: no prompts found" in refused(copy, file, base)
    file.write_text(LINES)
    assert "no SDXL base: it has no text_encoder/" in refused(copy, file, tmp_path)
    (copy / MANIFEST).unlink()
    line = refused(copy, file, base)
    assert "the cache is unfinished; run the same encode again" in line


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer_2"])
def test_a_base_of_other_text_encoders_is_refused(
    copy: Path, base: Path, file: Path, tmp_path: Path, part: str
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    if part.startswith("tokenizer"):
        (other / part / "tokenizer.json").unlink()  # it would win over the merges
        merges = other / part / "merges.txt"
        merges.write_text(merges.read_text() + "a n\n")
    else:
        path = other / part / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        name = sorted(tensors)[0]
        safetensors.torch.save_file(tensors | {name: tensors[name] + 1}, path)
    line = refused(copy, file, other)
    assert f"{copy}: made with another {part} than {other} holds; give the base" in line


def test_embeddings_that_overflow_the_caches_dtype_are_refused(
    split_cache: Path, base: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl.text_encoders import Conditioning, TextEncoders

    copy = Path(shutil.copytree(split_cache, tmp_path / "cache"))
    encode = TextEncoders.encode

    def too_large(self: TextEncoders, prompts: list[str], batch_size: int) -> Conditioning:
        encoded = encode(self, prompts, batch_size)
        return Conditioning(encoded.prompt, encoded.pooled * 1e9)

    monkeypatch.setattr(TextEncoders, "encode", too_large)
    line = refused(copy, file, base)
    assert "the pooled_prompt_embeds of 'a red circle' is not finite in fp16" in line


@pytest.mark.filterwarnings("ignore:.*settings changed")
@pytest.mark.filterwarnings("ignore:--batch-size 3")
def test_encode_takes_prompts_and_keeps_them(
    cache: Path, prompted: Path, images: Path, encode_to: Encode, file: Path, tmp_path: Path
) -> None:
    def encode(**settings: Any) -> dict[str, int]:
        encode_to(images, out, **{"dtype": "fp32", **settings})
        assert faults_of(out) == []
        return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    out = tmp_path / "out"
    first = encode(preview_prompts=file)
    for name in (PROMPTS, MANIFEST):  # as the command would have done
        assert (out / name).read_bytes() == (prompted / name).read_bytes()
    assert encode()[PROMPTS] == encode(preview_prompts=file)[PROMPTS] == first[PROMPTS]
    file.write_text(OTHER)
    changed = encode(preview_prompts=file)
    shards = {name for name in first if name.endswith((".tar", ".index"))}
    assert len(shards) == 6 and all(first[name] == changed[name] for name in shards)
    assert texts_of(out) == ["a green triangle"]
    assert Cache(out).data_digest == Cache(cache).data_digest
    encode(batch_size=3, shard_size=2)  # all shards anew, and still the same text encoders
    assert texts_of(out) == ["a green triangle"]
    with pytest.warns(UserWarning, match=r"another dtype: removed; `python cli.py prompts`"):
        encode(dtype="bf16")
    assert not (out / PROMPTS).exists()


def test_prompts_outlive_an_encode_that_is_interrupted(
    prompted: Path, images: Path, encode_to: Encode, tmp_path: Path
) -> None:
    """Without a manifest the file vouches for itself; where it cannot, it goes."""
    out = Path(shutil.copytree(prompted, tmp_path / "out"))
    complete = (out / PROMPTS).read_bytes()
    min(out.glob("*.index")).unlink()
    (out / MANIFEST).unlink()
    encode_to(images, out, dtype="fp32")
    assert (out / PROMPTS).read_bytes() == complete
    (out / MANIFEST).unlink()
    (out / PROMPTS).write_bytes(complete[:-1] + bytes([complete[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"prompts.safetensors: damaged: removed"):
        encode_to(images, out, dtype="fp32")
    assert faults_of(out) == [] and not (out / PROMPTS).exists()


def test_encode_reads_the_prompts_before_all_else(
    images: Path, base: Path, file: Path, tmp_path: Path
) -> None:
    file.write_text("a cat --w 63\n")
    out = tmp_path / "out"
    code, output = run("encode", images, "--base", base, "--out", out, "--preview-prompts", file)
    assert code == 2 and "prompts.txt, line 1: option --w" in output
    assert not out.exists()


class ColorVae:
    """A VAE whose latents are the colors of 8 x 8 pixels, mixed: what a trained one is nearly."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.config = {"scaling_factor": 0.25, "shift_factor": 0.7}
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def scaled(self, images: torch.Tensor) -> torch.Tensor:
        colors = F.avg_pool2d(images.double(), 8)
        return (torch.einsum("cr,nrhw->nchw", self.mix, colors) - 0.7).float() * 0.25

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        colors = torch.einsum("rc,nchw->nrhw", torch.linalg.pinv(self.mix), latents.double())
        return (F.interpolate(colors, scale_factor=8).float(),)


def rendered(path: Path) -> torch.Tensor:
    """A drawn image in its bucket, [1, 3, H, W] in -1..1."""
    image = open_image(path.read_bytes())
    return normalize(render(image, cover(image.size, BUCKETS[image.size])))[None]


def test_the_maps_colors_are_those_of_the_decoded_image(images: Path) -> None:
    vae, sums = ColorVae(), LatentSums.empty(4)
    drawn = [rendered(path) for path in sorted(images.glob("*.png"))]
    for image in drawn:
        sums.add(vae.scaled(image), mean_colors(image))
    fitted = sums.fit()
    fit = {name: torch.tensor(fitted[name]) for name in ("weight", "bias")}
    mapped, decoded = [], []
    for image in drawn:
        latents = vae.scaled(image)
        rgb = latents_to_rgb(latents, **fit)
        assert rgb.shape == (1, 3, *latents.shape[2:]) and rgb.dtype == torch.float32
        assert rgb.min() >= 0 and rgb.max() <= 1
        mapped.append(rgb.flatten())
        decoded.append(F.avg_pool2d(decode_latents(vae, latents), 8).flatten())
    first, second = torch.cat(mapped), torch.cat(decoded)
    assert np.corrcoef(first, second)[0, 1] > 0.999
    assert (first - second).abs().max() < 0.01


def test_the_cached_map_is_the_best_linear_one(prompted: Path, images: Path) -> None:
    """Against numpy's least squares, on latents as cached and images as files."""
    latents, colors, drawn = [], [], []
    opened = Cache(prompted)
    fitted = opened.manifest["latent_rgb"]
    linear = {name: torch.tensor(fitted[name]) for name in ("weight", "bias")}
    for group in opened.groups():
        for row in range(group.count):
            shard, at = opened.locate(group, row)
            mean = torch.empty(shard.index.layout.shape("latents.mean"))
            shard.read_into(mean, at, "latents.mean")
            image = rendered(images / shard.metadata(at)["path"])[0]
            latents.append(mean.flatten(1).T)
            colors.append(F.avg_pool2d(image, 8).flatten(1).T)
            drawn.append(latents_to_rgb(mean[None], **linear)[0].flatten(1).T)
    design = np.concatenate([torch.cat(latents), np.ones((len(torch.cat(latents)), 1))], axis=1)
    best = design @ np.linalg.lstsq(design, torch.cat(colors).numpy(), rcond=None)[0]
    assert np.abs(torch.cat(drawn).numpy() - (best / 2 + 0.5).clip(0, 1)).max() < 1e-3


def test_a_sheet_shows_what_the_pipeline_draws(
    base: Path, unet: Any, previews: PreviewPrompts
) -> None:
    """In true color, the same seeds, sizes and settings give diffusers' own images."""
    vae = load_vae(open_base(base).vae, torch.float32)
    sheet = draw_sheet(
        unet,
        load_scheduler(open_base(base)),
        previews,
        vae=vae,
        num_steps=4,
        guidance_scale=3.0,
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    pipeline.set_progress_bar_config(disable=True)
    first = pipeline(
        "a red circle",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    second = pipeline(
        "a blue square",
        negative_prompt="a black square",
        width=80,
        height=48,
        num_inference_steps=3,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    expected = Image.new("RGB", (2 * TILE, TILE), "white")
    expected.paste(first.resize((TILE, TILE)), (0, 0))
    expected.paste(second.resize((TILE, 307)), (TILE, 102))
    for actual, reference in zip(
        tiles_of(sheet), np.split(np.asarray(expected).astype(int), 2, axis=1), strict=True
    ):
        assert np.abs(actual - reference).max() <= 2 and actual.std() > 10


def test_without_a_vae_the_colors_are_of_the_map(
    base: Path, unet: Any, previews: PreviewPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def keep(latents: torch.Tensor, **fit: torch.Tensor) -> torch.Tensor:
        kept.append(latents_to_rgb(latents, **fit))
        return kept[-1]

    monkeypatch.setattr("train.preview.latents_to_rgb", keep)
    sheet = draw_sheet(unet, load_scheduler(open_base(base)), previews, num_steps=2)
    first, second = tiles_of(sheet)
    assert [rgb.shape for rgb in kept] == [(1, 3, 8, 8), (1, 3, 6, 10)]
    inner = first.reshape(8, 64, 8, 64, 3)[:, 24:40, :, 24:40].mean(axis=(1, 3))
    expected = kept[0][0].permute(1, 2, 0).numpy() * 255
    assert np.corrcoef(inner.flatten(), expected.flatten())[0, 1] > 0.98
    assert (second[:100] == 255).all() and (second[-100:] == 255).all()


def test_drawing_leaves_no_trace(base: Path, unet: Any, previews: PreviewPrompts) -> None:
    unet.train()
    unet.mid_block.eval()
    unet.enable_gradient_checkpointing()
    unet.conv_in.requires_grad_(True)
    torch.manual_seed(5)
    scheduler = load_scheduler(open_base(base))
    modes = [module.training for module in unet.modules()]
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    before, settings = torch.get_rng_state(), dict(scheduler.config)
    first = draw_sheet(unet, scheduler, previews, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in unet.modules()] == modes
    assert unet.is_gradient_checkpointing and torch.is_grad_enabled()
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert dict(scheduler.config) == settings
    torch.randn(3)
    assert draw_sheet(unet, scheduler, previews, num_steps=2).tobytes() == first.tobytes()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    unet.forward = fail
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        draw_sheet(unet, scheduler, previews, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in unet.modules()] == modes


def test_under_autocast_training_keeps_its_gradients(
    base: Path, unet: Any, previews: PreviewPrompts
) -> None:
    """Drawn inside the caller's autocast, no weight cast without gradients may be left behind."""
    unet.requires_grad_(True)
    scheduler = load_scheduler(open_base(base))
    exact = draw_sheet(unet, scheduler, previews, num_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = draw_sheet(unet, scheduler, previews, autocast=torch.bfloat16, num_steps=2)
        plain = draw_sheet(unet, scheduler, previews, num_steps=2)
        predicted = forward(unet, previews)
    predicted.float().sum().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None]
    assert not without
    assert plain.tobytes() == exact.tobytes()
    difference = np.abs(np.asarray(rough).astype(int) - np.asarray(exact))
    assert 0 < difference.mean() < 12


def test_a_sharded_unet_is_drawn_and_still_trains(
    base: Path, unet: Any, previews: PreviewPrompts
) -> None:
    """FSDP gathers weights into buffers made by its first forward: they must take gradients."""
    scheduler = load_scheduler(open_base(base))
    expected = draw_sheet(unet, scheduler, previews, num_steps=2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        unet.requires_grad_(True)
        fully_shard(unet, mesh=dist.init_device_mesh("cpu", (1,)))
        assert draw_sheet(unet, scheduler, previews, num_steps=2).tobytes() == expected.tobytes()
        forward(unet, previews).sum().backward()
        assert all(parameter.grad is not None for parameter in unet.parameters())
    finally:
        dist.destroy_process_group()


def test_a_lora_in_half_precision_is_drawn(base: Path, previews: PreviewPrompts) -> None:
    """A frozen base in bf16 with fp32 adapters, as a LoRA run has it."""
    from peft import LoraConfig

    unet = load_unet(open_base(base).unet, torch.bfloat16)
    scheduler = load_scheduler(open_base(base))
    plain = draw_sheet(unet, scheduler, previews, num_steps=2)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"]))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.full(parameter.shape, 0.2)
    for autocast in (None, torch.bfloat16):
        sheet = draw_sheet(unet, scheduler, previews, autocast=autocast, num_steps=2)
        assert np.abs(np.asarray(sheet).astype(int) - np.asarray(plain)).mean() > 1


def test_a_run_that_went_astray_still_has_a_sheet(
    base: Path, unet: Any, previews: PreviewPrompts
) -> None:
    unet.conv_out.bias.data.fill_(float("nan"))
    (first, _) = tiles_of(draw_sheet(unet, load_scheduler(open_base(base)), previews, num_steps=2))
    assert not first.any()


def test_the_sampler_is_told_what_the_run_trains(base: Path) -> None:
    plain = load_scheduler(open_base(base))
    assert plain.config.prediction_type == "epsilon"
    assert not plain.config.rescale_betas_zero_snr
    scheduler = load_scheduler(open_base(base), "v_prediction", True)
    assert type(scheduler) is type(plain)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999  # where the noise is pure
    assert scheduler.alphas_cumprod[-1] < 1e-6 < plain.alphas_cumprod[-1]
    again = load_scheduler(open_base(base), None, False)
    assert dict(again.config) == dict(plain.config)


def test_the_prediction_type_changes_the_sheet(
    base: Path, unet: Any, previews: PreviewPrompts
) -> None:
    sheets = [
        np.asarray(
            draw_sheet(unet, load_scheduler(open_base(base), *arguments), previews, num_steps=3)
        )
        for arguments in ((), ("epsilon", False), ("v_prediction", False), ("v_prediction", True))
    ]
    assert np.array_equal(sheets[0], sheets[1])
    assert np.abs(sheets[1].astype(int) - sheets[2]).mean() > 5
    assert np.abs(sheets[2].astype(int) - sheets[3]).mean() > 1


def test_a_sampler_without_zero_snr_is_warned_of(base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    config = other / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text()) | {"_class_name": "PNDMScheduler"}
    config.write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"without rescale_betas_zero_snr: .* PNDMScheduler"):
        assert load_scheduler(open_base(other), "v_prediction", True).config.skip_prk_steps is False


def test_a_cache_without_images_is_refused(prompted: Path) -> None:
    opened = Cache(prompted)
    empty = SimpleNamespace(folder=prompted, manifest=opened.manifest, groups=list)
    with pytest.raises(CacheError, match="holds no image"):
        read_preview_prompts(empty)  # type: ignore[arg-type]
