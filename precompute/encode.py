"""The encode stage: finds what is cached, encodes what is missing, writes the manifest last.

A run that has work first writes a plan of where each sample goes (``precompute.plan.plan_file``),
then removes the manifest, retires the shards that it writes anew, and writes them. The manifest is
written last, and then the plan is removed. A run that follows one that died anywhere finds the
plan, the finished shards and the retired ones, and ends with the same bytes.
"""

import errno
import gc
import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from precompute.dataset.hub import locate_dataset
from precompute.encode_part import check_planned, refuse_missing, write_part
from precompute.encode_shard import encode_shard
from precompute.encoders import Encoders
from precompute.plan.cache_plan import (
    CachePlan,
    finish,
    plan_caches,
    prepare,
    warn_about_enlarging,
    warn_about_reencoding,
    warn_of_other_revision,
)
from precompute.plan.disk_space import Sizer, check_disk_space
from precompute.plan.plan_file import PlanFile
from precompute.plan.removals import refuse_losses
from precompute.plan.reuse import is_whole
from precompute.plan.scan import Notes
from precompute.report import Progress, Report, count_across
from precompute.settings import EncodeSettings
from runtime.devices import exact_fp32, num_cores, num_threads, pick_device, total_memory
from runtime.errors import echo
from runtime.files import PARTIAL, format_bytes, remove_path
from runtime.locks import locked
from runtime.messages import pluralize
from runtime.options import AUTO, parse_memory
from runtime.work_queue import WorkQueue
from sdxl.base import Base, open_base
from sdxl.prompt_files import Prompt, read_prompts
from shards.manifest import LOCK

BATCH_SIZE = 2  # where no GPU's memory says more

# What encoding holds on a GPU. Counted for SDXL's VAE in fp32: 2.7 GB for each image of 1024 x 1024
# pixels, and 2 GB of weights; the rest is for CUDA and for what its kernels take.
WEIGHTS_BYTES, BYTES_PER_PIXEL = 3_000_000_000, 3000
# A larger batch gives a GPU nothing to do better, and the last one of each shard is filled up.
MAX_BATCH_PIXELS, MAX_BATCH_SIZE = 4 * 1024**2, 16


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What the main process sends to the others; the rest is in the plan files of the caches."""

    base: str  # as the main process opened it: a hub id with its commit
    batch_size: int
    threads: int
    caches: list[tuple[str, int]]  # folder, and how many shards are to be written
    num_encodes: int  # samples of which something is encoded


def encode(settings: EncodeSettings) -> list[Report]:
    """Encode a dataset into ``settings.out``, or its ``train`` and ``val``; a report for each.

    With several processes the main one plans and returns the reports, and each process claims one
    shard after the other. The other processes return an empty list.

    Raises:
        ValueError: the dataset, the base, the prompts or the settings cannot be used.
        OSError: a file cannot be read or written; what is whole stays.
    """
    plans = list[CachePlan]()
    exact_fp32()
    with (
        WorkQueue() as queue,
        ExitStack() as stack,
        _explain_full_disk(settings.out),
        _report_interrupt(plans),
    ):
        if settings.share is not None:
            write_part(settings, *settings.share)
            return []
        if settings.part == "finish":
            check_planned(settings.out)
        queue.check_shared(settings.out)
        if not queue.is_main:
            job = EncodeJob(**json.loads(queue.wait_for("job")))
            stack.enter_context(num_threads(job.threads))
            base = _open_base(settings, job.base)
            _write_shards(queue, Encoders(settings, base, job.batch_size), job)
            queue.leave()
            return []
        texts = settings.preview_prompts
        prompts = None if texts is None else read_prompts(texts)
        base = _open_base(settings, settings.base)
        with _no_garbage_collection():
            local = locate_dataset(settings)
            notes = Notes(settings.out, local.name, settings.rehash)
            plans += plan_caches(
                local.settings,
                base,
                notes,
                lambda folder: stack.enter_context(locked(folder / LOCK)),
            )
            refuse_losses(plans, settings, notes)
            for plan in plans:
                plan.dataset_revision = local.commit
                warn_of_other_revision(plan.folder, local)
            notes.write()
        shard_tasks = {plan.folder: plan.shard_tasks for plan in plans}
        check_disk_space(settings.out, shard_tasks, Sizer.of(settings, base))
        job = _make_job(settings, base, plans)
        stack.enter_context(num_threads(job.threads))
        if settings.part == "finish":
            refuse_missing(plans)
        return _run_main(
            queue, Encoders(local.settings, base, job.batch_size), job, plans, prompts, notes
        )


def _open_base(settings: EncodeSettings, name_or_path: str) -> Base:
    return open_base(name_or_path, vae=settings.vae, tokenizers=settings.tokenizers)


def _run_main(
    queue: WorkQueue,
    encoders: Encoders,
    job: EncodeJob,
    plans: list[CachePlan],
    prompts: list[Prompt] | None,
    notes: Notes,
) -> list[Report]:
    """The main process's part of a run, once the plans are made."""
    reports = []
    for plan in plans:
        warn_about_reencoding(plan)
        warn_about_enlarging(plan, encoders.settings.resolution)
        report = Report(
            plan.folder, plan.changes, num_upscaled=plan.num_upscaled, imports=plan.imports
        )
        is_val = len(plans) > 1 and plan.folder.name == "val"  # previews are of training
        report.num_prompts = prepare(plan, encoders, None if is_val else prompts)
        reports.append(report)
    if encoders.settings.part == "plan":
        num = sum(num_shards for _, num_shards in job.caches)
        echo(
            f"{encoders.settings.out}: {pluralize(num, 'shard')} to be written; next, on any "
            "machines and in any order, the same command with --part 1/N to --part N/N, and then "
            "with --part finish"
        )
        return []
    queue.publish("job", json.dumps(asdict(job)))
    _write_shards(queue, encoders, job)
    for plan, report in zip(plans, reports, strict=True):
        finish(plan, report, encoders, notes.memory)
    count_across(reports)
    notes.write()
    queue.leave()
    return reports


def _make_job(settings: EncodeSettings, base: Base, plans: list[CachePlan]) -> EncodeJob:
    """The job, with the batch size and threads of the existing cache unless others are asked for:
    they decide the last bits.

    The defaults depend neither on the number of processes nor on their environment.
    """
    budget = parse_memory(settings.fit or AUTO)
    batch_size = default_batch_size(settings, budget or total_memory(pick_device(settings.device)))
    before = next((plan.made_with for plan in plans if plan.made_with), {})
    if budget is not None:
        _check_fit(settings, budget)
        if peak_bytes(settings, before.get("batch_size", 1)) > budget:
            before = {**before, "batch_size": None}  # encoded with more memory than there is now
        chosen_size = settings.batch_size or before.get("batch_size") or batch_size
        size = format_bytes(peak_bytes(settings, chosen_size))
        echo(f"--fit {settings.fit}: batches of {chosen_size}, about {size}")
    chosen = {}
    for name, default in (("batch_size", batch_size), ("threads", num_cores())):
        requested, earlier = getattr(settings, name), before.get(name)
        chosen[name] = requested or earlier or default
        if (
            requested
            and earlier
            and requested != earlier
            and any(plan.shard_tasks for plan in plans)
        ):
            warnings.warn(
                f"--{name.replace('_', '-')} {requested}: the cache was encoded with {earlier}; "
                "what is encoded now may differ from that in the last bits",
                stacklevel=2,
            )
    return EncodeJob(
        base=base.pinned,
        **chosen,
        caches=[(str(plan.folder), len(plan.shard_tasks)) for plan in plans],
        num_encodes=sum(
            shard_task.num_encodes for plan in plans for shard_task in plan.shard_tasks
        ),
    )


def default_batch_size(settings: EncodeSettings, memory: int | None) -> int:
    """A power of two, by the memory of the GPU in bytes (None: there is no GPU).

    By all of its memory, not by what happens to be free: the batch size decides the last bits.
    """
    if memory is None:
        return BATCH_SIZE
    pixels = settings.resolution**2
    fitting = (memory - WEIGHTS_BYTES) // _bytes_of_image(settings)
    most = max(1, min(fitting, MAX_BATCH_PIXELS // pixels, MAX_BATCH_SIZE))
    return 1 << (most.bit_length() - 1)


def _bytes_of_image(settings: EncodeSettings) -> int:
    halved = 2 if settings.vae_dtype in ("fp16", "bf16") else 1
    return BYTES_PER_PIXEL * settings.resolution**2 // halved


def peak_bytes(settings: EncodeSettings, batch_size: int) -> int:
    """The estimated peak of memory of the GPU."""
    return WEIGHTS_BYTES + batch_size * _bytes_of_image(settings)


def _check_fit(settings: EncodeSettings, budget: int) -> None:
    """
    Raises:
        ValueError: not one image fits, or not as many as ``--batch-size`` asks for.
    """
    least = peak_bytes(settings, settings.batch_size or 1)
    if least > budget:
        is_fp32 = settings.vae_dtype not in ("fp16", "bf16")
        remedy = "a smaller --batch-size" if (settings.batch_size or 1) > 1 else "--resolution"
        raise ValueError(
            f"--fit {settings.fit}: {pluralize(settings.batch_size or 1, 'image')} at a time take "
            f"about {format_bytes(least)}; {'--vae-dtype bf16 or ' if is_fp32 else ''}{remedy} "
            "takes less"
        )


def _write_shards(queue: WorkQueue, encoders: Encoders, job: EncodeJob) -> None:
    """This process's part of all shards; the main one returns when all are written."""
    todo = [(Path(folder), number) for folder, num in job.caches for number in range(num)]
    if not todo:
        return
    files: dict[Path, PlanFile] = {}  # opened when the first shard of a cache is claimed
    with Progress(queue, job.num_encodes) as progress:

        def write(claimed: int, *, unless_whole: bool = False) -> None:
            folder, number = todo[claimed]
            file = files[folder] = files.get(folder) or PlanFile(folder)
            shard_task, recipe = file.shard(number), file.header["recipe"]
            if unless_whole and is_whole(folder, shard_task.name):
                return
            encode_shard(shard_task, folder, encoders, recipe, progress.tick)

        for claimed in queue.claim("shards", len(todo)):
            write(claimed)
            progress.shard_done()
        if queue.is_main and not progress.wait_for(len(todo)):
            warnings.warn(
                "a process that had claimed shards does not write them any more; the main one does",
                stacklevel=2,
            )
            for claimed in range(len(todo)):  # whoever still writes one too does not replace it
                write(claimed, unless_whole=True)
            for folder in files:  # what the lost one left
                for ending in ("tar", "index"):
                    for left in folder.glob(f"*.{ending}.*{PARTIAL}"):
                        remove_path(left)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch the cycle collector off: it takes nearly half the time of a scan and finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _explain_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{out}: the disk is full. Nothing is damaged: make room, and the same command goes on"
        ) from error


@contextmanager
def _report_interrupt(plans: list[CachePlan]) -> Iterator[None]:
    """Note how many shards are finished when a run is interrupted; the command line prints it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        shards = [(plan.folder, name) for plan in plans for name in plan.names]
        if shards:
            num_complete = sum(is_whole(*shard) for shard in shards)
            stop.add_note(
                f"{num_complete} of {len(shards)} shards are whole; the same command goes on from "
                "there"
            )
        raise
