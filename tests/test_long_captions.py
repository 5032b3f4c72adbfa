"""Captions of several chunks: encoded as plain pieces are, and carried from cache to image."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from infer.generate import generate
from infer.settings import GenerateSettings, LoraUse
from precompute.prompts import change_prompts
from sdxl.base import open_base
from sdxl.lora.apply import read_num_chunks
from sdxl.metadata import read_long_captions
from sdxl.text_encoders import TextEncoders
from shards.reader import Cache
from tests.conftest import Encode
from tests.made import config_of
from train.loop import train
from train.option_values import CacheUse, Every

CPU = torch.device("cpu")
BATCH = 4


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(str(base))


@pytest.fixture(scope="module")
def words(base: Path, pipeline: Any) -> list[str]:
    """Words of one token each."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokenizer = pipeline.tokenizer
    results = [letter for letter in letters if len(tokenizer(letter).input_ids) == 3]
    assert len(results) > 10
    return results


def reference(pipeline: Any, text: str, num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own embeddings of each 75 words, one after the other."""
    pieces = [text.split()[start : start + 75] for start in range(0, 75 * num_chunks, 75)]
    results = [
        pipeline.encode_prompt(
            [" ".join(piece)] + [""] * (BATCH - 1), do_classifier_free_guidance=False
        )
        for piece in pieces
    ]
    return torch.cat([item[0][0] for item in results]), results[0][2][0]


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_chunks_are_what_the_pipeline_makes_of_each_piece(
    base: Path, pipeline: Any, words: list[str], num_chunks: int
) -> None:
    draw = random.Random(num_chunks)
    lengths = [0, 1, 74, 75, 76, 149, 150, 151, 300]
    texts = [" ".join(draw.choices(words, k=length)) for length in lengths]
    encoders = TextEncoders(open_base(base), torch.float32, CPU, num_chunks)
    encoded = encoders.encode(texts, BATCH)
    assert encoded.prompt.shape[:2] == (len(texts), 77 * num_chunks)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        prompt, pooled = reference(pipeline, text, num_chunks)
        assert torch.equal(encoded.prompt[row], prompt), length
        assert torch.equal(encoded.pooled[row], pooled), length
        assert encoders.is_cut(text) == (length > 75 * num_chunks)


def test_one_chunk_is_the_pipelines_own(base: Path, pipeline: Any) -> None:
    """Also of text that is no words."""
    texts = ["caf\u00e9 \U0001f642!", "a, b; (c:1.2)\n\td", "x" * 500, "  ", "<|endoftext|> a"]
    encoded = TextEncoders(open_base(base), torch.float32, CPU).encode(texts, len(texts))
    prompt, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    assert torch.equal(encoded.prompt, prompt)
    assert torch.equal(encoded.pooled, pooled)


# Through the command line of each stage.


@pytest.fixture(scope="module")
def long_cache(
    tmp_path_factory: pytest.TempPathFactory, images: Path, encode_to: Encode, words: list[str]
) -> Path:
    """Some captions of 100 words, the others short; in two chunks, with preview prompts."""
    folder = tmp_path_factory.mktemp("long")
    shutil.copytree(images, folder / "set")
    for number, path in enumerate(sorted((folder / "set").glob("*.txt"))):
        if number % 2:
            path.write_text(" ".join(random.Random(number).choices(words, k=100)))
    (folder / "prompts.txt").write_text("short\n" + " ".join(words * 4) + " --n bad\n")
    return encode_to(
        folder / "set",
        folder / "cache",
        dtype="fp32",
        long_captions=2,
        preview_prompts=folder / "prompts.txt",
    )


def test_a_cache_of_two_chunks(long_cache: Path, pipeline: Any, base: Path) -> None:
    cache = Cache(long_cache)
    assert cache.manifest["recipe"]["long_captions"] == 2
    assert cache.manifest["text"]["tokens"] == 154
    assert all(shard.index.header["num_cut_captions"] == 0 for shard in cache.shards())
    for shard in cache.shards():
        for row in range(len(shard.index)):
            (caption,) = shard.metadata(row)["captions"]
            result = torch.empty(154, cache.manifest["text"]["depth"])
            shard.read_into(result, row, "prompt_embeds")
            assert torch.equal(result, reference(pipeline, caption, 2)[0])
    empty = safetensors.torch.load_file(long_cache / "unconditional.safetensors")
    assert torch.equal(empty["empty.prompt_embeds"][0], reference(pipeline, "", 2)[0])


def test_new_preview_prompts_have_as_many_chunks(
    long_cache: Path, base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(long_cache, tmp_path / "cache"))
    before = safetensors.torch.load_file(copy / "prompts.safetensors")
    assert before["prompt_embeds"].shape[1] == before["negative.prompt_embeds"].shape[1] == 154
    (tmp_path / "more.txt").write_text("another\n")
    change_prompts(copy, tmp_path / "more.txt", str(base), "cpu")
    after = safetensors.torch.load_file(copy / "prompts.safetensors")
    assert after["prompt_embeds"].shape[:2] == (1, 154)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_run_says_it_and_generate_obeys(
    long_cache: Path, base: Path, tmp_path: Path, full: bool, words: list[str]
) -> None:
    config = config_of(
        base,
        long_cache,
        out=tmp_path / "run",
        full=full,
        steps=2,
        preview_every=Every(2),
        checkpoint_every=Every(1),
    )
    weights = train(config)
    assert (tmp_path / "run" / "previews" / "step-000002.png").exists()
    read = read_long_captions if full else read_num_chunks
    assert read(weights) == 2
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert read(next(checkpoint.rglob("unet" if full else "*lora*.safetensors"))) == 2
    text = random.Random(0).choices(words, k=200)
    how: dict[str, Any] = {"unet": weights} if full else {"lora": (LoraUse(weights),)}

    def drawn(name: str, num_words: int, **how: Any) -> Any:
        out, prompt = tmp_path / name, " ".join(text[:num_words])
        settings = {"base": str(base), "num_steps": 2, "size": "64", "device": "cpu"}
        generate(GenerateSettings(out=out, prompt=prompt, **settings, **how))
        return np.asarray(Image.open(out / "000000.png"))

    long = drawn("long", 150, **how)
    assert (long != drawn("short", 75, **how)).any(), "the second chunk counts"
    with pytest.warns(UserWarning, match="cut at 154 tokens"):
        assert (long == drawn("longer", 200, **how)).all()


def test_caches_of_other_chunks_do_not_mix(
    long_cache: Path, cache: Path, base: Path, tmp_path: Path
) -> None:
    config = config_of(
        base, out=tmp_path / "run", caches=(CacheUse(long_cache), CacheUse(cache)), steps=1
    )
    with pytest.raises(ValueError, match=r"captions have 77 tokens, and those of .* 154"):
        train(config)


def test_a_damaged_note_is_no_other_number(tmp_path: Path) -> None:
    assert read_long_captions(tmp_path) == 1
    for text in ("", "[]", '{"long_captions": 0}', '{"long_captions": "2"}'):
        (tmp_path / "shardtune.json").write_text(text)
        with pytest.raises(ValueError, match=r"shardtune\.json: damaged"):
            read_long_captions(tmp_path)
    (tmp_path / "shardtune.json").write_text(json.dumps({"long_captions": 3}))
    assert read_long_captions(tmp_path) == 3
