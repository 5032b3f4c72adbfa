"""Writes the embeddings of the empty prompt and of preview prompts into a cache.

Training loads no text encoder, so it takes both from there.
"""

import hashlib
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from precompute.encoders import Encoders, load_text
from precompute.recipe import read_text_recipe, text_recipe_digest
from runtime.devices import DTYPES, exact_fp32, pick_device
from runtime.files import write_durable
from runtime.locks import locked
from sdxl.base import Base, open_base
from sdxl.prompt_files import Prompt, read_prompts
from sdxl.text_encoders import Conditioning, TextEncoders
from shards.manifest import (
    LOCK,
    MANIFEST,
    PROMPTS,
    UNCONDITIONAL,
    read_manifest,
    update_side_file_digest,
)
from shards.previews import KEY, PreviewFile

BATCH_SIZE = 4  # always the same: the last bits of an embedding depend on it


def write_unconditional(
    folder: Path, encoders: TextEncoders, batch_size: int, recipe: dict[str, Any]
) -> None:
    """Write the empty prompt both ways, as zeros and encoded; ``text_shape`` reads its shapes."""
    empty = encoders.encode([""], batch_size).to(DTYPES[recipe["storage"]["dtype"]])
    zeros = empty.zeros_like()
    tensors = {
        "empty.prompt_embeds": empty.prompt,
        "empty.pooled_prompt_embeds": empty.pooled,
        "zeros.prompt_embeds": zeros.prompt,
        "zeros.pooled_prompt_embeds": zeros.pooled,
    }
    write_durable(folder / UNCONDITIONAL, _with_digest(tensors, text_recipe_digest(recipe)))


def _with_digest(tensors: dict[str, torch.Tensor], recipe_digest: str) -> bytes:
    """A file with a digest of its own, for an interrupted encode leaves no manifest to check it."""
    digest = hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()
    return safetensors.torch.save(tensors, metadata={KEY: f"{recipe_digest} {digest}"})


def unconditional_is_complete(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether an earlier run wrote the file that this one would write, up to last bits."""
    try:
        data = (folder / UNCONDITIONAL).read_bytes()
        tensors = safetensors.torch.load(data)
    except (OSError, SafetensorError):
        return False
    return _with_digest(tensors, text_recipe_digest(recipe)) == data


def text_shape(folder: Path) -> dict[str, int]:
    """``tokens`` and ``depth`` of a prompt embedding, and the width of the ``pooled`` one."""
    tensors = safetensors.torch.load((folder / UNCONDITIONAL).read_bytes())
    _, tokens, depth = tensors["empty.prompt_embeds"].shape
    return {
        "tokens": tokens,
        "depth": depth,
        "pooled": tensors["empty.pooled_prompt_embeds"].shape[1],
    }


def change_prompts(
    cache: Path, file: Path, base: str, device: str, tokenizers: Path | None = None
) -> tuple[Path, int]:
    """Replace the preview prompts of a finished cache by those of ``file``, without its dataset.

    In a cache that is split in two, previews are of ``train``. Returns the file written, and the
    number of prompts in it.

    Raises:
        ValueError: a bad prompt file, an unfinished cache, or one of other text encoders.
    """
    prompts = read_prompts(file)
    is_split = not (cache / MANIFEST).exists() and (cache / "train").is_dir()
    folder = cache / "train" if is_split else cache
    read_manifest(folder)  # raises where there is no cache, before a lock file is made
    with locked(folder / LOCK):
        recipe = read_manifest(folder)["recipe"]
        opened = open_base(base, tokenizers=tokenizers)
        _check_encoders(folder, recipe, opened)
        exact_fp32()
        num_chunks = recipe.get("long_captions", 1)
        encoders = load_text(opened, pick_device(device), num_chunks)
        write_prompts(folder, prompts, encoders, _made_with(recipe, opened))
        update_side_file_digest(folder, PROMPTS)
    return folder / PROMPTS, len(prompts)


def sync_prompts(
    folder: Path, prompts: list[Prompt] | None, encoders: Encoders, recipe: dict[str, Any]
) -> int:
    """Update the preview prompts before encode writes the manifest; with None keep the existing
    ones.

    Existing embeddings are not encoded again, and those of other text encoders are removed. Returns
    the number of prompts in the cache.
    """
    wanted = _made_with(recipe, encoders.base)
    existing = _read_existing(folder / PROMPTS)
    if prompts is not None:
        same = existing and (existing.prompts, existing.made_with) == (
            [*map(asdict, prompts)],
            wanted,
        )
        if not same:
            write_prompts(folder, prompts, encoders.text, wanted)
        return len(prompts)
    if existing is not None and existing.made_with["text"] == wanted["text"]:
        return len(existing.prompts)
    if (folder / PROMPTS).exists():
        reason = (
            "damaged" if existing is None else "made with other text encoders, or in another dtype"
        )
        warnings.warn(
            f"{folder / PROMPTS}: {reason}: removed; `python cli.py prompts` makes it again",
            stacklevel=2,
        )
        (folder / PROMPTS).unlink()
    return 0


def write_prompts(
    folder: Path, prompts: list[Prompt], encoders: TextEncoders, made_with: dict[str, Any]
) -> None:
    """Write ``prompts.safetensors``; the caller updates the manifest.

    Raises:
        ValueError: an embedding is not finite in the cache's dtype.
    """
    texts = [text for prompt in prompts for text in (prompt.text, prompt.negative)]
    embeddings = encoders.encode_each(texts, BATCH_SIZE)
    if cut := sorted({text for text in texts if text and encoders.is_cut(text)}):
        warnings.warn(
            f"{len(cut)} preview prompts are cut at {77 * encoders.num_chunks} tokens, e.g. "
            f"{cut[0][:60]!r}",
            stacklevel=2,
        )
    if any(prompt.sampler or prompt.num_images for prompt in prompts):
        warnings.warn(
            "previews are drawn once each, by the base's own sampler: --ss and --n-images are not "
            "used",
            stacklevel=2,
        )
    dtype = made_with["dtype"]
    positive = Conditioning.cat(embeddings[prompt.text] for prompt in prompts).to(DTYPES[dtype])
    negative = Conditioning.cat(embeddings[prompt.negative] for prompt in prompts).to(DTYPES[dtype])
    tensors = {
        "prompt_embeds": positive.prompt,
        "pooled_prompt_embeds": positive.pooled,
        "negative.prompt_embeds": negative.prompt,
        "negative.pooled_prompt_embeds": negative.pooled,
    }
    for name, tensor in tensors.items():
        rows = tensor.isfinite().flatten(1).all(dim=1).tolist()
        if False in rows:
            raise ValueError(
                f"{folder / PROMPTS}: the {name} of {prompts[rows.index(False)].text!r} is not "
                f"finite in {dtype}; change it, or encode the dataset with another --dtype"
            )
    preview_file = PreviewFile(
        prompts=[*map(asdict, prompts)], made_with=made_with, tensors=tensors
    )
    write_durable(folder / PROMPTS, preview_file.to_bytes())


def _made_with(recipe: dict[str, Any], base: Base) -> dict[str, Any]:
    """Everything that decides the embeddings besides the prompts."""
    return {
        "text": text_recipe_digest(recipe),
        "dtype": recipe["storage"]["dtype"],
        "unconditional": "zeros" if base.zeros_for_empty_prompt else "empty",
    }


def _read_existing(path: Path) -> PreviewFile | None:
    """The preview prompts of a cache; None if it has none, or they are damaged."""
    try:
        return PreviewFile.from_bytes(path.read_bytes())
    except (OSError, ValueError):
        return None


def _check_encoders(folder: Path, recipe: dict[str, Any], base: Base) -> None:
    """Refuse a base whose text encoders are not the cache's: the embeddings would mean nothing."""
    for name, parts in read_text_recipe(base).items():
        cached = recipe[name]
        if changed := [part for part in parts if cached.get(part) != parts[part]]:
            changed_name = (
                name.replace("text_encoder", "tokenizer") if changed == ["tokenizer"] else name
            )
            raise ValueError(
                f"{folder}: made with another {changed_name} than {base} holds; give the base it "
                "was made with as --base, or encode the dataset with this one"
            )
