"""Everything in the folder is encoded, a sidecar of something, or counted and named."""

import io
import os
import random
import re
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest

from precompute.dataset.file_roles import IMAGE_ENDINGS, TEXTS, UNREAD, stem_of, stems_of_masked
from precompute.dataset.records import Source
from precompute.dataset.sources import read_dataset
from precompute.settings import EncodeSettings
from tests.folders import captions, image_bytes, put, put_list, read_one, read_set, reasons

FOLDERS = ["", "", "", "sub", "sub/deep", "masks", "images", "Test", "validation", "train"]
FOLDERS += [".ipynb_checkpoints", "__MACOSX", "@eaDir", "10_cat", "test shots", "a.b"]
STEMS = ["a", "A", "b", "photo.v2", "a_mask", "mask-b", "a.mask", "._a", "Thumbs", "c d", "é"]
ENDINGS = [".jpg", ".PNG", ".webp", ".mpo", ".heif", ".jxl", ".tga", ".CR2", "", ""]
ENDINGS += [
    ".txt",
    ".TXT",
    ".caption",
    ".json",
    ".md",
    ".csv",
    ".db",
    ".tar",
    ".tar.gz",
    ".npz",
    ".parquet",
]
LISTED = ["captions.jsonl", "metadata.csv", "Metadata.JSONL"]
PNG = image_bytes()


def random_bytes(rng: random.Random, name: str) -> bytes:
    if name.endswith(".tar"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for _ in range(rng.randrange(4)):
                info = tarfile.TarInfo(rng.choice(STEMS) + rng.choice(ENDINGS[:16]))
                info.size = len(PNG)
                archive.addfile(info, io.BytesIO(PNG))
        return file.getvalue()[: rng.choice([None, None, None, 900])]
    if name.lower().endswith(".txt") and rng.random() < 0.6:
        return b"a cat"
    return rng.choice([PNG, b"a cat", b"", rng.randbytes(40), "a cat".encode("utf-16")])


def random_leaf(rng: random.Random, path: Path) -> None:
    """A file, or one of the things that are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() or path.is_symlink():
        return
    kind = rng.random()
    if kind < 0.03:
        os.mkfifo(path)
    elif kind < 0.06:
        path.symlink_to(rng.choice([path.name, "gone", "/dev/zero"]))
    elif kind < 0.07:
        path.mkdir()
    else:
        path.write_bytes(random_bytes(rng, path.name))


def random_tree(rng: random.Random, root: Path) -> None:
    folders = rng.sample(FOLDERS, 4)
    for _ in range(rng.randrange(1, 30)):
        name = rng.choice(STEMS) + rng.choice(ENDINGS)
        path = root / rng.choice(folders) / name
        random_leaf(rng, path)
        if rng.random() < 0.4:
            random_leaf(rng, path.with_name(stem_of(name) + rng.choice([".txt", ".TXT"])))
    if rng.random() < 0.3:
        rows = [f'{{"file_name": "{stem}.jpg", "text": "x"}}' for stem in rng.sample(STEMS, 3)]
        name = rng.choice(LISTED)
        text = "\n".join(rows) if "j" in name.lower() else "file_name,text\na.jpg,x\nb.PNG,y"
        (root / name).write_text(text)


def leaves(root: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(where, name), root)
        for where, _, names in os.walk(root)
        for name in names
    }


def unaccounted(root: Path, sources: dict[str, Source], message: str) -> list[str]:
    """Leaves that are in no account; whose sidecar a file is, is judged by its name alone."""
    images, skipped, unused = set[str](), list[str](), set[str]()
    for name, source in sources.items():
        inside = inside_of(root, name, source)
        images |= {inside + item.path for item in [*source.records, *source.rejected]}
        skipped += [inside + path for path in source.hidden]
        unused |= {inside + path for path in source.unused}
        for path in [*source.hidden, *source.unused]:
            assert path in message or "; e.g. " in message, f"{path} is not named"
    assert not images & unused, "what is encoded is not unused"
    held_out = {
        path for path in leaves(root) if any(folder in message for folder in folders_of(root, path))
    }
    if inside_of(root, "train", sources.get("train", Source([], []))):
        (not_read,) = re.findall(r"not read, as only .* are: (.*)", message) or [""]
        tops = {name.rstrip("/") for name in not_read.split(", ")}
        held_out |= {path for path in leaves(root) if path.partition("/")[0] in tops}
    stems = {stem_of(path).lower() for path in images | held_out}
    packed = "\n".join([*images, *skipped, *unused, message])

    def is_accounted(path: str) -> bool:
        is_text = path.lower().endswith(TEXTS) and stem_of(path).lower() in stems
        is_mask = any(stem.lower() in stems for stem in stems_of_masked(path))
        is_tar = path.endswith(".tar") and re.search(re.escape(path) + "(/|: no images)", packed)
        is_skipped = any(f"{path}/".startswith(f"{entry.rstrip('/')}/") for entry in skipped)
        is_list = path.rpartition("/")[2] in LISTED
        is_import = path.endswith(".npz") and "kohya caches (.npz) found" in message
        is_import = is_import and path.removesuffix(".npz").lower() in stems
        return bool(is_text or is_mask or is_tar or is_skipped or is_list or is_import)

    return sorted(
        path for path in leaves(root) - images - unused - held_out if not is_accounted(path)
    )


def inside_of(root: Path, name: str, source: Source) -> str:
    """Paths of a split that is a folder of its own are relative to it."""
    folder = {"train": "train/", "val": "validation/"}.get(name, "")
    is_split = (root / "train").is_dir() and (root / "validation").is_dir()
    return folder if is_split and not any((root / item).is_file() for item in LISTED) else ""


def folders_of(root: Path, path: str) -> list[str]:
    """As warnings name those that are held out or not read."""
    parts = path.split("/")[:-1]
    results = ["/".join(parts[:number]) for number in range(1, len(parts) + 1)]
    return [f"name of {item}/" for item in results]


def test_everything_in_a_folder_is_encoded_a_sidecar_or_named(tmp_path: Path) -> None:
    outcomes = Counter[str]()
    for seed in range(150):
        rng, root = random.Random(seed), tmp_path / str(seed)
        root.mkdir()
        random_tree(rng, root)
        missing = rng.choice(["reject", "any"])
        settings = EncodeSettings(
            dataset=root, base="", out=tmp_path / "out", missing_caption=missing
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                sources = read_dataset(settings)
            except ValueError as error:
                assert str(root) in str(error), "refused as a whole, by name"
                outcomes["refused"] += 1
                continue
        message = "\n".join(str(warning.message) for warning in caught)
        assert unaccounted(root, sources, message) == [], (seed, message)
        outcomes["read"] += 1
        outcomes["encoded"] += sum(len(source.records) for source in sources.values())
        outcomes["rejected"] += sum(len(source.rejected) for source in sources.values())
    assert outcomes["read"] > 100 and min(outcomes["encoded"], outcomes["rejected"]) > 100, outcomes


# Hidden and system files.


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/a-checkpoint.png",
        "sub/.Trash-1000/files/a.png",
        "__MACOSX/a.png",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
        "$RECYCLE.BIN/$R1.png",
        "Thumbnails/a.jpg",
        "._a.jpg",
    ],
)
def test_what_a_system_leaves_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    put(tmp_path / "b.png", "a cat")
    put(tmp_path / name, "a dog")
    with pytest.warns(UserWarning, match="skipped as hidden or the system's") as caught:
        sources = read_set(tmp_path)
    assert captions(sources[""]) == {"b.png": ("a cat",)} and not sources[""].rejected
    (hidden, *_) = sources[""].hidden
    assert name.startswith(hidden) and hidden in str(caught[0].message)


def test_hidden_members_of_a_tar_are_skipped(tmp_path: Path) -> None:
    """As a Mac packs them."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.png", "a.txt", "./._a.png", "._a.txt", "__MACOSX/._a.png", "notes.md"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"a cat"))
    source = read_one(tmp_path)
    assert captions(source) == {"x.tar/a.png": ("a cat",)} and not source.rejected
    assert source.hidden == ["x.tar/._a.png", "x.tar/._a.txt", "x.tar/__MACOSX/"]
    assert source.unused == ["x.tar/notes.md"]


# Images under other names.


def test_images_of_any_ending_are_records_or_rejected(tmp_path: Path) -> None:
    for ending in (*IMAGE_ENDINGS, *UNREAD, ".TGA", ".Cr2"):
        put(tmp_path / f"{ending[1:]}{ending}", "x")
    source = read_one(tmp_path)
    assert {path.rpartition(".")[2] for path in captions(source)} == {e[1:] for e in IMAGE_ENDINGS}
    why = reasons(source)
    assert set(why) == {f"{e[1:]}{e}" for e in (*UNREAD, ".TGA", ".Cr2")}
    assert why["Cr2.Cr2"].startswith("a camera RAW file that encode does not read: ")
    assert source.unused == []


def test_a_raw_file_beside_its_image_is_not_rejected(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.CR2", "b.cr2"):
        put(tmp_path / name, "x")
    source = read_one(tmp_path)
    assert (set(captions(source)), set(reasons(source))) == ({"a.jpg"}, {"b.cr2"})
    assert source.unused == ["a.CR2"]


def test_files_without_an_ending_are_told_by_their_first_bytes(tmp_path: Path) -> None:
    forms = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")
    for form in forms:
        put(tmp_path / "a.b" / form, data=image_bytes(form))
        (tmp_path / "a.b" / f"{form}.txt").write_text(form)
    put(tmp_path / "LICENSE", data=b"This is a text, and long enough to be told from an image.")
    put(tmp_path / "short", data=b"BM")
    source = read_one(tmp_path)
    assert captions(source) == {f"a.b/{form}": (form,) for form in forms}
    assert source.unused == ["LICENSE"] and set(reasons(source)) == {"short"}


def test_sidecars_are_found_in_any_letter_case(tmp_path: Path) -> None:
    for name in ("A.JPG", "b.png", "c.png", "C.PNG"):
        put(tmp_path / name)
    for name in ("A.TXT", "B.Caption", "c.txt"):
        (tmp_path / name).write_text(name)
    source = read_one(tmp_path)
    assert captions(source) == {
        "A.JPG": ("A.TXT",),
        "b.png": ("B.Caption",),
        "c.png": ("c.txt",),  # and not of C.PNG, as another image is spelled like it
    }
    assert set(reasons(source)) == {"C.PNG"}


# Masks.


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("x.jpg", "x_mask.png"),
        ("x.jpg", "x-mask.PNG"),
        ("x.jpg", "x.mask.jpg"),
        ("X.jpg", "x_MASK.png"),
        ("x.jpg", "mask_x.png"),
        ("x.jpg", "x_masks.webp"),
        ("x.jpg", "x mask.png"),
        ("x.jpg", "masks/x.png"),
        ("x.jpg", "Mask/x.png"),
        ("x.jpg", "mask/x_mask.png"),
        ("images/s/x.jpg", "masks/s/x.png"),
        ("s/images/x.jpg", "s/masks/x.png"),
        ("cats/x.jpg", "cats_masks/x.gif"),
        ("a.b/x.jpg", "a.b/x_mask_0.png"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_masks_under_any_name_are_masks(
    tmp_path: Path, image: str, mask: str, listed: bool
) -> None:
    put(tmp_path / image, "x")
    put(tmp_path / mask, data=b"mask")
    if listed:
        put_list(tmp_path, {"file_name": image, "text": "x"}, {"file_name": mask, "text": "a mask"})
    source = read_one(tmp_path, missing_caption="any")
    (record,) = source.records
    assert record.path == image and record.mask and record.mask.read() == b"mask"
    assert set(reasons(source)) == ({mask} if listed else set())


def test_a_mask_without_an_image_is_no_image(tmp_path: Path) -> None:
    for name in ("gone_mask.png", "masks/gone.png", "masks/venice.png", "face_mask.png"):
        put(tmp_path / name, "a carnival mask" if name[-5] in "ek" and "gone" not in name else None)
    put(tmp_path / "x.png", "x")
    source = read_one(tmp_path, missing_caption="any")
    assert set(captions(source)) == {"x.png", "masks/venice.png", "face_mask.png"}
    why = reasons(source)
    assert set(why) == {"gone_mask.png", "masks/gone.png"}
    assert all("named like a mask" in item for item in why.values())
