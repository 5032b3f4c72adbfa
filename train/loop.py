"""A run, in the order in which it happens."""

import json
import shutil
import warnings
from contextlib import closing
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from sdxl.base import component_folder
from sdxl.device import pick_precision
from sdxl.fingerprint import weights_digest
from shards.durable import write_durable
from shards.manifest import content_digest
from shards.plan import Plan, Share
from shards.reader import Cache, read_epochs
from train.adapters import trainable
from train.checkpoint import load_checkpoint, newest_checkpoint, write_checkpoint
from train.config import TrainConfig, flag
from train.distributed import World, start_world, stop_world
from train.interrupt import Interrupt
from train.learner import Learner, build_learner, evaluate, train_step
from train.log import RunLog
from train.objective import alphas_cumprod
from train.optim import learning_rate
from train.unet import (
    check_cache,
    check_encoders,
    open_cache,
    open_val,
    prediction_type,
    scheduler_config,
)
from train.weights import publish

CONFIG = "config.json"
FIXED = ("full", "rank", "alpha", "targets", "seed")  # over a resume
STOP_EVERY = 10  # steps between looks at whether any of several ranks was told to stop


@dataclass(kw_only=True)
class Run:
    """A run that is ready to step."""

    config: TrainConfig
    caches: list[Cache]
    val: Cache | None
    plan: Plan
    share: Share
    learner: Learner
    log: RunLog
    identity: dict[str, str]  # what a resumed run must find again, by name
    start: int  # steps done before
    num_steps: int


def train(config: TrainConfig) -> Path:
    """Train, and return the LoRA file or the UNet folder.

    Raises:
        ValueError: the cache, the base, the run's folder or the settings cannot be used.
        SystemExit: 130 or 143, after Ctrl-C or SIGTERM and a checkpoint.
    """
    world = start_world(config.device)
    try:
        cache, val = _open_data(config, world)
        identity = _identity(config, cache, world)
        state = _find_start(config)
        plan, share = _plan(config, cache, world, state)
        learner = build_learner(config, world)
        start = _restore(config, identity, plan, learner, state)
        num_steps = _num_steps(config, plan)
        if start > num_steps:
            raise ValueError(f"{config.out}: the run has {start} steps behind it, over {num_steps}")
        about = _describe(config, plan, learner, num_steps)
        _make_folder(config, world, about)
        log = RunLog(config, world, start, num_steps, about)
        log.skips_overflows = learner.scaler.is_enabled()
        try:
            run = Run(
                config=config,
                caches=[cache],
                val=val,
                plan=plan,
                share=share,
                learner=learner,
                log=log,
                identity=identity,
                start=start,
                num_steps=num_steps,
            )
            _steps(run)
            if not world.is_main:
                return config.out
            path = publish(learner.unet, config.full, config.out)
            log.artifact(path)
            return path
        finally:
            log.close()
    finally:
        stop_world(world)


def _open_data(config: TrainConfig, world: World) -> tuple[Cache, Cache | None]:
    cache = open_cache(config.cache, "train")
    val = open_val(config, cache)
    for one in [cache] if val is None else [cache, val]:
        check_cache(one, config.base)
    if world.is_main:
        check_encoders(cache, config.base)
    return cache, val


def _find_start(config: TrainConfig) -> dict[str, Any] | None:
    """Where ``--resume`` goes on (None: from the start), once the run's folder may be used."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a folder")
    if out.exists() and any(out.iterdir()):
        if not _is_run(out):
            raise ValueError(f"{out}: not empty, and no run of shardtune; give another --out")
        if not (config.resume or config.overwrite):
            raise ValueError(f"{out}: not empty; --resume goes on there, --overwrite deletes it")
    found = newest_checkpoint(out) if config.resume else None
    return {**found[1], "path": found[0]} if found else None


def _is_run(folder: Path) -> bool:
    """By content: a ``config.json`` alone is the commonest of names."""
    try:
        return "steps_per_epoch" in json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _make_folder(config: TrainConfig, world: World, about: dict[str, Any]) -> None:
    """The run's folder with its config.

    The last thing before the first step: what made it this far will hardly be refused, so only now
    may an older run be deleted.
    """
    world.wait()  # all ranks have looked before one writes
    if world.is_main:
        if config.overwrite and config.out.exists():
            shutil.rmtree(config.out)
        config.out.mkdir(parents=True, exist_ok=True)
        write_durable(config.out / CONFIG, (json.dumps(about, indent=2) + "\n").encode())
    world.wait()


def _plan(
    config: TrainConfig, cache: Cache, world: World, state: dict[str, Any] | None
) -> tuple[Plan, Share]:
    """The plan; a resumed run keeps its global batch, whatever the number of processes."""
    share = Share(batch_size=config.batch_size, world=world.size, rank=world.rank)
    at_once = config.batch_size * world.size
    size = at_once * config.accumulate
    if state is not None:
        asked, size = size, state["global_batch"]
        if size % at_once:
            raise ValueError(
                f"--batch-size {config.batch_size} x {world.size} processes does not divide the "
                f"run's global batch of {size}"
            )
        if size != asked:
            warnings.warn(
                f"the run's global batch is {size} and stays so: {size // at_once} forward passes "
                "are accumulated",
                stacklevel=2,
            )
    return Plan(cache.groups(), config.seed, size), share


def _identity(config: TrainConfig, cache: Cache, world: World) -> dict[str, str]:
    scheduler = scheduler_config(config.base)
    precision = pick_precision(config.precision, world.device, config.allow_cpu_bf16, quiet=True)
    return {
        "cache": cache.manifest["digest"],
        "base UNet": weights_digest(component_folder(config.base, "unet")),
        "prediction type": prediction_type(config, scheduler),
        "noise schedule": content_digest(alphas_cumprod(scheduler).tolist()),
        "precision": str(precision.dtype).removeprefix("torch."),
    }


def _num_steps(config: TrainConfig, plan: Plan) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, ceil(round(config.epochs * plan.num_batches, 6)))


def _restore(
    config: TrainConfig,
    identity: dict[str, str],
    plan: Plan,
    learner: Learner,
    state: dict[str, Any] | None,
) -> int:
    """Put the checkpoint's state in place; returns the steps done."""
    if state is None:
        return 0
    for name, value in identity.items():
        if state[name] != value:
            raise ValueError(f"{config.out}: cannot resume: the {name} is not the run's any more")
    for name in FIXED:
        if state["config"][name] != getattr(config, name):
            raise ValueError(
                f"{config.out}: cannot resume with {flag(name)} {getattr(config, name)}: the run "
                f"has {state['config'][name]}"
            )
    assert state["plan"] == plan.digest, "same cache, seed and global batch, and another plan"
    load_checkpoint(state["path"], learner.unet, config.full, learner.optimizer)
    if state["scaler"]:  # empty where the run had none
        learner.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _describe(config: TrainConfig, plan: Plan, learner: Learner, num_steps: int) -> dict[str, Any]:
    settings = {name: _plain(value) for name, value in asdict(config).items()}
    return {
        **settings,
        "num_steps": num_steps,
        "global_batch": plan.global_batch,
        "num_samples": plan.num_entries,
        "steps_per_epoch": plan.num_batches,
        "num_trained_parameters": sum(p.numel() for p in trainable(learner.unet).values()),
        "resolved_prediction_type": learner.prediction_type,
        "resolved_dtype": str(learner.precision.dtype).removeprefix("torch."),
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _steps(run: Run) -> None:
    """Steps ``start`` to ``num_steps``, with evals and checkpoints on the way."""
    config, learner, world = run.config, run.learner, run.learner.world
    batches = read_epochs(
        run.caches,
        run.plan,
        run.share,
        start=divmod(run.start, run.plan.num_batches),
        threads=config.reader_threads,
        pin=world.device.type == "cuda",
    )
    if run.start == 0:
        _evaluate(run, 0)
    with closing(batches), Interrupt() as interrupt:
        for step in range(run.start, run.num_steps):
            lr = learning_rate(config, step, run.num_steps)
            loss, grad_norm, num_samples = train_step(learner, batches, lr)
            done, last = step + 1, step + 1 == run.num_steps
            run.log.step(done, lr, loss, grad_norm, num_samples)
            at_log = last or _is_due(done, config.log_every)
            # A rank alone must not stop: the others would wait for its gradients for ever.
            may_stop = world.size == 1 or _is_due(done, STOP_EVERY)
            stop = may_stop and world.any(interrupt.signal is not None)
            due = done in config.checkpoint_at or _is_due(done, config.checkpoint_every)
            if at_log or stop or due:
                run.log.flush()
            if last or _is_due(done, config.eval_every):
                _evaluate(run, done)
            if last or stop or due:
                _write_checkpoint(run, done)
            if stop and not last:
                run.log.say(f"stopped after step {done}; --resume goes on from its checkpoint")
                raise SystemExit(interrupt.exit_code)


def _write_checkpoint(run: Run, step: int) -> None:
    learner = run.learner
    if learner.world.is_main:
        state = {
            **run.identity,
            "plan": run.plan.digest,
            "global_batch": run.plan.global_batch,
            "config": {name: getattr(run.config, name) for name in FIXED},
            "scaler": learner.scaler.state_dict(),
        }
        config = run.config
        write_checkpoint(config.out, step, learner.unet, config.full, learner.optimizer, state)
    learner.world.wait()  # a rank that ends before the checkpoint is written would end them all


def _evaluate(run: Run, step: int) -> None:
    if run.val is not None:
        run.log.flush()
        run.log.eval(step, evaluate(run.learner, run.val, run.config))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
