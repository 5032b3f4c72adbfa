"""The losses of an evaluation, of each sample, as a run keeps them in ``RUN/evals/``.

There is a file for an evaluation, ``step-000100.json``, with a digest of its own. They are bounded:
the first evaluation stays, to compare with, and the newest few, so that a run that is resumed from
an earlier checkpoint still has its last one from before. A resumed run makes the later ones again.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.files import canonical_json, remove_path, seal, write_durable, writing

EVALS = "evals"  # in the run's folder
EVAL_FILE = re.compile(r"step-(\d{1,15})\.json")
NUM_KEPT = 10  # of the newest evaluations, beside the first
MAX_SAMPLES = 20_000  # of an evaluation: about a megabyte


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation measured."""

    loss: float  # the mean over all samples
    samples: dict[str, float]  # by key, each the mean over its timesteps; may be not finite
    data: str  # digest of the validation cache


def write_evaluation(run: Path, step: int, evaluation: Evaluation) -> None:
    """Keep the losses of the samples after ``step`` steps.

    Of more than ``MAX_SAMPLES`` those of the first keys are kept: keys are digests, so it is a
    choice without any order, and always the same one.
    """
    samples = sorted(evaluation.samples.items())
    fields = {
        "step": step,
        "val": evaluation.data,
        "num_samples": len(samples),
        "losses": {
            key: loss if math.isfinite(loss) else None for key, loss in samples[:MAX_SAMPLES]
        },
    }
    path = run / EVALS / f"step-{step:06d}.json"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        write_durable(path, canonical_json(seal(fields)).encode())
    for old in [*_evaluations(run).values()][1:-NUM_KEPT]:
        remove_path(old)


def cut_evaluations(run: Path, last_step: int) -> None:
    """Remove the evaluations after ``last_step``, which will be made again; at step 0 all."""
    for step, path in _evaluations(run).items():
        if step > last_step or last_step == 0:
            remove_path(path)


def _evaluations(run: Path) -> dict[int, Path]:
    """The files of evaluations by step, in order."""
    by_step = {}
    for path in (run / EVALS).glob("step-*.json"):
        if match := EVAL_FILE.fullmatch(path.name):
            by_step[int(match[1])] = path
    return dict(sorted(by_step.items()))
