"""What is wrong with a base in one file: one clear line, exit code 2."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import cli
from sdxl import BaseError
from sdxl.base import open_base
from sdxl.load import load_text_encoders, load_tokenizers, load_unet, load_vae
from sdxl.original_names import PREFIXES
from tests.singles import MODELS, parts_of, rewrite, write_single
from tests.test_promise import TOKENIZERS

BLOCK = PREFIXES["unet"] + "input_blocks.1.0."
LAYER = PREFIXES["text_encoder_2"] + "transformer.resblocks.0."


@pytest.fixture(scope="module")
def single(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single(base, tmp_path_factory.mktemp("single") / "small.safetensors")


class Commands:
    """The three commands, with a base that they refuse, and tokenizers that are good."""

    def __init__(self, folder: Path, images: Path, cache: Path, tokenizers: Path) -> None:
        self.folder, self.image_folder, self.cache = folder, images, cache
        self.tokenizers = tokenizers

    def encode(self, base: Path, tokenizers: Path | None = None) -> str:
        given = ["--tokenizers", tokenizers or self.tokenizers]
        sizes = ["--resolution", 64, "--bucket-step", 16]
        return self._refused("encode", self.image_folder, "--base", base, *given, *sizes)

    def train(self, base: Path) -> str:
        return self._refused("train", self.cache, "--base", base, "--steps", 1)

    def generate(self, base: Path) -> str:
        given = ["--prompt", "a cat", "--tokenizers", self.tokenizers]
        return self._refused("generate", "--base", base, *given)

    def _refused(self, command: str, *arguments: Any) -> str:
        out = ["--out", self.folder / "out", "--device", "cpu"]
        every = [str(argument) for argument in (command, *arguments, *out)]
        result = CliRunner().invoke(cli.commands, every)
        assert result.exit_code == 2, result.output
        (line,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
        assert "Traceback" not in result.output
        return line


@pytest.fixture
def commands(tmp_path: Path, images: Path, cache: Path, base: Path) -> Commands:
    return Commands(tmp_path, images, cache, base)


def test_a_missing_unet_tensor(commands: Commands, single: Path, tmp_path: Path) -> None:
    path = rewrite(single, {BLOCK + "in_layers.2.weight": None}, tmp_path / "one.safetensors")
    problem = f"{path}: weights of another model, or damaged: 1 tensors missing, e.g. "
    for line in (commands.train(path), commands.generate(path)):
        assert problem + "down_blocks.0.resnets.0.conv1.weight" in line


@pytest.mark.parametrize(
    ("component", "problem"),
    [("text_encoder", "text encoder 1 (CLIP-L)"), ("text_encoder_2", "text encoder 2 (OpenCLIP")],
)
def test_a_missing_text_encoder(
    commands: Commands, base: Path, tmp_path: Path, component: str, problem: str
) -> None:
    path = write_single(base, tmp_path / "one.safetensors", component)
    for line in (commands.encode(path), commands.generate(path)):
        assert f"{path}: holds no {problem}" in line


def test_a_stable_diffusion_1_file(commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    names = [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ]
    safetensors.torch.save_file({name: torch.ones(2) for name in names}, path)
    for line in (commands.encode(path), commands.train(path), commands.generate(path)):
        assert f"{path}: no SDXL base: a Stable Diffusion 1 or 2 file" in line


def test_a_truncated_file(commands: Commands, single: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(single.read_bytes()[:-1])
    for line in (commands.encode(path), commands.train(path), commands.generate(path)):
        assert f"{path}: truncated: " in line


def test_a_pickle(commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    for line in (commands.encode(path), commands.train(path), commands.generate(path)):
        assert f"{path}: a pickle: never loaded" in line
    path = path.rename(tmp_path / "one.safetensors")
    assert f"{path}: not a whole safetensors file" in commands.train(path)


def test_no_such_file(commands: Commands, tmp_path: Path) -> None:
    for name in ("nowhere.safetensors", "no/where.ckpt"):
        assert f"{tmp_path / name}: no such file" in commands.train(tmp_path / name)


def test_tokenizers_without_a_vocabulary(commands: Commands, base: Path, single: Path) -> None:
    folder = commands.folder / "tokenizers"
    assert f"{folder}: holds neither tokenizer/ nor a CLIP tokenizer" in commands.encode(
        single, folder
    )
    for name in TOKENIZERS:
        shutil.copytree(base / name, folder / name)
        (folder / name / "vocab.json").unlink()
        (folder / name / "tokenizer.json").unlink()
    line = commands.encode(single, folder)
    assert f"{folder / 'tokenizer'}: no tokenizer can be read from it: it has neither voc" in line
    (folder / "tokenizer" / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(BaseError, match="2 tokens, where text_encoder has 519"):
        load_tokenizers(open_base(single, tokenizers=folder))
    (folder / "tokenizer" / "vocab.json").write_text("{")
    assert f"{folder / 'tokenizer'}: no tokenizer can be read from it" in commands.encode(
        single, folder
    )


def refused(path: Path, component: str = "unet") -> str:
    with pytest.raises(BaseError) as refusal:
        base = open_base(path)
        if component == "unet":
            load_unet(base.unet, torch.float32)
        elif component == "vae":
            load_vae(base.vae, torch.float32)
        else:
            load_text_encoders(base, torch.float32)
    text = str(refusal.value)
    assert str(path) in text and "\n" not in text
    return text


def test_tensors_that_do_not_belong_there(commands: Commands, single: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    rewrite(single, {BLOCK + "surplus.weight": torch.ones(1)}, path)
    assert f"1 tensors unexpected, e.g. {BLOCK}surplus.weight" in refused(path)
    rewrite(single, {PREFIXES["unet"] + "input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)}, path)
    assert "an inpainting UNet, which takes 9 channels" in refused(path)
    rewrite(single, {PREFIXES["unet"] + "input_blocks.0.0.weight": torch.ones(16, 5, 3, 3)}, path)
    assert "mismatched, e.g. conv_in.weight is [16, 5, 3, 3], and not [16, 4, 3" in refused(path)
    rewrite(single, {LAYER + "attn.in_proj_bias": torch.ones(100)}, path)
    assert "100 rows are not q, k and v" in refused(path, "text_encoder")
    assert "100 rows are not q, k and v" in commands.encode(path)
    rewrite(single, {LAYER + "attn.in_proj_bias": None}, path)
    line = refused(path, "text_encoder")
    assert "3 tensors missing, e.g. text_model.encoder.layers.0.self_attn.k_proj.bias" in line


@pytest.mark.parametrize("component", MODELS)
def test_a_missing_model(base: Path, tmp_path: Path, component: str) -> None:
    path = write_single(base, tmp_path / "one.safetensors", component)
    names = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder 1"}
    assert f"holds no {names.get(component, 'text encoder 2')}" in refused(path, component)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "its UNet has no label_emb"),
        ("lora_unet_middle_block_1_proj_in.lora_down.weight", "a LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "a LoRA"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "SD3"),
        ("double_blocks.0.img_attn.proj.weight", "Flux"),
        ("conditioner.embedders.0.model.ln_final.bias", "refiner"),
        ("edm_mean", "EDM's noise schedule"),
        ("something.else", "holds no UNet"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, name: str, problem: str) -> None:
    path = tmp_path / "one.safetensors"
    safetensors.torch.save_file({name: torch.ones(2)}, path)
    assert problem in refused(path)


def test_a_small_model_without_its_configs(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(single), path)
    assert "weights of another model, or damaged" in refused(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"shardtune.configs": "{"})
    rewrite(single, {}, path)
    data = path.read_bytes().replace(b'"shardtune.configs":"{', b'"shardtune.configs":"[')
    path.write_bytes(data)
    assert "its metadata shardtune.configs is damaged" in refused(path)


def test_a_config_beside_a_vae_alone(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    safetensors.torch.save_file(parts_of(base)["vae"].tensors, path)
    assert "weights of another model" in refused(path, "vae")  # of SDXL's sizes, it would be
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    assert "weights of another model" in refused(path, "vae")
    shutil.copy(base / "vae" / "config.json", tmp_path)
    assert load_vae(open_base(path).vae, torch.float32).config.scaling_factor == 0.25
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseError, match=r"config\.json: not valid JSON"):
        load_vae(open_base(path).vae, torch.float32)


def test_a_header_that_contradicts_itself(commands: Commands, single: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    for old, new in ((b'"shape":[48]', b'"shape":[49]'), (b'"F32"', b'"F64"')):
        path.write_bytes(single.read_bytes().replace(old, new))
        assert f"{path}: damaged: " in refused(path, "text_encoder")
    path.write_bytes(single.read_bytes().replace(b'"shape":[48]', b'"shape":[49]'))
    assert f"{path}: damaged: " in commands.encode(path)


@pytest.mark.parametrize("left_bytes", [-1, 90_000, 5000, 3, 0])
def test_where_a_file_is_cut(single: Path, tmp_path: Path, left_bytes: int) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(single.read_bytes()[:left_bytes])
    problem = "truncated" if left_bytes in (-1, 90_000) else "not a whole safetensors file"
    assert problem in refused(path)
