"""Gathers weights, previews and their card for the hub, in a folder or as a list of files."""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from infer.export import export, unet_folder
from infer.export_settings import SUFFIX, ExportSettings, PushSettings
from infer.model_card import ModelCard
from runtime.files import check_own_folder, replacement, write_mark, writing
from runtime.path_kinds import missing
from sdxl.base import Base, find_weights, open_base
from sdxl.contact_sheet import read_sheet
from sdxl.hub import is_hub_id
from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.read import find_lora, lora_metadata, read_lora_file
from sdxl.lora.weights import LoraWeights
from sdxl.metadata import NOTES_FILE, SCHEDULER_CONFIG, ModelMetadata, read_model_metadata
from sdxl.single_file import read_header
from sdxl.tensor_files import check_digest

CARD = "README.md"
MARK = "push.json"  # in the folder of a dry run, and never sent: the digests of its files
_WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index*.json")
MAX_PREVIEWS = 12  # on a card


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run adds to its weights."""

    base: str | None = None
    sheets: Mapping[int, Path] = field(default_factory=dict)  # of previews, by step
    step: int | None = None  # of the weights, if they are those of a checkpoint
    last_step: int = 0  # of the run: the weights' step where nothing else states it
    settings: tuple[tuple[str, str], ...] = ()  # flags and values that differ from the defaults
    facts: tuple[tuple[str, str], ...] = ()


@contextmanager
def gathered(settings: PushSettings, weights: Path, record: RunRecord) -> Iterator[dict[str, Path]]:
    """The files to send, by their names in the repository. ``weights`` is a LoRA file, or a folder
    with one or with a UNet; files that are made for it last while entered.

    Raises:
        ValueError: there are no weights, they are damaged, or no license is known.
    """
    with TemporaryDirectory(prefix="shardtune-push-") as temporary:
        work = Path(temporary)
        unet = unet_folder(weights)
        base = None if settings.base is None else open_base(settings.base)
        if unet is None:
            files, metadata = _lora_files(settings, weights, work)
        else:
            files, metadata = _unet_files(settings, unet, work)
        for path in files.values():
            if path.suffix == SUFFIX:
                check_digest(path)
        license = settings.license or _license(base, metadata)
        previews = _previews(_sheet(record, metadata), work) if settings.previews else {}
        ui_file = f"{settings.name}{SUFFIX}"
        card = ModelCard(
            repository=settings.repository,
            is_lora=unet is None,
            base=_base_name(base, metadata, record),
            license=license,
            metadata=metadata,
            diffusers_file=LORA if LORA in files else None,
            ui_file=ui_file if ui_file in files else None,
            has_fp16=any(".fp16." in name for name in files),
            instance_prompt=settings.instance_prompt,
            previews=tuple((f"images/{path.name}", text) for path, text in previews.items()),
            settings=record.settings,
            facts=record.facts,
        )
        (work / CARD).write_text(card.text, encoding="utf-8")
        yield {
            CARD: work / CARD,
            **files,
            **{f"images/{path.name}": path for path in previews},
        }


def _lora_files(
    settings: PushSettings, weights: Path, work: Path
) -> tuple[dict[str, Path], ModelMetadata]:
    """A LoRA as diffusers reads it, and as user interfaces do; one of them is made where only the
    other is there."""
    try:
        path = find_lora(weights)
    except ValueError:
        if not weights.is_dir():
            raise
        raise ValueError(
            f"{weights}: has no weights that a run ended with; --checkpoint last takes the newest "
            "checkpoint of a run"
        ) from None
    file = read_lora_file(path)
    for_uis = f"{settings.name}{SUFFIX}"
    own, other = (for_uis, LORA) if file.kind == "kohya" else (LORA, for_uis)
    files = {own: path}
    beside = path.with_name(KOHYA)
    modules = [module for part in file.parts.values() for module in part.values()]
    is_dora = any(isinstance(m, LoraWeights) and m.magnitude is not None for m in modules)
    if path.name == LORA and beside.is_file():
        files[other] = beside
    elif not is_dora:  # which user interfaces apply otherwise than it was trained
        try:
            export(ExportSettings(weights=path, out=work / other, base=settings.base))
            files[other] = work / other
        except ValueError as error:
            warnings.warn(f"{other} is not made: {error}", stacklevel=2)
    return files, lora_metadata(file.metadata)


def _unet_files(
    settings: PushSettings, unet: Path, work: Path
) -> tuple[dict[str, Path], ModelMetadata]:
    """A UNet with its schedule, and with ``--base`` a whole model for user interfaces."""
    # By name: whatever else lies there (notes, an .env) is the user's own, and stays here.
    weights = {path for pattern in _WEIGHTS for path in unet.glob(pattern)}
    weights.update(find_weights(unet).files)  # an index may name its pieces as it likes
    paths = [unet / "config.json", unet / NOTES_FILE, *sorted(weights)]
    files = {f"unet/{path.name}": path for path in paths if path.is_file()}
    schedule = unet.parent / "scheduler" / SCHEDULER_CONFIG
    if schedule.is_file():
        files[f"scheduler/{schedule.name}"] = schedule
    if settings.base is not None:
        model = work / f"{settings.name}{SUFFIX}"
        export(ExportSettings(weights=unet, out=model, base=settings.base))
        files[model.name] = model
    header = read_header(find_weights(unet).files[0])[1]
    return files, read_model_metadata(header)


def _license(base: Base | None, metadata: ModelMetadata) -> str:
    license = metadata.license or (base.license if base is not None else None)
    if license is None:
        raise ValueError(
            "the weights and their base state no license, and the hub wants one: give --license, "
            "which is openrail++ where the base is SDXL 1.0"
        )
    return license


def _base_name(base: Base | None, metadata: ModelMetadata, record: RunRecord) -> str | None:
    """A hub id if there is one, else a name."""
    names = [base.name if base is not None else None, metadata.base, record.base]
    stated = [name for name in names if name]
    return next((name for name in stated if is_hub_id(name)), stated[0] if stated else None)


def _sheet(record: RunRecord, metadata: ModelMetadata) -> Path | None:
    """The newest sheet that shows the weights or what they were before, never what came after: a
    run may publish its best weights, which are not its last."""
    stated = (record.step, metadata.steps, record.last_step)
    end = next(step for step in stated if step is not None)
    steps = [step for step in record.sheets if 0 < step <= end]
    return record.sheets[max(steps)] if steps else None


def _previews(sheet: Path | None, work: Path) -> dict[Path, str]:
    """The images of a sheet as files, each with its prompt; the sheet itself, without a prompt,
    where it cannot be cut apart."""
    if sheet is None:
        return {}
    try:
        images = read_sheet(sheet)[:MAX_PREVIEWS]
    except ValueError as error:
        warnings.warn(f"{error}; no previews are sent", stacklevel=2)
        return {}
    (work / "images").mkdir()
    if not images:
        return {Path(shutil.copyfile(sheet, work / "images" / "previews.png")): ""}
    paths = {}
    for number, (image, prompt) in enumerate(images, 1):
        path = work / "images" / f"{number:02d}.png"
        image.save(path)
        paths[path] = prompt
    return paths


def write_folder(files: Mapping[str, Path], out: Path) -> None:
    """Copy ``files`` into the folder ``out``, in place of those of a former call.

    Raises:
        ValueError: something else is there, or one of those files was changed; nothing is written.
        OSError: it cannot be written.
    """
    check_own_folder(out, MARK, "push --dry-run")
    if not out.parent.is_dir():
        raise ValueError(missing(out.parent))
    with writing(out), replacement(out) as folder:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        write_mark(folder, MARK)
