"""Weights & Biases and TensorBoard: where numbers and previews go besides ``metrics.jsonl``.

Both are given its rows, under the same names and steps. What cannot start is refused before the
first step, when nothing is lost yet; what fails later is dropped by ``RunLog``, and the run goes
on. Nothing that leaves the machine tells of it: no path, host, user or command line.
"""

import json
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.config import TrainConfig
from train.run_folder import TENSORBOARD, WANDB_ID, read_own_json, write_own_json

Row = dict[str, Any]  # of metrics.jsonl: "step", and numbers by name; None is not finite
Images = Sequence[tuple[Image.Image, str]]  # previews, each with its prompt
SMALL_BYTES = 1_000_000_000  # up to here weights are uploaded unasked


def check_trackers(config: TrainConfig) -> None:
    """Check that the trackers can start. W&B online is asked: without an API key or an answer, the
    start would hang for a minute and a half, and fail after an older run was set aside.

    Raises:
        ValueError: what lacks, and the way out.
    """
    config.check_packages()
    if config.wandb != "online":
        return
    import wandb

    try:
        wandb.setup(settings=wandb.Settings(silent=True))
        wandb.login(verify=True)
    except wandb.errors.Error as error:
        raise ValueError(_refusal(config, error)) from error


def start_trackers(
    config: TrainConfig, run_config: Row, start: int
) -> "list[WandbTracker | TensorboardTracker]":
    """Those that the run has; ``start`` is the step that it goes on from.

    Raises:
        ValueError: W&B refuses the run.
    """
    trackers: list[WandbTracker | TensorboardTracker] = []
    if config.wandb != "disabled":
        trackers.append(WandbTracker(config, run_config, start))
    if config.tensorboard:
        trackers.append(TensorboardTracker(config, run_config, start))
    return trackers


class WandbTracker:
    """One run of W&B. Its step is the optimizer's, so that a resumed run continues its count,
    offline too, where W&B cannot know it."""

    option = "--wandb"

    def __init__(self, config: TrainConfig, run_config: Row, start: int) -> None:
        self._run = _start_wandb(config, run_config)
        self._uploads = config.wandb_artifact
        # How far W&B's own count is ahead, in a run that was killed or that an earlier version
        # began: it takes no row below its count.
        self._ahead = max(0, self._run.step - start - 1)

    def log_row(self, row: Row) -> None:
        numbers = {name: value for name, value in row.items() if name != "step"}
        self._log(row["step"], numbers)

    def log_previews(self, step: int, images: Images) -> None:
        import wandb

        shown = [wandb.Image(image, caption=prompt) for image, prompt in images]
        self._log(step, {"previews": shown})

    def _log(self, step: int, values: Row) -> None:
        self._run.log({"trainer/step": step, **values}, step=step + self._ahead)

    def log_weights(self, path: Path) -> None:
        """Upload the LoRA file or the UNet folder, as ``--wandb-artifact`` says."""
        if not _is_uploaded(self._uploads, path):
            return
        import wandb

        artifact = wandb.Artifact(f"weights-{self._run.id}", type="model")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _is_uploaded(choice: str | None, path: Path) -> bool:
    """``choice`` is of ``--wandb-artifact``; None takes what is small."""
    if choice is None:
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files) < SMALL_BYTES
    return choice == "full" or (choice == "lora" and path.is_file())


def _start_wandb(config: TrainConfig, run_config: Row) -> Any:
    """A new W&B run, or the same one where the run's folder names it."""
    import wandb

    run_id = (read_own_json(config.out / WANDB_ID) or {}).get("id")
    if not (isinstance(run_id, str) and re.fullmatch(r"[\w-]+", run_id)):
        run_id = None
    # W&B would also send the host's and the user's name, the command line with its paths, the git
    # remote, what is printed, and installed packages with the folders that they came from.
    private = wandb.Settings(
        silent=True,
        host="",
        console="off",
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
    try:
        run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            # A resumed run may have been given another name on W&B's page.
            name=config.wandb_name or (None if run_id else config.out.resolve().name),
            tags=config.tags,
            group=config.wandb_group,
            dir=str(config.out),
            mode=config.wandb,
            id=run_id,
            resume="allow" if run_id else None,
            config=run_config,
            settings=private,
        )
    except wandb.errors.Error as error:
        raise ValueError(_refusal(config, error)) from error
    run.define_metric("*", step_metric="trainer/step")
    write_own_json(config.out / WANDB_ID, {"id": run.id})
    return run


def _refusal(config: TrainConfig, error: Exception) -> str:
    offline = "; or take --wandb offline" if config.wandb == "online" else ""
    return f"--wandb {config.wandb}: {error}{offline}"


class TensorboardTracker:
    """Event files in ``RUN/tensorboard``, one for each time that the run was begun or resumed."""

    option = "--tensorboard"

    def __init__(self, config: TrainConfig, run_config: Row, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = config.out / TENSORBOARD
        # What an earlier start logged of steps that are now trained again is not shown: a file that
        # begins with a step hides the points from that step on in those before it.
        first = start + 1 if start else 0
        with _nameless_host():
            self._writer: Any = SummaryWriter(
                str(folder), purge_step=first if folder.exists() else None
            )
        self._writer.add_text("settings", _table(run_config), start)
        self._writer.flush()

    def log_row(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def log_previews(self, step: int, images: Images) -> None:
        for number, (image, prompt) in enumerate(images, 1):
            pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"previews/{number}", pixels, step, dataformats="HWC")
            self._writer.add_text(f"previews/{number}", prompt, step)
        self._writer.flush()

    def log_weights(self, path: Path) -> None:
        """TensorBoard holds no files."""

    def close(self, failed: bool) -> None:
        self._writer.close()


@contextmanager
def _nameless_host() -> Iterator[None]:
    """While entered, this host is called ``localhost``: the writer puts the name into that of its
    file, and a run's folder is to be shared."""
    known_as = socket.gethostname
    socket.gethostname = lambda: "localhost"
    try:
        yield
    finally:
        socket.gethostname = known_as


def _table(settings: Row) -> str:
    """Settings as a table of Markdown, which TensorBoard shows."""
    rows = [
        f"| {name} | {json.dumps(value, ensure_ascii=False)} |".replace("\n", " ")
        for name, value in settings.items()
    ]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
