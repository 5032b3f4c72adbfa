"""What a rerun would lose is refused before anything is touched; what only moved is copied."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from encodes import (
    LONG_AGO,
    contents,
    copy_old,
    counted,
    encode,
    make_old,
    samples_of,
    settings_of,
    shards_of,
)
from PIL import Image

import precompute.encode
from precompute.dataset.records import Blob
from precompute.images.decode import image_size
from precompute.plan.dry_run import dry_run
from precompute.plan.scan import _head
from precompute.report import summarize
from runtime.files import user_cache
from tests.test_tars import put_tar


def rename_captions(data: Path) -> None:
    for path in data.glob("*.txt"):
        path.rename(path.with_suffix(".text"))


def stray_list(data: Path) -> None:
    (data / "captions.jsonl").write_text(json.dumps({"file_name": "000.png", "text": "x"}))


def cut_short(data: Path) -> None:
    """As a sync that is at work leaves them: the first bytes are right."""
    for path in data.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-30])


def most_gone(data: Path) -> None:
    for path in sorted(data.glob("*.png"))[2:]:
        path.unlink()


LOSSES: dict[str, tuple[Callable[[Path], object], dict[str, int], str]] = {
    "captions renamed": (rename_captions, {}, "14 would be rejected"),
    "a stray list": (stray_list, {}, "13 would be rejected"),
    "a folder that shows few files": (most_gone, {}, "12 are not in"),
    "images cut short": (cut_short, {}, "14 would be rejected"),
    "--min-size": (lambda _: None, {"min_size": 1000}, "fewer than --min-size 1000"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_would_be_removed_is_refused_before_anything_is_touched(
    work: Path, base: Path, name: str
) -> None:
    change, more, why = LOSSES[name]
    change(work / "data")
    before = contents(work / "cache")
    settings = settings_of(work / "data", base, work / "cache", max_rejected=1.0, **more)
    with pytest.raises(ValueError, match=rf"samples would be removed: .*{why}") as refused:
        precompute.encode.encode(settings)
    assert contents(work / "cache") == before
    with pytest.raises(ValueError, match="samples would be removed") as dry:
        [*dry_run(settings)]
    assert str(dry.value) == str(refused.value)
    assert contents(work / "cache") == before


def test_a_changed_image_or_mask_that_does_not_decode_is_known_before(
    work: Path, base: Path
) -> None:
    """One is dropped, within the bound, and named by the dry run too."""
    paths = sorted((work / "data").glob("*.png"))
    width, height = image_size(paths[1].read_bytes())
    Image.new("L", (width, height), 200).save(paths[1].with_suffix(".mask.png"))
    encode(work / "data", base, work / "cache")
    cut_short_one = (paths[0], paths[1].with_suffix(".mask.png"))
    for path in cut_short_one:
        path.write_bytes(path.read_bytes()[:-30])
    settings = settings_of(work / "data", base, work / "cache")
    lines = "\n".join(dry_run(settings))
    assert f"rejected: {paths[0].name}: truncated" in lines
    assert f"rejected: {paths[1].name}: its mask: truncated" in lines
    assert (
        summarize(encode(work / "data", base, work / "cache").changes) == "2 removed, 12 unchanged"
    )


def test_the_share_that_a_refusal_names_is_enough(work: Path, base: Path) -> None:
    for path in sorted((work / "data").glob("*.png"))[:8]:
        path.unlink()
    with pytest.raises(ValueError, match=r"8 of its 14 .* give --max-removed 0.58;"):
        encode(work / "data", base, work / "cache")
    report = encode(work / "data", base, work / "cache", max_removed=0.58)
    assert summarize(report.changes) == "8 removed, 6 unchanged"


def draw_other(folder: Path) -> None:
    """Other images by the same names."""
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        with Image.open(path) as image:
            size = image.size
        Image.new("RGB", size, (number, 2 * number, 7)).save(path)
    make_old(folder)


def test_another_dataset_is_refused_by_name_though_its_files_are_named_alike(
    work: Path, base: Path
) -> None:
    encode(work / "data", base, work / "cache")
    other = copy_old(work / "data", work / "other")
    draw_other(other)
    before = contents(work / "cache")
    with pytest.raises(ValueError, match=r"was made from .*/data; none of its images is in .*/o"):
        encode(other, base, work / "cache")
    shutil.rmtree(user_cache() / "datasets")  # as on another machine
    with pytest.raises(ValueError, match="was made from another dataset; none of its images"):
        encode(other, base, work / "cache")
    assert contents(work / "cache") == before
    report = encode(other, base, work / "cache", allow_other_dataset=True)
    assert summarize(report.changes) == "14 images changed"


def test_a_dataset_that_was_moved_is_the_same(work: Path, base: Path) -> None:
    encode(work / "data", base, work / "cache")
    (work / "data").rename(work / "moved")
    with counted() as count:
        report = encode(work / "moved", base, work / "cache")
    assert count == (0, 0) and summarize(report.changes) == "14 unchanged"


def test_images_that_were_edited_in_place_are_no_other_dataset(work: Path, base: Path) -> None:
    encode(work / "data", base, work / "cache")
    draw_other(work / "data")
    report = encode(work / "data", base, work / "cache", rehash=True)
    assert summarize(report.changes) == "14 images changed"


# What moved.


def test_a_folder_that_was_renamed_is_copied(images: Path, base: Path, tmp_path: Path) -> None:
    copy_old(images, tmp_path / "data" / "before")
    encode(tmp_path / "data", base, tmp_path / "cache")
    (tmp_path / "data" / "before").rename(tmp_path / "data" / "after")
    with counted() as count:
        report = encode(tmp_path / "data", base, tmp_path / "cache")
    assert count == (0, 0) and summarize(report.changes) == "14 renamed"
    encode(tmp_path / "data", base, tmp_path / "fresh")
    assert samples_of(tmp_path / "cache") == samples_of(tmp_path / "fresh")


def test_what_was_renamed_with_another_caption_costs_its_text(work: Path, base: Path) -> None:
    data = work / "data"
    (data / "003.png").rename(data / "new.png")
    (data / "003.txt").unlink()
    (data / "new.txt").write_text("another caption")
    with counted() as count:
        report = encode(data, base, work / "cache")
    assert count == (0, 1)
    assert summarize(report.changes) == "1 renamed, 1 caption changed, 13 unchanged"


@pytest.mark.filterwarnings("ignore:.*settings changed")
@pytest.mark.parametrize("mask", [False, True])
def test_variants_that_join_are_encoded_alone(work: Path, base: Path, mask: bool) -> None:
    """And the sample is that of a fresh encode, to the byte."""
    data, cache = work / "data", work / "cache"
    if mask:
        with Image.open(data / "003.png") as image:
            Image.new("L", image.size, 200).save(data / "003.mask.png")
        make_old(data)
        encode(data, base, cache)
    with counted() as count:
        encode(data, base, cache, flip=True)
    assert count == (14, 0)
    encode(data, base, work / "flipped", flip=True)
    assert samples_of(cache) == samples_of(work / "flipped")
    few, more = work / "few", work / "more"
    encode(data, base, few, crops=1)
    with counted() as count:
        encode(data, base, few, crops=3)
    encode(data, base, more, crops=3)
    assert samples_of(few) == samples_of(more)
    num_variants = sum(
        safetensors.torch.load(sample["safetensors"])["sizes"].shape[0]
        for sample in samples_of(more).values()
    )
    assert count == (num_variants - 14, 0)


def test_a_tar_that_was_renamed_is_copied(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    members: dict[str, bytes] = {}
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 90, 9)).save(tmp_path / "x.png")
        members[f"{number}.png"] = (tmp_path / "x.png").read_bytes()
        members[f"{number}.txt"] = b"a caption"
    put_tar(data / "one.tar", members)
    encode(data, base, tmp_path / "cache")
    (data / "one.tar").rename(data / "two.tar")
    with counted() as count:
        report = encode(data, base, tmp_path / "cache")
    assert count == (0, 0) and summarize(report.changes) == "3 renamed"


@pytest.mark.parametrize("kill", [False, True])
def test_what_moved_between_train_and_val_is_copied(
    images: Path, base: Path, tmp_path: Path, kill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run is stopped after the one that it left was written anew."""
    data, out = tmp_path / "data", tmp_path / "cache"
    copy_old(images, data / "train")
    (data / "val").mkdir()

    def move(source: str, target: str, *names: str) -> None:
        for name in names:
            for end in ("png", "txt"):
                (data / source / f"{name}.{end}").rename(data / target / f"{name}.{end}")

    def run(to: Path = out) -> list[str]:
        reports = precompute.encode.encode(settings_of(data, base, to))
        return [summarize(report.changes) for report in reports]

    move("train", "val", "000", "001", "002", "003")
    run()
    move("train", "val", "004", "005")
    move("val", "train", "001")
    if kill:
        real = precompute.encode.encode_shard
        written: list[str] = []

        def write(work: object, folder: Path, *rest: object) -> None:
            if folder.name == "val" and written:
                raise KeyboardInterrupt
            written.append(folder.name)
            real(work, folder, *rest)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(precompute.encode, "encode_shard", write)
            with pytest.raises(KeyboardInterrupt):
                run()
    with counted() as count:
        summaries = run()
    assert count == (0, 0)
    if not kill:
        assert summaries == ["1 renamed, 8 unchanged", "2 renamed, 3 unchanged"]
    fresh = tmp_path / "fresh"
    run(fresh)
    for part in ("train", "val"):
        assert samples_of(out / part) == samples_of(fresh / part)
        assert not (out / part / "replaced").exists()


def test_one_new_image_a_day_fills_one_shard(images: Path, base: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (9 * number, 3, 3)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"caption {number}")
        make_old(data)
        with counted() as count:
            encode(data, base, out, shard_size=4)
        assert count == (1, 1)
    assert sorted(path.name for path in out.glob("*.tar")) == [
        "64x64-000000.tar",
        "64x64-000001.tar",
    ]


def test_a_dataset_that_changes_again_before_an_interrupted_run_is_resumed(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards of one name then lie there, the old one aside: each sample is its own still."""
    data, out = work / "data", work / "cache"
    shard = next(iter(sorted(shards_of(out).values(), key=len, reverse=True)))
    moving, staying = sorted(shard)[:2]
    rename(data, moving, "10_x")
    real, written = precompute.encode.encode_shard, []

    def write(task: Any, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(task.name)
        real(task, *rest)

    settings = {"repeat_folders": True}
    with monkeypatch.context() as patch:
        patch.setattr(precompute.encode, "encode_shard", write)
        with pytest.raises(KeyboardInterrupt):
            encode(data, base, out, **settings)
    assert [*(out / "replaced").glob("*.index")]
    for path in data.glob("*.txt"):
        path.write_text(path.read_text() + " again")
    encode(data, base, out, **settings)
    encode(data, base, work / "fresh", **settings)
    assert samples_of(out) == samples_of(work / "fresh")
    assert staying in samples_of(out)


def rename(data: Path, name: str, folder: str) -> None:
    """Into a folder of its own, with its text."""
    (data / folder).mkdir()
    for path in (data / name, (data / name).with_suffix(".txt")):
        path.rename(data / folder / path.name)


# What is read, and what is remembered of it.


def test_a_fresh_encode_reads_each_large_image_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for end in ("png", "jpg"):
        Image.effect_noise((400, 400), 90).convert("RGB").save(data / f"a.{end}")
        os.rename(data / f"a.{end}", data / f"{end}.{end}")
        (data / f"{end}.txt").write_text("noise")
        assert (data / f"{end}.{end}").stat().st_size > 1 << 16
    make_old(data)
    reads: list[str] = []
    real = Blob.read

    def read(self: Blob) -> bytes:
        reads.append(self.file.name)
        return real(self)

    monkeypatch.setattr(Blob, "read", read)
    monkeypatch.setattr(precompute.sanity, "NUM_CHECKED", 0)  # they read their own
    settings = settings_of(data, base, tmp_path / "cache")
    [*dry_run(settings)]
    assert not reads
    precompute.encode.encode(settings)
    assert sorted(reads) == ["jpg.jpg", "png.png"]
    precompute.encode.encode(settings)
    assert sorted(reads) == ["jpg.jpg", "png.png"]
    metadata = {
        path: json.loads(sample["json"]) for path, sample in samples_of(tmp_path / "cache").items()
    }
    assert len(metadata["png.png"]["digests"]["picture"]) == 64


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tiff", "gif", "bmp", "jp2", "avif"])
def test_the_first_bytes_tell_the_size_that_all_do(
    form: str, orientation: int, tmp_path: Path
) -> None:
    """Wherever a format keeps its EXIF."""
    path = tmp_path / f"x.{form}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.effect_noise((300, 500), 90).convert("RGB")
    more = {"exif": exif} if form in ("jpg", "png", "webp", "tiff", "avif") else {}
    noise.save(path, **more)
    complete = image_size(path.read_bytes())
    head = _head(Blob.of(path))
    assert head is None or image_size(head) == complete
    assert (head is not None) == (form == "jpg" or (form == "png" and head is not None))


def test_a_png_that_says_behind_its_data_that_it_lies_is_read_whole(tmp_path: Path) -> None:
    path, exif = tmp_path / "x.png", Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((300, 500), 90).convert("RGB").save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4])]
    rest = data[:start] + data[start + len(chunk) :]
    path.write_bytes(rest[:-12] + chunk + rest[-12:])
    assert image_size(path.read_bytes()) == (500, 300)
    assert _head(Blob.of(path)) is None


def test_nothing_of_the_dataset_is_remembered_in_the_cache(work: Path, base: Path) -> None:
    """And what an earlier version left there is removed."""
    (work / "cache" / "scan.json").write_text("{}")
    encode(work / "data", base, work / "cache", rehash=True)
    for path in (work / "cache").iterdir():
        assert str(work).encode() not in path.read_bytes(), path
    assert not (work / "cache" / "scan.json").exists()


def test_notes_with_a_flipped_bit_are_thrown_away_whole(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    encode(work / "data", base, work / "cache")
    (notes,) = (user_cache() / "datasets").iterdir()
    complete = notes.read_bytes()
    caption = (work / "data" / "003.txt").read_text().strip().encode()
    assert caption in complete
    before = samples_of(work / "cache")
    for at in (complete.index(caption), 3, len(complete) - 1):
        notes.write_bytes(complete[:at] + bytes([complete[at] ^ 1]) + complete[at + 1 :])
        report = encode(work / "data", base, work / "cache")
        assert summarize(report.changes) == "14 unchanged"
    for wrong in (b"", b"[]", b"[" * 9999, b'{"version": 2}'):
        notes.write_bytes(wrong)
        encode(work / "data", base, work / "cache")
    assert samples_of(work / "cache") == before


def test_one_dataset_by_its_full_and_by_its_relative_path(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(work / "data", base, work / "cache")
    monkeypatch.chdir(work)
    monkeypatch.setattr(Blob, "read", lambda _: pytest.fail("a file is read again"))
    assert summarize(encode(Path("data"), base, work / "cache").changes) == "14 unchanged"


@pytest.mark.filterwarnings("ignore:.*settings changed")
def test_an_image_that_goes_away_under_way_costs_no_other(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = precompute.encode.refuse_losses

    def refuse(*args: object) -> None:
        (work / "data" / "003.png").unlink()
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(precompute.encode, "refuse_losses", refuse)
    os.utime(work / "data" / "003.png", (LONG_AGO + 9, LONG_AGO + 9))
    report = encode(work / "data", base, work / "cache", flip=True)
    (rejected,) = report.rejected
    assert rejected.path == "003.png" and "no such file" in rejected.reason
    assert report.num_samples == 13
