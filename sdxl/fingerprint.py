"""Content digests of weights: over tensors by name, so the same weights agree in any files.

``python -m sdxl.fingerprint BASE`` prints those of the encoders. Training asks for them in a
process of its own, so that it opens no encoder's file itself. Imports no torch.
"""

import hashlib
import json
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from sdxl.base import ENCODERS, BaseError, base_path, component_folder, find_weights

BUFFERS = (".position_ids",)  # saved by some versions of transformers and not by others


def tensors_digest(files: tuple[Path, ...]) -> str:
    """sha256 over (name, dtype, shape, bytes) of all tensors in safetensors files, by name.

    Raises:
        BaseError: a file that is no whole safetensors file.
    """
    tensors: dict[str, tuple[str, memoryview]] = {}
    for path in files:
        try:
            with open(path, "rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            (length,) = struct.unpack("<Q", view[:8])
            header = json.loads(bytes(view[8 : 8 + length]))
        except (OSError, ValueError, struct.error):
            raise BaseError(f"{path}: not a whole safetensors file") from None
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = (8 + length + offset for offset in about["data_offsets"])
            if end > len(view):
                raise BaseError(f"{path}: truncated: {name} ends at {end} of {len(view)} bytes")
            tensors[name] = f"{name} {about['dtype']} {about['shape']}\n", view[begin:end]
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith(BUFFERS):
            title, data = tensors[name]
            digest.update(title.encode())
            digest.update(data)
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """``tensors_digest`` of a model folder, remembered by its files' paths, sizes and mtimes."""
    files = find_weights(folder).files
    stats = [(str(path.resolve()), path.stat()) for path in files]
    marks = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = hashlib.sha256(json.dumps(marks).encode()).hexdigest()
    store = _store()
    try:
        known = dict(json.loads(store.read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    if key not in known:
        known[key] = tensors_digest(files)
        _remember(store, known)
    return str(known[key])


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_digest(config: dict[str, Any]) -> str:
    """sha256 of what a model's config decides; who saved it, and in which dtype, is left out."""
    left_out = ("transformers_version", "torch_dtype", "dtype")
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """sha256 over what decides token ids."""
    names = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
    found = {name: file_digest(folder / name) for name in names if (folder / name).is_file()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def encoder_digests_elsewhere(base: str) -> dict[str, str | None]:
    """Digests of the base's VAE and text encoders, None where it has none, by another process.

    Of a hub id only what lies in the local hub cache counts: nothing is downloaded to be compared.
    """
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "sdxl.fingerprint", str(_absolute(base))],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if run.returncode:
        raise BaseError(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else base)
    return dict(json.loads(run.stdout))


def _absolute(base: str) -> str:
    path = base_path(base)
    return str(path.resolve()) if path.exists() else base


def _store() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "shardtune" / "fingerprints.json"


def _remember(store: Path, known: dict[str, str]) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_name(f"{store.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(known))
        os.replace(partial, store)
    except OSError:  # a read-only home: the digests are computed again next time
        return


def _main(base: str) -> None:
    digests: dict[str, str | None] = {}
    for component in ENCODERS:
        try:
            folder = component_folder(base, component)
        except BaseError:
            digests[component] = None
        else:
            digests[component] = weights_digest(folder)
    sys.stdout.write(json.dumps(digests))


if __name__ == "__main__":
    try:
        _main(sys.argv[1])
    except BaseError as error:
        sys.exit(str(error))
