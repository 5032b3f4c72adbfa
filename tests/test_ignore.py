"""What ``--ignore`` leaves out: files, folders, members of tars, lines of lists; with a count."""

import tarfile
from pathlib import Path

import pytest

from precompute.dataset.file_roles import is_ignored
from tests.folders import captions, image_bytes, put, put_list, read_one, read_set, reasons


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("*_depth.png", "a/b_depth.png", True),
        ("*_depth.png", "a/b_depth.jpg", False),
        ("thumbs", "a/thumbs/b.png", True),
        ("thumbs/", "thumbs/b.png", True),
        ("thumbs", "a/thumbs.png", False),
        ("raw/*", "raw/a.png", True),
        ("raw/*", "raw/a/b.png", True),
        ("raw/*", "a/raw/b.png", False),
        ("/raw/a", "raw/a/b.png", True),
        ("raw/a", "raw/ab.png", False),
        ("a?.png", "ab.png", True),
        ("[ab].png", "b.png", True),
        ("*.PNG", "a.png", False),
    ],
)
def test_a_pattern_is_for_a_name_or_with_a_slash_for_a_path(
    pattern: str, path: str, ignored: bool
) -> None:
    assert is_ignored(path, (pattern,)) == ignored
    assert is_ignored(path, ("x", pattern)) == ignored and not is_ignored(path, ())


def test_what_is_ignored_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    """Texts and masks too; the files are named and counted, and nothing of them is rejected."""
    put(tmp_path / "a.png", "an a")
    put(tmp_path / "a_mask.png")
    put(tmp_path / "b.png", "a b")
    put(tmp_path / "b_depth.png")
    put(tmp_path / "raw" / "deep" / "c.png", "a c")
    with tarfile.open(tmp_path / "pack.tar", "w") as tar:
        for name in ("d.png", "d_depth.png"):
            put(tmp_path / "raw" / name, data=image_bytes())
            tar.add(tmp_path / "raw" / name, name)
        tar.add(tmp_path / "a.txt", "d.txt")
        tar.add(tmp_path / "a.txt", "d_depth.txt")
        tar.add(tmp_path / "a.txt", "d.notes")
    patterns = ("*_depth.png", "raw/", "*_mask.*", "*.notes")
    with pytest.warns(UserWarning, match=r"left out by --ignore \(5\): a_mask.png, b_depth.png, p"):
        source = read_one(tmp_path, ignore=patterns)
    assert captions(source) == {"a.png": ("an a",), "b.png": ("a b",), "pack.tar/d.png": ("an a",)}
    assert not reasons(source) and not source.unused
    assert all(record.mask is None for record in source.records)
    assert set(reasons(read_one(tmp_path))) == {"b_depth.png", "raw/d.png", "raw/d_depth.png"}
    assert any(record.mask is not None for record in read_one(tmp_path).records)


def test_a_line_of_a_list_may_be_ignored(tmp_path: Path) -> None:
    for name in ("a", "b", "gone"):
        put(tmp_path / f"{name}.png")
    (tmp_path / "gone.png").unlink()
    put_list(tmp_path, *({"file_name": f"{n}.png", "text": n} for n in ("a", "b", "gone")))
    with pytest.warns(UserWarning, match=r"left out by --ignore \(2\): b.png, gone.png"):
        source = read_one(tmp_path, ignore=("b.png", "gone*"))
    assert captions(source) == {"a.png": ("a",)} and not reasons(source)


def test_a_path_has_the_folder_of_its_split(tmp_path: Path) -> None:
    for name in ("train/raw/a", "train/b", "val/raw/c"):
        put(tmp_path / f"{name}.png", name)
    with pytest.warns(UserWarning, match=r"left out by --ignore \(1\): raw/"):
        sources = read_set(tmp_path, ignore=("train/raw",))
    paths = {split: [*captions(source)] for split, source in sources.items()}
    assert paths == {"train": ["b.png"], "val": ["raw/c.png"]}
