"""Fuzzing of all that reads files which somebody else may have made, or damaged.

No input may make another exception than ours, which is one line that says what is wrong and with
which file; nor may it take seconds, or memory without bound. The suite tries some inputs of each
parser (``tests/test_fuzz.py``); ``python -m tests.fuzz NAME... --seconds 600`` tries more.

An input is made from the parser's name, a seed and a number, so that one that fails can be tried
again alone: ``python -m tests.fuzz NAME --seed SEED --only-number NUMBER``.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

from runtime.errors import silence_libraries

silence_libraries()  # before they are imported

from tests.fuzz_bases import fuzz_base_folder, fuzz_prompts, fuzz_single_file
from tests.fuzz_caches import fuzz_cache
from tests.fuzz_convert import fuzz_convert
from tests.fuzz_dataset import fuzz_arrow, fuzz_list, fuzz_row, fuzz_table, fuzz_tar, fuzz_text
from tests.fuzz_images import fuzz_image
from tests.fuzz_imports import fuzz_npz
from tests.fuzz_loras import fuzz_lora
from tests.fuzz_pages import fuzz_page, fuzz_sheet
from tests.fuzz_runs import fuzz_checkpoint, fuzz_generated, fuzz_plan, fuzz_recipe, fuzz_run
from tests.mutations import Try
from tools.random_base import make_random_base

# Each takes a folder to work in and a base, and returns what tries one input.
PARSERS: dict[str, Callable[[Path, Path], Try]] = {
    "text": fuzz_text,
    "row": fuzz_row,
    "list": fuzz_list,
    "table": fuzz_table,
    "arrow": fuzz_arrow,
    "tar": fuzz_tar,
    "image": fuzz_image,
    "npz": fuzz_npz,
    "plan": fuzz_plan,
    "cache": fuzz_cache,
    "base-folder": fuzz_base_folder,
    "single-file": fuzz_single_file,
    "lora": fuzz_lora,
    "recipe": fuzz_recipe,
    "checkpoint": fuzz_checkpoint,
    "run": fuzz_run,
    "page": fuzz_page,
    "sheet": fuzz_sheet,
    "prompts": fuzz_prompts,
    "generated": fuzz_generated,
    "convert": fuzz_convert,
}
MAX_SECONDS = 20  # of one input, on a busy machine too
MAX_BYTES = 500_000_000  # by which one input may raise the most memory that was ever in use


class TookTooLong(BaseException):
    """No ``Exception``: what is tried must not take it for an error of a file."""


def fuzz(
    name: str, work: Path, base: Path, seed: int, numbers: Iterable[int], seconds: float = 1e9
) -> Counter[str]:
    """How many inputs ended in which way, until ``numbers`` or ``seconds`` are over.

    Raises:
        BaseException: what an input raised, with a note of how to try it again.
    """
    try_one = PARSERS[name](work, base)
    endings: Counter[str] = Counter()
    end = time.monotonic() + seconds
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        for number in numbers:
            if time.monotonic() > end:
                break
            try:
                endings[_limited(try_one, random.Random(f"{name} {seed} {number}"))] += 1
            except BaseException as error:
                again = f"python -m tests.fuzz {name} --seed {seed} --only-number {number}"
                error.add_note(f"after {endings.total():,} inputs; again: {again}")
                raise
    finally:
        signal.signal(signal.SIGALRM, before)
    return endings


def _too_long(*_: object) -> None:
    raise TookTooLong(f"more than {MAX_SECONDS} s")


def _limited(try_one: Try, rng: random.Random) -> str:
    most_bytes = _most_bytes()
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how = try_one(rng)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert _most_bytes() - most_bytes < MAX_BYTES, f"took more than {MAX_BYTES:,} bytes of memory"
    return how


def _most_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(PARSERS)}")
    options.add_argument("--seconds", type=float, default=60, help="for each name (60)")
    options.add_argument("--inputs", type=int, help="at most as many for each name")
    options.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="(random)")
    options.add_argument("--only-number", type=int, help="the one input to try")
    given = options.parse_args()
    if unknown := {*given.names} - {*PARSERS}:
        options.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PARSERS)}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(root / "xdg-cache")
        make_random_base(root / "base")
        for name in given.names or PARSERS:
            numbers = range(given.inputs) if given.inputs else count()
            if given.only_number is not None:
                numbers = range(given.only_number, given.only_number + 1)
            (root / name).mkdir()
            start = time.monotonic()
            try:
                endings = fuzz(name, root / name, root / "base", given.seed, numbers, given.seconds)
            except (Exception, TookTooLong):
                traceback.print_exc()
                failed = True
                continue
            summary = ", ".join(f"{number:,} {how}" for how, number in sorted(endings.items()))
            print(
                f"{name}: seed {given.seed}, {endings.total():,} inputs in "
                f"{time.monotonic() - start:.0f} s ({summary}), "
                f"{_most_bytes() / 1e6:.0f} MB at most",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
