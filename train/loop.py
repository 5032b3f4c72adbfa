"""The training run, in the order in which it happens: set up, train, evaluate, save.

The life of a step: the plan says which samples are the next global batch, the same ones at any
number of processes (``shards/plan.py``). Threads read this process's share of it from the shards
(``shards/batches.py``). ``train_step`` draws noise and timesteps, keyed by sample and pass so that
a resumed run draws the same, predicts, takes the loss of each sample (``objective.py``), adds up
the gradients of all micro-batches and processes, and updates the weights only if all of it is
finite (``learner.py``). Loss and norm stay on the device until the log asks for them. Then, still
before the next step: a log row, an evaluation, previews, a checkpoint, in this order and each
where it is due. A checkpoint holds the place in the plan after this very step, never that of the
threads that have read ahead; that is why a resumed run is the run that was not stopped.
"""

import signal
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runtime.signals import Stopped, StopSignals
from runtime.work_queue import LOST_SECONDS
from sdxl.base import Base, open_base
from shards.batches import Reader, ReadOptions
from shards.buckets import largest_bucket
from shards.plan import Plan
from shards.reader import Cache
from train.caches import open_data
from train.checkpoint import (
    CheckpointWriter,
    load_best,
    newest_checkpoint,
    rotate,
    warn_of_space,
)
from train.config import TrainConfig
from train.distributed import (
    STEP_TIMEOUT,
    DistContext,
    StopVote,
    is_lost,
    start_world,
    stop_world,
)
from train.fit import Fitted, describe_fit, fit
from train.learner import (
    Learner,
    Step,
    build_learner,
    evaluate,
    train_step,
    warm_up,
)
from train.log import RunLog
from train.memory import advice, choose_checkpointing
from train.optim import learning_rate
from train.option_values import Every
from train.preview import Previewer
from train.resume import Start, find_start, restore, state_of
from train.run_folder import begin_run, describe, discard_replaced_run, lock_folder
from train.trackers import check_trackers
from train.weights import WeightsFormat, publish


@dataclass(kw_only=True)
class Run:
    """A run that is set up, and can take steps."""

    config: TrainConfig
    reader: Reader
    val: Cache | None
    learner: Learner
    kind: WeightsFormat
    log: RunLog
    previewer: Previewer | None
    identity: dict[str, Any]  # what must be the same when the run is resumed, by name
    start: Start
    num_steps: int
    writer: CheckpointWriter
    fitted: Fitted | None = None  # how --fit made it
    skipped_in_a_row: int = 0
    has_broken_data: bool = False  # whether the newest skipped step had a damaged sample
    eval_loss: float | None = None  # of the newest step, if it was evaluated

    @property
    def plan(self) -> Plan:
        return self.reader.plan

    def batches_done(self, step: int) -> int:
        """The number of global batches of the plan that ``step`` steps have used."""
        return self.start.batches_done + step - self.start.step


def train(config: TrainConfig, after_checkpoint: Callable[[], None] | None = None) -> Path:
    """Train, and return the LoRA file or the UNet folder.

    ``after_checkpoint`` is called when a checkpoint is complete.

    Raises:
        ValueError: the cache, the base, the run's folder or the settings cannot be used.
        FloatingPointError: too many steps in a row were not finite.
        MemoryError: the largest bucket does not fit; says which options would help.
        ConnectionError: another process of the run is gone.
        Stopped: after Ctrl-C or SIGTERM, and a checkpoint.
    """
    world = start_world(config.device)
    try:
        with ExitStack() as stack:
            stack.enter_context(lock_folder(config, world))
            if world.is_main:
                check_trackers(config)
            base = _open_base(config, world)
            caches, val = open_data(config, base, world)
            tokens = caches[0].manifest["text"]["tokens"]
            if config.publish == "best" and val is None:
                raise ValueError("--publish best: there is no eval to choose by; give --val CACHE")
            checkpoint = newest_checkpoint(config.out) if config.resume else None
            fitted = fit(config, base, caches, world, checkpoint)
            config = fitted.config if fitted else config
            start, plan, share, identity = find_start(config, base, caches, world, checkpoint)
            config = choose_checkpointing(
                start.config, base, largest_bucket(plan.buckets), tokens, world
            )
            learner = build_learner(config, base, world, start.path)
            restore(start, learner, config)
            kind = WeightsFormat.of(config, base, learner.schedule, caches)
            previewer = Previewer.of(config, base, caches, learner)
            num_steps = _num_steps(config, plan, start)
            settings = describe(
                config,
                base,
                plan,
                learner,
                num_steps,
                decided_checkpointing=start.config.gradient_checkpointing is None,
            )
            world.wait()  # one may have read the base from a slower disk
            warm_up(learner, config, plan, tokens)
            if world.is_main and start.step < num_steps:
                warn_of_space(config, num_steps, learner, kind)
            stack.enter_context(begin_run(config, world, settings))
            run = Run(
                config=config,
                reader=Reader(caches, plan, share, _reading(config)),
                val=val,
                learner=learner,
                kind=kind,
                log=RunLog(config, world, start.step, num_steps, settings),
                previewer=previewer,
                identity=identity,
                start=start,
                num_steps=num_steps,
                writer=_checkpoint_writer(config, learner, kind, start, after_checkpoint),
                fitted=fitted,
                skipped_in_a_row=start.skipped_in_a_row,
            )
            world.wait()  # the main rank has started the trackers
            path = _run(run)
        stop_world(world)
        return path
    except torch.OutOfMemoryError as error:
        message = advice(config, base, largest_bucket(plan.buckets), tokens, world.size, error)
        raise _with_notes(MemoryError(message), error) from error
    except RuntimeError as error:
        if not is_lost(error, world):
            raise
        time.sleep(LOST_SECONDS)
        seconds = int(STEP_TIMEOUT.total_seconds())
        lost = ConnectionError(
            f"another process of this run is gone, or has not answered for {seconds} seconds"
        )
        raise _with_notes(lost, error) from error


def _checkpoint_writer(
    config: TrainConfig,
    learner: Learner,
    kind: WeightsFormat,
    start: Start,
    after_checkpoint: Callable[[], None] | None,
) -> CheckpointWriter:
    def after(step: int) -> None:
        if config.overwrite:
            discard_replaced_run(config.out)
        if config.keep:
            rotate(config.out, config.keep, step)
        if after_checkpoint is not None:
            after_checkpoint()

    return CheckpointWriter(config.out, learner, kind, start.path, after)


def _open_base(config: TrainConfig, world: DistContext) -> Base:
    """Open the base, the same one on all ranks: the main rank determines the commit of a hub id."""
    main_base = open_base(config.base) if world.is_main else None
    pinned = world.share(main_base.pinned if main_base else "")
    return main_base or open_base(pinned)


def _with_notes(error: Exception, cause: BaseException) -> Exception:
    """``error`` with what was noted on its cause."""
    for note in getattr(cause, "__notes__", []):
        error.add_note(note)
    return error


def _run(run: Run) -> Path:
    """Take all steps, and publish the weights."""
    failed = True
    try:
        if run.start.path is not None:
            left = run.num_steps - run.start.step
            progress = f"{left:,} of {run.num_steps:,} steps are left" if left else "it is finished"
            run.log.print(f"goes on from {run.start.path}: {progress}")
        num = sum(p.numel() for p in run.learner.optimizer.parameters.values())
        run.log.print(
            f"trains {num:,} parameters on {run.plan.num_entries:,} samples an epoch, "
            f"{run.plan.num_batches:,} steps each"
        )
        learner = run.learner
        for line in describe_fit(run.fitted) if run.fitted else ():
            run.log.print(line)
        if run.start.config.gradient_checkpointing is None and learner.world.device.type == "cuda":
            decided = "on" if run.config.gradient_checkpointing else "off"
            run.log.print(
                f"gradient checkpointing is {decided}, by the memory that the card has free"
            )
        _steps(run)
        if learner.graphs is not None:
            run.log.print(learner.graphs.describe())
        world, out = learner.world, run.config.out
        if learner.ema is not None:
            learner.ema.finish(run.num_steps)
        steps = run.num_steps
        if run.config.publish == "best":
            steps = load_best(out, learner, run.config.full) or steps
            run.log.print(f"publishes the weights of step {steps}")
        path = publish(learner.unet, run.kind, out, world, learner.ema, steps=steps)
        run.log.weights(path)
        failed = False
        return path
    except Stopped:  # which is no failure
        failed = False
        raise
    except BaseException as error:
        run.writer.close()
        if run.learner.world.is_main:
            error.add_note(_resume_hint(run))
        raise
    finally:
        run.log.close(failed)


def _resume_command(run: Run) -> str:
    return f"python cli.py train --resume {run.config.out}"


def _resume_hint(run: Run) -> str:
    """From where the run can be resumed, as a sentence that is added to the error that ended it."""
    if run.writer.good is None:
        return "The run has no checkpoint yet."
    return (
        f"The newest whole checkpoint is {run.writer.good}; {_resume_command(run)} goes on from it."
    )


def _reading(config: TrainConfig) -> ReadOptions:
    return ReadOptions(
        captions=config.captions.shares,
        caption_dropout=config.caption_dropout,
        unconditional=config.unconditional,
        offsets=config.noise_offset > 0,
        masks=config.masked_loss,
    )


def _num_steps(config: TrainConfig, plan: Plan, start: Start) -> int:
    """The step at which the run ends.

    Raises:
        ValueError: it is behind the run already.
    """
    num_steps = config.num_steps(plan.num_batches)
    if config.steps is None:  # with changed data an epoch has another length than it had
        num_steps += start.step - start.batches_done
    if start.step > num_steps:
        raise ValueError(
            f"{config.out}: the run has {start.step} steps behind it, over {num_steps}"
        )
    return num_steps


def _steps(run: Run) -> None:
    """Take the remaining steps, with evals, previews and checkpoints in between."""
    config, learner, log = run.config, run.learner, run.log
    batches = run.reader.epochs(
        divmod(run.start.batches_done, run.plan.num_batches),
        threads=config.reader_threads,
        pin=learner.world.device.type == "cuda",
    )
    if run.start.step == 0:
        _evaluate(run, 0)
        _preview(run, 0)
    vote = StopVote(learner.world)
    with closing(batches), StopSignals(at_once=False) as signals:
        log.resume_clock()
        for step in range(run.start.step, run.num_steps):
            lr = learning_rate(config, step, run.num_steps)
            log.step(step + 1, train_step(learner, batches, step, lr))
            done, last = step + 1, step + 1 == run.num_steps
            at_log = last or done % config.log_every == 0
            # A single rank must not stop: the others would wait for its gradients for ever.
            stop = vote.any(signals.received is not None)
            kind = _checkpoint_kind(run, done, last, stop)
            evals = last or _is_due(run, config.eval_every, done)
            previews = _is_due(run, config.preview_every, done)
            if at_log or evals or kind or previews:  # rows are logged in order of steps
                _flush(run)
            run.eval_loss = _evaluate(run, done) if evals else None
            if previews:
                _preview(run, done)
            if kind:
                _write_checkpoint(run, done, kind, wait=last or stop)
            if stop and not last:
                log.print(f"stopped after step {done}; {_resume_command(run)} goes on from there")
                vote.close()
                raise Stopped(signals.received or signal.SIGTERM)
        vote.close()


def _is_due(run: Run, every: Every, step: int) -> bool:
    return every.is_due(step, run.batches_done(step), run.plan.num_batches)


def _checkpoint_kind(run: Run, step: int, last: bool, stop: bool) -> str:
    """Why there is a checkpoint after ``step``; empty if there is none."""
    if last or step in run.config.checkpoint_at:
        return "last" if last else "at"
    if _is_due(run, run.config.checkpoint_every, step):
        return "every"
    return "stop" if stop else ""


def _flush(run: Run) -> None:
    """Log the steps since the last flush, all ranks together.

    Raises:
        FloatingPointError: too many of them in a row were not finite.
    """
    config = run.config
    for number, step, finite in run.log.flush():
        run.skipped_in_a_row = 0 if finite else run.skipped_in_a_row + 1
        if not finite:
            _report_skipped(run, number, step)
        if run.skipped_in_a_row >= config.max_skipped:
            raise FloatingPointError(_divergence(run, number, step))


def _report_skipped(run: Run, number: int, step: Step) -> None:
    """Report why a step was skipped; name samples only where they can be at fault.

    A sample is named if its loss alone was not finite, or if the cache holds values for it that are
    not. Where the losses of all samples, step after step, or the gradient of finite losses are not
    finite, it is the weights or the precision.
    """
    bad, broken, every = [], [], []
    for micro in step.micros:
        paths, finite = run.reader.paths(*micro.place), micro.losses.isfinite().tolist()
        every += paths
        bad += [path for path, ok in zip(paths, finite, strict=False) if not ok]
        if not all(finite):
            have_finite_data = _has_finite_data(run, *micro.place)
            broken += [path for path, ok in zip(paths, have_finite_data, strict=False) if not ok]
    gather = run.learner.world.gather
    bad, broken, every = gather(bad), gather(broken), gather(every)
    reason = f"step {number} left out, its {'loss' if bad else 'gradient'} is not finite"
    run.has_broken_data = bool(broken)
    if broken:
        run.log.print(
            f"{reason}: the cache holds values that are not finite of {_listed(broken)}",
            is_warning=True,
        )
    elif bad and (len(bad) < len(every) or (len(every) == 1 and run.skipped_in_a_row == 1)):
        run.log.print(f"{reason}: {_listed(bad)}", is_warning=True)
    elif not bad and run.learner.scaler.is_enabled():
        pass  # fp16's scale was too high, and is halved
    elif run.skipped_in_a_row <= 2:
        more = "; of those that follow in a row nothing is printed" * (run.skipped_in_a_row == 2)
        run.log.print(reason + more, is_warning=True)


def _divergence(run: Run, number: int, step: Step) -> str:
    """Why the run ends after ``max_skipped`` steps in a row, the last of them ``number``."""
    config = run.config
    part = "gradient" if step.loss.isfinite() else "loss"
    ending = (
        f"{config.max_skipped} steps in a row up to step {number} had a {part} that is not finite"
    )
    usual = replace(config, lr=None).peak_lr
    if run.has_broken_data:
        reason = "the cache holds values that are not finite; `python cli.py verify` checks it"
    elif config.peak_lr > usual:
        reason = f"--lr {config.peak_lr:g} is probably too high (the default is {usual:g})"
    else:
        reason = "a smaller --lr may help, or --precision bf16 or fp32"
    return f"{ending}: {reason}. Those steps changed no weight."


def _has_finite_data(run: Run, epoch: int, number: int, micro: int) -> list[bool]:
    """For each sample of a micro-batch of this rank, whether the cache's values are finite."""
    batch = run.reader.read(run.plan.batch(epoch, number), micro)
    tensors = (batch.latents, batch.prompt, batch.pooled)
    finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors])
    return [bool(ok) for ok in finite.all(0).tolist()]


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(set(names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _write_checkpoint(run: Run, step: int, kind: str, *, wait: bool) -> None:
    config, batches_done = run.config, run.batches_done(step)
    state = state_of(config, run.plan, run.identity, batches_done) | {
        "kind": kind,
        "eval_loss": run.eval_loss,
        "skipped_in_a_row": run.skipped_in_a_row,
        "scaler": run.learner.scaler.state_dict(),
    }
    run.writer.begin(step, state, wait=wait)
    run.log.resume_clock()


def _evaluate(run: Run, step: int) -> float | None:
    if run.val is None:
        return None
    evaluation = evaluate(run.learner, run.val, run.config)
    run.log.eval(step, evaluation)
    run.log.resume_clock()
    return evaluation.loss


def _preview(run: Run, step: int) -> None:
    if run.previewer is not None:
        run.log.preview(step, *run.previewer.draw(step))
        run.learner.world.wait()  # for the main rank, which decodes and writes them
        run.log.resume_clock()
