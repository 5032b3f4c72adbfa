"""The options that a run was begun with, so that ``--resume`` needs none of them again.

The run's ``config.json`` has all but the paths, for run folders are shared and paths are private;
those are remembered on this machine, in the user's cache. Imports no torch.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.files import canonical_json, content_digest, read_checked, user_cache, write_checked
from runtime.path_kinds import RUN, checkpoints_in, kind_of
from runtime.safe_parsing import parse_json, read_sealed
from train.option_values import DEPENDENTS, CacheUse, flag, part_of

CONFIG = "config.json"  # in the run's folder: its settings, and what followed from them
# Settings that a checkpoint's tensors and the plan depend on: a resumed run cannot change them.
FIXED = (
    "full",
    "adapter",
    "rank",
    "alpha",
    "targets",
    "conv",
    "seed",
    "optimizer",
    "ema",
    "ema_every",
    "base_quant",
    "pure_bf16",
    "fused_backward",
)
_PATHS = ("caches", "base", "val")
# How a run was begun, or with which file, and not what it is.
_OF_THE_START = ("out", "init_lora", "resume", "allow_changed_data", "overwrite", "dry_run")


def saved_options(given: dict[str, Any]) -> dict[str, Any]:
    """The values that a resumed run has for what is not ``given``, as JSON, by option.

    ``train --resume RUN`` names the run where a cache stands: that is put in order in ``given``.

    Raises:
        ValueError: there is no run, its paths are not known here, or a given option would make
            another run of it.
    """
    # --resume auto, as other trainers have it, for what --resume does beside --out: go on with the
    # run that is there, or begin it. (A folder of that name is a cache.)
    caches = given.get("caches", ())
    if caches and (len(caches) > 1 or "out" in given):
        given["caches"] = tuple(c for c in caches if str(c.folder) != "auto" or c.folder.exists())
        if not given["caches"]:
            del given["caches"]
    is_named_alone = _takes_the_run(given)
    if "out" not in given:
        return {}
    out = given["out"]
    if not is_named_alone and not checkpoints_in(out):
        return {}  # it begins at step 0, with the options that are given
    try:
        settings = read_sealed(out / CONFIG)
    except (OSError, ValueError) as error:
        if is_named_alone:
            raise ValueError(
                f"{out / CONFIG}: cannot be read; give the run's options again, beside --out {out} "
                "--resume"
            ) from error
        return {}  # damaged: what a checkpoint has is compared
    if "steps_per_epoch" not in settings:
        return {}
    for name in FIXED:
        value = settings.get(name)
        if name in given and value not in (None, given[name]):
            raise ValueError(
                f"{out}: cannot resume with {flag(name)} {given[name]}: the run has {value}"
            )
    options = {
        name: value
        for name, value in settings.items()
        if value is not None and name not in (*_PATHS, *_OF_THE_START)
    }
    options |= _recall_paths(out, settings, given)
    for name in (*_not_taken(settings, given), *given):
        options.pop(name, None)
    if "fit" in given and "batch_size" not in given:  # which is to be divided anew
        options["batch_size"] = settings.get("batch_size", 1) * settings.get("accumulate", 1)
    return options


def _takes_the_run(given: dict[str, Any]) -> bool:
    """Whether the run stands where a cache does; then it is ``out``.

    Raises:
        ValueError: what stands there, with nothing else, is no run.
    """
    caches = given.get("caches", ())
    if len(caches) != 1:
        return False
    run = caches[0].folder
    if kind_of(run) == RUN and given.get("out", run).resolve() == run.resolve():
        del given["caches"]
        given["out"] = run
        return True
    if "out" not in given and "base" not in given:
        reason = "not a run of train" if run.exists() else "no such folder"
        raise ValueError(
            f"{run}: {reason}, and so nothing to --resume; give the folder of a run, or CACHE, "
            "--base and --out"
        )
    return False


def _not_taken(settings: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    """Settings of the run that do not go with what is given, or that the machine decides."""
    for name, dependents in DEPENDENTS.items():
        if name in given and str(given[name]) != str(settings.get(name)):
            yield from dependents
    if "batch_size" in given or "fit" in given:
        yield "accumulate"
    if "fit" in given:
        yield from ("gradient_checkpointing", "ema_on_cpu")
    was_fitted = settings.get("fit") is not None
    yield "fit"  # its choices stand
    # What is recorded was decided by the free memory, unless it was typed or chosen by --fit.
    if settings.get("decided_checkpointing", not was_fitted):
        yield "gradient_checkpointing"


def remember_private(config: Any, settings: dict[str, Any]) -> None:
    """Remember on this machine what ``config.json``, which has ``settings``, leaves out of a run
    with this TrainConfig: where its data and base are, and whose W&B it logs to.

    Where that cannot be written, the next ``--resume`` asks for it.
    """
    base, val = config.base, config.val
    paths = {
        "caches": [str(replace(use, folder=use.folder.resolve())) for use in config.caches],
        "base": str(Path(base).resolve()) if os.path.exists(base) else base,
        "val": None if val is None else str(val.resolve()),
        "wandb_entity": config.wandb_entity,
    }
    memory = {"names": _names(settings), "paths": paths}
    with suppress(OSError, ValueError):  # ValueError: a path that is no Unicode
        write_checked(_memory(config.out), canonical_json(memory).encode())


def _recall_paths(out: Path, settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The remembered paths that are not given.

    Raises:
        ValueError: they are not known here, or are of another run that was in this folder.
    """
    wanted = [name for name in _PATHS if name not in given and settings.get(name) is not None]
    try:
        memory = parse_json(read_checked(_memory(out)))
        if memory["names"] == _names(settings):
            entity = memory["paths"].get("wandb_entity")
            return {name: memory["paths"][name] for name in wanted} | (
                {} if entity is None else {"wandb_entity": entity}
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if not wanted:
        return {}
    words = {"caches": "CACHE", "base": "--base BASE", "val": "--val CACHE"}
    raise ValueError(
        f"{out}: where the run's data and base are is not known on this machine; give "
        f"{' and '.join(words[name] for name in wanted)}, beside --out {out} --resume"
    )


def recall_val(run: Path) -> Path | None:
    """The folder of a run's validation cache, if it is known on this machine; see
    ``caches.open_val``, which opened it."""
    try:
        paths = _recall_paths(run, read_sealed(run / CONFIG), {})
        if paths.get("val") is not None:
            return part_of(Path(paths["val"]), "val")
        first = CacheUse.parse(paths["caches"][0]).folder
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    is_split = part_of(first, "train") != first and (first / "val").is_dir()
    return first / "val" if is_split else None


def _names(settings: dict[str, Any]) -> list[Any]:
    """What ``config.json`` keeps of the paths."""
    return [settings.get(name) for name in _PATHS]


def _memory(out: Path) -> Path:
    return user_cache() / "runs" / f"{content_digest(str(out.resolve()))}.json"
