"""Held-out images are never trained on: by the names that people give to splits."""

from pathlib import Path

import pytest

from precompute.dataset.file_roles import mentions_split, split_of_name
from tests.folders import captions, put, put_list, read_set

HELD_OUT = "named as if held out|by the name of|not read"


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Train TRAINING train2017 train_images trainset Training-Data trn"),
        ("val", "val VAL valid Valid validation val2017 validation_set dev eval images_val val.1"),
        ("test", "test Testing test2017 test_data holdout hold-out held_out TestSet test-images"),
        ("", "cats latest contest 10_test 5_val devil valley tests_of_time test_shots evaluate-me"),
    ],
)
def test_names_of_splits(split: str, names: str) -> None:
    assert {name: split_of_name(name) for name in names.split()} == dict.fromkeys(
        names.split(), split
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000.tar", "train"),
        ("cc-val-00001.tar", "val"),
        ("validation_1.TAR", "val"),
        ("test.tar", "test"),
        ("cats-0001.tar", ""),
        ("0001.tar", ""),
    ],
)
def test_tars_may_be_of_a_split(name: str, split: str) -> None:
    assert split_of_name(name) == split


def test_names_that_only_look_like_a_split() -> None:
    assert all(map(mentions_split, ["10_test", "test shots", "my val", "old-validation"]))
    assert not any(map(mentions_split, ["10_cat", "latest", "train", "contest", "devil"]))


def paths(folder: Path) -> dict[str, set[str]]:
    return {name: set(captions(source)) for name, source in read_set(folder).items()}


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("Train", "VALIDATION"), ("training", "dev")]
)
def test_folders_of_splits_are_sets_of_their_own(tmp_path: Path, train: str, val: str) -> None:
    put(tmp_path / train / "a.png", "a")
    put_list(tmp_path / train, {"file_name": "a.png", "text": "listed"})
    put(tmp_path / val / "b.png", "b")
    assert paths(tmp_path) == {"train": {"a.png"}, "val": {"b.png"}}


def test_what_lies_beside_them_is_named(tmp_path: Path) -> None:
    for name in ("train/a.png", "val/b.png", "test/c.png", "eval/d.png", "train/Test/e.png"):
        put(tmp_path / name, "x")
    (tmp_path / "README.md").write_text("x")
    with pytest.warns(UserWarning, match=HELD_OUT) as caught:
        assert paths(tmp_path) == {"train": {"a.png"}, "val": {"b.png"}}
    message = "\n".join(str(warning.message) for warning in caught)
    assert "not read, as only train/ and val/ are: README.md, eval/, test/" in message
    assert "1 image held out and not encoded, by the name of Test/" in message


@pytest.mark.parametrize("listed", [False, True])
def test_a_test_folder_is_held_out_and_said(tmp_path: Path, listed: bool) -> None:
    names = ["train/a.png", "test/b.png", "TEST2/sub/c.png", "cats/holdout/d.png"]
    for name in names:
        put(tmp_path / name, None if listed else "x")
    if listed:
        put_list(tmp_path, *({"file_name": name, "text": "x"} for name in names))
    with pytest.warns(UserWarning, match="3 images held out .* TEST2/, cats/holdout/, test/;"):
        assert paths(tmp_path) == {"": {"train/a.png"}}


def test_a_list_in_train_beside_a_test_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put(tmp_path / split / "a.png")
        put_list(tmp_path / split, {"file_name": "a.png", "text": "x"}, name="metadata.jsonl")
    with pytest.warns(UserWarning, match="not read, as only train/ are: test/"):
        assert paths(tmp_path) == {"": {"a.png"}}


@pytest.mark.parametrize("val", ["val", "Validation", "eval"])
def test_one_list_above_train_and_val_is_divided(tmp_path: Path, val: str) -> None:
    names = ["train/a.png", f"{val}/b.png"]
    for name in names:
        put(tmp_path / name)
    put_list(tmp_path, *({"file_name": name, "text": "x"} for name in names))
    with pytest.warns(UserWarning, match=f"1 image to validate on, .* by the name of {val}/;"):
        assert paths(tmp_path) == {"train": {"train/a.png"}, "val": {f"{val}/b.png"}}


def test_splits_at_any_depth_and_of_tars(tmp_path: Path) -> None:
    """As YOLO and webdataset lay them out."""
    for name in ("images/train/a.png", "images/val/b.png", "x-test-001.tar"):
        put(tmp_path / name, "x")
    with pytest.warns(UserWarning, match="by the name of") as caught:
        assert paths(tmp_path) == {"train": {"images/train/a.png"}, "val": {"images/val/b.png"}}
    message = "\n".join(str(warning.message) for warning in caught)
    assert "by the name of images/val/;" in message and "by the name of x-test-001.tar;" in message


def test_rows_may_say_their_split(tmp_path: Path) -> None:
    splits = {"a": "train", "b": "val", "c": "test", "d": None, "e": "restval"}
    for name in splits:
        put(tmp_path / f"{name}.png")
    rows = ({"file_name": f"{n}.png", "text": "x", "split": s} for n, s in splits.items())
    put_list(tmp_path, *rows)
    with pytest.warns(UserWarning, match='by the name of "split": "(test|val)"'):
        assert paths(tmp_path) == {"train": {"a.png", "d.png", "e.png"}, "val": {"b.png"}}


def test_what_only_looks_like_a_split_is_trained_on_and_said(tmp_path: Path) -> None:
    for name in ("10_test/a.png", "test shots/b.png", "cats/c.png"):
        put(tmp_path / name, "x")
    with pytest.warns(UserWarning, match="though named as if held out: 10_test/, test shots/$"):
        (source,) = read_set(tmp_path, repeat_folders=True).values()
    assert len(source.records) == 3


def test_what_lies_beside_a_folder_for_training_is_said(tmp_path: Path) -> None:
    for name in ("train/a.png", "vali/b.png", "validación/c.png"):
        put(tmp_path / name, "x")
    with pytest.warns(
        UserWarning, match="beside a folder for training: vali/, validación/$"
    ) as all_:
        (source,) = read_set(tmp_path).values()
    assert len(source.records) == 3 and len(all_) == 1


@pytest.mark.parametrize("name", ["test", "val"])
def test_nothing_but_held_out_images_is_an_error(tmp_path: Path, name: str) -> None:
    put(tmp_path / name / "a.png", "x")
    with (
        pytest.warns(UserWarning, match=HELD_OUT),
        pytest.raises(ValueError, match=f"all images are held out, by the name of {name}/; to"),
    ):
        read_set(tmp_path)
    assert paths(tmp_path / name) == {"": {"a.png"}}, "DATASET's own name says nothing"


def test_two_folders_for_one_split_are_an_error(tmp_path: Path) -> None:
    for name in ("train", "val", "validation"):
        put(tmp_path / name / "a.png", "x")
    with pytest.raises(ValueError, match="both val/ and validation/ are named like the val split"):
        read_set(tmp_path)
