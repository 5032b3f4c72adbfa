"""Content digests of weights: over tensors by name, so the same weights agree in any files.

``python -m sdxl.fingerprint BASE`` prints those of the encoders. Training asks for them in a
process of its own, so that it opens no encoder's file itself. Imports no torch.
"""

import hashlib
import json
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files import canonical_json, file_sha256, seal, unseal, user_cache, write_durable
from sdxl import BaseError
from sdxl.base import ENCODERS, Base, ModelSource, base_path, find_weights, open_base
from sdxl.original_names import modern_name
from sdxl.single_file import Tensor, read_header
from sdxl.tokenizers import TokenizerFiles

BUFFERS = (".position_ids",)  # saved by some versions of transformers and not by others
_IGNORED_KEYS = (
    "transformers_version",
    "torch_dtype",
    "dtype",
    "attention_dropout",
    "initializer_factor",
    "initializer_range",
)
_DEFAULTS = {
    "attention_type": "default",
    "dropout": 0.0,
    "mid_block_add_attention": True,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def tensors_digest(source: ModelSource) -> str:
    """sha256 over (name, dtype, shape, bytes) of all tensors of a model, by today's names.

    The order of the bytes is that of diffusers' tensors, so that a folder and a single file agree.

    Raises:
        BaseError: a file that is no whole safetensors file.
    """
    tensors: dict[str, tuple[str, Any]] = {}
    for name, dtype, array in _tensors(source):
        if not name.endswith(BUFFERS):
            tensors[name] = f"{name} {dtype} {list(array.shape)}\n", array
    digest = hashlib.sha256()
    for name in sorted(tensors):
        title, array = tensors[name]
        digest.update(title.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _tensors(source: ModelSource) -> Iterator[tuple[str, str, Any]]:
    """The name, dtype and memory-mapped array (see ``_words``) of each tensor of a model."""
    path, component, single_file = source.path, source.component, source.file
    if single_file is None:
        for file in find_weights(path).files:
            header, _ = read_header(file)
            data = _mapped(file)
            for key, tensor in header.items():
                try:
                    array = _words(data, tensor)
                except ValueError as error:
                    raise BaseError(f"{file}: damaged: {key}: {error}") from None
                yield modern_name(component, key), tensor.dtype, array
        return
    data = _mapped(path)
    for key, mapping in single_file.tensor_mappings(component).items():
        tensor = single_file.tensors[key]
        try:
            parts = mapping.split(_words(data, tensor))
        except ValueError as error:
            raise BaseError(f"{path}: damaged: {key}: {error}") from None
        for name, array in parts.items():
            yield name, tensor.dtype, array
            if mapping.scale is not None:
                scale = single_file.tensors[mapping.scale]
                yield f"{name}.scale", scale.dtype, _words(data, scale)


def _mapped(path: Path) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _words(data: memoryview, tensor: Tensor) -> Any:
    """A tensor's numbers as raw words of their size, whatever their dtype means."""
    count = math.prod(tensor.shape)
    size = (tensor.end - tensor.begin) // count if count else 1
    return np.frombuffer(data[tensor.begin : tensor.end], dtype=f"V{size}").reshape(tensor.shape)


def weights_digest(source: ModelSource) -> str:
    """``tensors_digest``, remembered by the files' paths, sizes and mtimes."""
    files = find_weights(source.path).files if source.file is None else (source.path,)
    stats = [(str(file.resolve()), file.stat()) for file in files]
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    key = hashlib.sha256(json.dumps([source.component, stamps]).encode()).hexdigest()
    store = _store()
    try:
        digests = unseal(store.read_bytes())
    except (OSError, ValueError):  # none, damaged, or of an earlier version: computed again
        digests = {}
    if key not in digests:
        digests[key] = tensors_digest(source)
        _remember(store, digests)
    return str(digests[key])


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    return file_sha256(path)


def config_digest(config: dict[str, Any]) -> str:
    """sha256 of a config's fields that change the model, whichever version of a library wrote it.

    Ignored are who saved it, fields that only training reads, and fields with the library's
    default.
    """
    relevant = {
        name: value
        for name, value in config.items()
        if not (name.startswith("_") or name in _IGNORED_KEYS)
        and value not in (None, _DEFAULTS.get(name))
    }
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: TokenizerFiles) -> str:
    """sha256 of everything that decides token ids, in whichever files it is."""
    return hashlib.sha256(json.dumps(tokenizer.parts(), sort_keys=True).encode()).hexdigest()


def encoder_digests_in_subprocess(base: Base) -> dict[str, str | None]:
    """Digests of the base's VAE and text encoders, None where it has none, by another process.

    For a hub id only the local hub cache is read: nothing is downloaded.
    """
    root = Path(__file__).resolve().parent.parent
    folder_or_id = (
        str(base_path(base.name_or_path).resolve()) if base.snapshot is None else base.pinned
    )
    run = subprocess.run(
        [sys.executable, "-m", "sdxl.fingerprint", folder_or_id],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if run.returncode:
        raise BaseError(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else str(base))
    return dict(json.loads(run.stdout))


def _store() -> Path:
    return user_cache() / "fingerprints.json"


def _remember(store: Path, digests: dict[str, str]) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_durable(store, canonical_json(seal(digests)).encode())
    except OSError:  # a read-only home: the digests are computed again next time
        return


def _main(name_or_path: str) -> None:
    base = open_base(name_or_path)
    digests: dict[str, str | None] = {}
    for component in ENCODERS:
        try:
            source = base.model(component)
        except BaseError:
            digests[component] = None
        else:
            digests[component] = weights_digest(source)
    sys.stdout.write(json.dumps(digests))


if __name__ == "__main__":
    try:
        _main(sys.argv[1])
    except BaseError as error:
        sys.exit(str(error))
