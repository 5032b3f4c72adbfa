"""The output path of an export: what may be overwritten there, and the lock on it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from infer.export_settings import ExportSettings
from runtime.files import (
    format_bytes,
    free_bytes,
    fsync_tree,
    is_inside,
    recover_replaced,
    remove_path,
    replace_together,
    replacement,
    writing,
)
from runtime.locks import locked
from sdxl.base import base_path
from sdxl.lora.read import find_lora

STILL_GOOD = "What was there before is as it was."
FOLDERS = ("scheduler", "unet")  # of a UNet folder; the UNet last: without it the folder is none
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")


@contextmanager
def locked_output(settings: ExportSettings, unet: Path | None) -> Iterator[None]:
    """Check OUT and lock it against other exports. ``unet`` is the folder that is exported, or None
    for a LoRA.

    Raises:
        ValueError: OUT cannot be written, exists already, or would replace what is read.
    """
    out = settings.out
    if not out.parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist")
    _check_inputs(settings, unet)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out.with_name(f".{out.name}.export.lock")))
        except ValueError:
            raise ValueError(
                f"{out}: another export is writing it; wait for that, or give another --out"
            ) from None
        if not settings.is_file:
            recover_replaced(*_written(settings))
        check_overwrite(settings)
        yield


def _written(settings: ExportSettings) -> list[Path]:
    return [settings.out] if settings.is_file else [settings.out / name for name in FOLDERS]


def check_overwrite(settings: ExportSettings) -> None:
    """
    Raises:
        ValueError: something is at OUT that may not be replaced.
    """
    out = settings.out
    if out.is_dir() and settings.is_file:
        raise ValueError(f"{out}: a folder, where a file is to be written")
    if not settings.is_file and out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, where a folder is to be written")
    taken = [path for path in reversed(_written(settings)) if os.path.lexists(path)]
    if taken and not settings.overwrite:
        raise ValueError(f"{taken[0]}: is there already; --overwrite replaces it")


def _check_inputs(settings: ExportSettings, unet: Path | None) -> None:
    """Refuse an OUT that would replace a file that is read."""
    for path in _written(settings):
        for option, source in _input_paths(settings, unet):
            is_same_file = path.exists() and source.exists() and path.samefile(source)
            if is_same_file or is_inside(source, path) or is_inside(path, source):
                raise ValueError(
                    f"--out {settings.out}: {path} would replace what {option} is read from "
                    f"({source}); give another --out"
                )


def _input_paths(settings: ExportSettings, unet: Path | None) -> Iterator[tuple[str, Path]]:
    """The files and folders that are read, each with the option that names it."""
    if unet is None:
        yield "WEIGHTS", find_lora(settings.weights)
    else:
        yield from (("WEIGHTS", path) for path in (unet, unet.parent / "scheduler"))
    for option, source in (("--base", settings.base), ("--vae", settings.vae)):
        path = base_path(source) if source is not None else None
        if path is None or not path.exists():
            continue
        is_complete = path.is_file() or (path / "config.json").is_file()
        parts = [path] if is_complete else [path / name for name in _PARTS]
        yield from ((option, part) for part in parts if part.exists())


@contextmanager
def new_file(settings: ExportSettings, num_bytes: int) -> Iterator[Path]:
    """The name of a file to write, read back and compare; on a clean exit it becomes OUT.

    Raises:
        ValueError: OUT has been taken meanwhile.
        OSError: there is no room for it, or it cannot be written.
    """
    check_disk_space(settings.out, num_bytes)
    with writing(settings.out, STILL_GOOD), replacement(settings.out) as partial:
        yield partial
        check_overwrite(settings)


@contextmanager
def new_folder(settings: ExportSettings, num_bytes: int) -> Iterator[Path]:
    """A folder for ``unet/`` and ``scheduler/``; on a clean exit they replace OUT's, together."""
    out = settings.out
    check_disk_space(out, num_bytes)
    partial, is_new = out / "export.partial", not out.exists()
    with writing(out, STILL_GOOD):
        try:
            remove_path(partial)
            partial.mkdir(parents=True)
            yield partial
            check_overwrite(settings)
            fsync_tree(partial)
            replace_together([(partial / path.name, path) for path in _written(settings)])
        finally:
            remove_path(partial)
            if is_new:
                with suppress(OSError):  # not empty: it was finished
                    out.rmdir()


def check_disk_space(out: Path, num_bytes: int) -> None:
    """
    Raises:
        OSError: the disk has less room than the file takes.
    """
    if (free := free_bytes(out.parent)) < num_bytes:
        raise OSError(
            f"{out}: takes {format_bytes(num_bytes)}, and the disk has {format_bytes(free)} free. "
            f"{STILL_GOOD}"
        )
