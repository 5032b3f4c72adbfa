"""Arrow: datasets as ``save_to_disk`` of Hugging Face's library leaves them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from precompute.dataset import tables
from precompute.dataset.records import Memory
from precompute.dataset.sources import read_dataset
from tests.encodes import make_old, settings_of
from tests.folders import captions, image_bytes, read_one, read_set, reasons

pyarrow = pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore:.*are taken from its column:UserWarning")
PNG = image_bytes(side=64)


def put_arrow(
    path: Path,
    rows_a_batch: int = 2,
    compression: str | None = None,
    is_file: bool = False,
    **columns: Any,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    opener = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with open(path, "wb") as file, opener(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)


def put_saved(folder: Path, *parts: dict[str, Any], split: str = "train") -> None:
    """What ``Dataset.save_to_disk`` leaves: the parts as files, and two descriptions."""
    names = [f"data-{n:05d}-of-{len(parts):05d}.arrow" for n in range(len(parts))]
    for name, columns in zip(names, parts, strict=True):
        put_arrow(folder / name, **columns)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"splits": None}))


def cells(*images: bytes | None) -> list[Any]:
    return [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]


def test_a_saved_dataset_is_read_in_place(tmp_path: Path) -> None:
    images = [PNG + bytes([number]) for number in range(5)]
    first = {"image": cells(*images[:3]), "text": ["a", " b\r\n", "c"], "weight": [1.0, 0.5, None]}
    put_saved(
        tmp_path, first, {"image": cells(*images[3:]), "text": ["d", "e"], "weight": [1.0, 1]}
    )
    with pytest.warns(UserWarning) as caught:
        source = read_one(tmp_path)
    assert len(caught) == 1, "the columns of all parts are said once"
    name = "data-0000{}-of-00002.arrow/{}"
    places = [name.format(0, 0), name.format(0, 1), name.format(0, 2), name.format(1, 0)]
    places.append(name.format(1, 1))
    texts = dict(zip(places, [("a",), ("b",), ("c",), ("d",), ("e",)], strict=True))
    assert captions(source) == texts and not source.rejected and not source.unused
    by_path = {record.path: record for record in source.records}
    assert [by_path[place].image.read() for place in places] == images
    assert [by_path[place].weight for place in places[:3]] == [1.0, 0.5, 1.0]
    assert not any(record.image.column or record.header for record in source.records)


def test_the_splits_of_a_saved_dict_are_known_by_their_folders(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        put_saved(tmp_path / split, {"image": [PNG], "text": [split]}, split=split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    with pytest.warns(UserWarning) as caught:
        sources = read_set(tmp_path)
    assert {name: [*captions(source).values()] for name, source in sources.items()} == {
        "train": [("train",)],
        "val": [("validation",)],
    }
    assert [str(w.message).partition(": ")[2] for w in caught if "not" in str(w.message)] == [
        "not read, as only train/ and validation/ are: test/"
    ]
    assert [*captions(read_one(tmp_path / "test")).values()] == [("test",)], "given by its name"


def test_a_row_without_an_image_or_with_bad_fields_is_rejected_by_number(tmp_path: Path) -> None:
    images = pyarrow.array([*cells(PNG, None, b"", PNG, PNG), None])
    bad = pyarrow.array([b"a", b"b", b"c", b"\xff\xfe", b"", b"f"]).view(pyarrow.string())
    put_arrow(tmp_path / "x.arrow", image=images, text=bad)
    source = read_one(tmp_path)
    assert set(captions(source)) == {"x.arrow/0", "x.arrow/2"}, "an empty one as any empty file"
    why = reasons(source)
    assert why["x.arrow/1"] == why["x.arrow/5"] == "has no bytes of an image"
    assert why["x.arrow/3"].startswith("its text cannot be read: ")
    assert why["x.arrow/4"] == "its caption is empty"
    why = reasons(read_one(tmp_path, caption_column=("gone",)))
    assert why["x.arrow"].startswith("has no column gone; its columns are ")


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
@pytest.mark.parametrize("is_file", [False, True])
def test_every_form_of_arrow_file(tmp_path: Path, kind: str, is_file: bool) -> None:
    images = pyarrow.array([PNG + b"1", None, PNG + b"2"], getattr(pyarrow, kind)())
    put_arrow(tmp_path / "x.arrow", is_file=is_file, jpg=images, caption=[["a", "b"], ["c"], ["d"]])
    put_arrow(tmp_path / "cache-1.arrow", is_file=is_file, indices=[1, 2])
    source = read_one(tmp_path)
    assert captions(source) == {"x.arrow/0": ("a", "b"), "x.arrow/2": ("d",)}
    assert {record.image.read()[-1:] for record in source.records} == {b"1", b"2"}
    assert source.unused == ["cache-1.arrow"], "no images in it"


def test_a_file_that_is_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    put_arrow(path, image=[PNG] * 6, text=[*"abcdef"])
    data = path.read_bytes()
    start = read_one(tmp_path).records[0].image.offset
    for length, why in (
        (len(data) - 8, "ends without the mark of an end: it may be cut off"),
        (len(data) - 5, "is no arrow file that can be read: "),
        (len(data) - len(PNG), "is no arrow file that can be read: "),
        (20, "is no arrow file that can be read: "),
        (0, "is empty"),
    ):
        path.write_bytes(data[:length])
        source = read_one(tmp_path)
        assert why in reasons(source)["x.arrow"], length
        assert len(source.records) == (6 if length > len(data) - 9 else 4 if length > start else 0)
    path.write_bytes(data + b"more")
    assert "more bytes follow the end of its rows" in reasons(read_one(tmp_path))["x.arrow"]


def test_compressed_images_do_not_lie_in_the_file(tmp_path: Path) -> None:
    put_arrow(tmp_path / "x.arrow", compression="lz4", image=[b"a" * 9999], text=["a"])
    source = read_one(tmp_path)
    assert reasons(source) == {
        "x.arrow": "holds compressed images: save it without compression; what lies before it is "
        "read"
    }


def test_a_saved_dataset_is_the_files_that_its_state_names(tmp_path: Path) -> None:
    part = {"image": [PNG], "text": ["a"]}
    put_saved(tmp_path, part, part)
    put_arrow(tmp_path / "data-00002-of-00003.arrow", **part)  # of an older, larger one
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    source = read_one(tmp_path)
    assert set(captions(source)) == {"data-00000-of-00002.arrow/0"}
    assert source.unused == ["data-00002-of-00003.arrow"]
    assert reasons(source) == {
        "data-00001-of-00002.arrow": "no such file, though state.json names it: the dataset is not "
        "whole"
    }
    (tmp_path / "state.json").write_text('{"_data_files": 5}')  # of another tool
    assert len(read_one(tmp_path).records) == 2


def test_an_unchanged_file_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_saved(tmp_path, {"image": [PNG], "text": ["a"]})
    make_old(tmp_path)
    memory = Memory()
    settings = settings_of(tmp_path, tmp_path, tmp_path / "out")
    before = read_dataset(settings, memory)[""]
    monkeypatch.setattr(tables, "read_arrow_rows", pytest.fail)
    assert read_dataset(settings, Memory(stored=memory.seen))[""] == before


def test_without_pyarrow_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setattr(tables, "has_pyarrow", lambda: False)
    (tmp_path / "x.arrow").write_bytes(b"anything")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"x.arrow: arrow needs .*'\.\[tables\]'$"):
            read_one(tmp_path)
