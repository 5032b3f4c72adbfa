"""The body of ``doctor``: what this machine has for the program, and what to do where it lacks.

Each check imports what it needs by itself: a package that is missing is a finding.
"""

import importlib.util
import os
import platform
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import click

from runtime.messages import first_line, printable

ROOT = Path(__file__).parent
SPEED_BYTES = 64 << 20  # that are written and read to time a disk
LITTLE_SPACE = 20 * 10**9  # bytes: an SDXL base and a small cache
LITTLE_MEMORY = 12 * 10**9  # bytes: the UNet of a LoRA run passes through main memory
EXTRAS = {
    "8bit": "--optimizer adamw8bit",
    "nf4": "--base-quant nf4",
    "prodigy": "--optimizer prodigy",
    "pages": "report and compare",
    "tables": "encode of parquet",
    "tensorboard": "--tensorboard",
}


@dataclass(frozen=True)
class Finding:
    """A line of the report. ``remedy`` says what to do; only a ``fail`` must be mended."""

    name: str
    state: Literal["ok", "note", "fail"]
    value: str
    remedy: str = ""

    def lines(self) -> list[str]:
        first = f"{self.state:>4}  {self.name:<12} {self.value}"
        return [first, f"{'':>19}{self.remedy}"] if self.remedy else [first]


def show(finding: Finding) -> bool:
    """Print a finding, in color on a terminal; whether it is none that must be mended."""
    color = {"ok": "green", "note": "yellow", "fail": "red"}[finding.state]
    first, *others = finding.lines()
    click.echo(click.style(first[:4], fg=color) + printable(first[4:]))
    for line in others:
        click.echo(printable(line))
    return finding.state != "fail"


def examine(folder: Path, base: str | None) -> Iterator[Finding]:
    """All findings, one after the other. What goes wrong in a check is a finding too.

    ``folder`` is where caches and runs are to lie, ``base`` an SDXL base to look at.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "packages": _packages,
        "device": _devices,
        "compile": _compiler,
        "memory": _memory,
        "disk": lambda: _disk(folder),
        "user cache": _user_cache,
        "hub": _hub,
        "base": lambda: _base(base),
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            remedy = "this is needed; the line says what it was that failed"
            yield Finding(name, "fail", f"{type(error).__name__}: {first_line(error)}", remedy)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    value = f"{version}, {platform.system()} {platform.machine()}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield Finding("python", "ok", value)
    else:
        yield Finding("python", "fail", value, "use Python 3.11, 3.12 or 3.13")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wrong, versions = [], {}
    for text in project["dependencies"]:
        requirement = Requirement(text)
        version = _version(requirement.name)
        versions[requirement.name] = version
        if version is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "run: make setup")
    else:
        shown = ("torch", "diffusers", "transformers", "peft")
        value = ", ".join(f"{name} {versions[name]}" for name in shown)
        yield Finding("packages", "ok", f"all {len(versions)} are there: {value}")
    for extra, use in EXTRAS.items():
        names = [Requirement(text).name for text in project["optional-dependencies"][extra]]
        if missing := [name for name in names if _version(name) is None]:
            value = f"{', '.join(missing)} not installed: no {use}"
            yield Finding("extra", "note", value, f"if you want it: pip install '.[{extra}]'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    from runtime.files import format_bytes

    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            yield _computes(torch.device("mps"), "Apple GPU (mps)")
        elif has_nvidia_driver():
            built = torch.version.cuda
            why = f"is built for CUDA {built} and finds no GPU" if built else "has no CUDA"
            yield Finding(
                "device",
                "fail",
                f"there is an NVIDIA driver, and torch {torch.__version__} {why}",
                "install a build of torch for the driver's CUDA version (pytorch.org says which)"
                if not built
                else "see whether nvidia-smi lists the GPU, and CUDA_VISIBLE_DEVICES",
            )
        else:
            remedy = "enough for the miniature and for encoding a few images, not for training SDXL"
            yield Finding("device", "note", "no GPU: all is computed on the CPU", remedy)
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        major, minor = torch.cuda.get_device_capability(device)
        free, total = torch.cuda.mem_get_info(device)
        yield _computes(
            device,
            f"{device}: {torch.cuda.get_device_name(device)}, compute capability "
            f"{major}.{minor}, {format_bytes(free)} of {format_bytes(total)} free",
        )


def has_nvidia_driver() -> bool:
    """Whether this machine is meant to have an NVIDIA GPU."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _computes(device: "torch.device", value: str) -> Finding:  # type: ignore[name-defined] # noqa: F821
    """Whether a product of matrices comes out right in the precision of a run."""
    import torch

    from runtime.devices import pick_precision

    precision = pick_precision("auto", device, quiet=True)
    name = str(precision.dtype).removeprefix("torch.")
    left, right = torch.randn(2, 256, 256)
    product = left.to(device, precision.dtype) @ right.to(device, precision.dtype)
    error = float((product.float().cpu() - left @ right).abs().max() / (left @ right).abs().max())
    value = f"{value}; computes in {name}"
    if error < 0.02:
        return Finding("device", "ok", value)
    remedy = "drivers or hardware are faulty: results of this device cannot be trusted"
    return Finding("device", "fail", f"{value}, and wrongly (by {error:.0%})", remedy)


def _compiler() -> Iterator[Finding]:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    triton = importlib.util.find_spec("triton") is not None
    value = f"triton {'is' if triton else 'is not'} installed, C++ compiler: {compiler or 'none'}"
    usable = compiler is not None
    remedy = "" if usable else "only train --compile needs one: install g++"
    yield Finding("compile", "ok" if usable else "note", value, remedy)


def _memory() -> Iterator[Finding]:
    from runtime.files import format_bytes
    from runtime.process import free_memory

    free = free_memory()
    value = f"{format_bytes(free)} free, {os.cpu_count()} cores"
    few = free < LITTLE_MEMORY
    remedy = "full-size SDXL takes about 12 GB of main memory while it is loaded" if few else ""
    yield Finding("memory", "note" if few else "ok", value, remedy)


def _disk(folder: Path) -> Iterator[Finding]:
    from runtime.files import format_bytes, free_bytes
    from runtime.locks import locked

    folder = Path(os.path.realpath(folder))
    if not folder.is_dir():
        yield Finding("disk", "fail", f"{folder}: no such folder", "give --folder one that exists")
        return
    if not os.access(folder, os.W_OK):
        remedy = "give --folder one where caches and runs may lie"
        yield Finding("disk", "fail", f"{folder}: cannot be written to", remedy)
        return
    free = free_bytes(folder)
    if free < 2 * SPEED_BYTES:
        yield Finding("disk", "fail", f"{format_bytes(free)} free in {folder}", "make room")
        return
    write, read = _disk_speed(folder)
    value = f"{format_bytes(free)} free in {folder}; writes {write:.0f} MB/s, reads {read:.0f} MB/s"
    few = free < LITTLE_SPACE
    remedy = "an SDXL base takes 7 GB, a cache about 0.2 MB an image, a --full checkpoint 31 GB"
    yield Finding("disk", "note" if few else "ok", value, remedy if few else "")
    probe = folder / ".shardtune-doctor.lock"
    try:
        with locked(probe):
            pass
    finally:
        probe.unlink(missing_ok=True)
    yield Finding("locks", "ok", "work in that folder")


def _disk_speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing, to the disk itself, and of reading, not out of memory where that can be
    had."""
    path = folder / ".shardtune-doctor.partial"
    data = os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(SPEED_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - start
        with open(path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while file.read(1 << 20):
                pass
            took = time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
    return SPEED_BYTES / 1e6 / written, SPEED_BYTES / 1e6 / took


def _user_cache() -> Iterator[Finding]:
    from runtime.files import user_cache

    folder = user_cache()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(nearest, os.W_OK):
        yield Finding("user cache", "ok", f"{folder} can be written to")
    else:
        remedy = "encode then reads every file again at each run; set XDG_CACHE_HOME"
        yield Finding("user cache", "note", f"{folder} cannot be written to", remedy)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    from sdxl.hub import cached_component
    from sdxl.tokenizers import HUB_ID, has_vocabulary

    offline = ", offline by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    yield Finding("hub", "ok", f"files in {constants.HF_HUB_CACHE}{offline}")
    folders = [cached_component(HUB_ID, name) for name in ("tokenizer", "tokenizer_2")]
    if all(folder is not None and has_vocabulary(folder) for folder in folders):
        yield Finding("tokenizers", "ok", "SDXL's are in the hub's cache, for single-file bases")
    else:
        remedy = "a base in one file has none: they are downloaded then, or give --tokenizers"
        yield Finding("tokenizers", "note", "SDXL's are not in the hub's cache", remedy)


def _base(base: str | None) -> Iterator[Finding]:
    if base is None:
        return
    from sdxl.base import check_base, open_base

    check_base(base)
    opened = open_base(base)
    size = 8 * int(opened.unet.config["sample_size"])
    for name in ("vae", "text_encoder", "text_encoder_2"):
        _ = opened.model(name).config
    prediction = opened.scheduler_config.get("prediction_type", "epsilon")
    license_name = opened.license or "not stated"
    value = f"{opened.name}: {size} pixels, {prediction}, license {license_name}"
    yield Finding("base", "ok", value)
