"""Parquet: lists of images beside them, and tables with the images' bytes in their rows."""

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from precompute.dataset import parquet_files, tables
from precompute.dataset.records import Memory
from precompute.dataset.sources import read_dataset
from precompute.plan.dry_run import dry_run
from precompute.plan.plan_file import _blob_from_json, _blob_to_json
from tests.encodes import contents, counted, encode, make_old, samples_of, settings_of
from tests.folders import captions, image_bytes, put, put_list, read_one, reasons
from tests.test_arrow import put_saved
from tests.test_tars import put_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*(are taken from|are named by) its:UserWarning")
PNG = image_bytes(side=64)


def put_table(table: Path, rows_a_group: int = 2, **columns: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), table, row_group_size=rows_a_group)


def test_a_list_in_parquet_is_read_as_the_same_list_in_json(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "a cat", "weight": 0.5, "repeats": 3, "other": b"x"},
        {"file_name": "b.png", "text": ["one", "two"][0], "weight": None, "repeats": None},
        {"file_name": "gone.png", "text": "x", "weight": 1.0, "repeats": 1},
        {"file_name": None, "text": "x", "weight": 1.0, "repeats": 1},
        {"file_name": "c.png", "text": None, "weight": 1.0, "repeats": 1},
        {"file_name": "a.png", "text": "x", "weight": 1.0, "repeats": 0},
    ]
    for name in "abc":
        put(tmp_path / "set" / f"{name}.png")
    names = ("file_name", "text", "weight", "repeats", "other")
    table = {name: [row.get(name) for row in rows] for name in names}
    put_table(tmp_path / "set" / "Metadata.parquet", **table)
    source = read_one(tmp_path / "set")
    assert {r.path: (r.captions, r.weight, r.repeats) for r in source.records} == {
        "a.png": (("a cat",), 0.5, 3),
        "b.png": (("one",), 1.0, 1),
    }
    assert {path: why.partition(":")[0] for path, why in reasons(source).items()} == {
        "gone.png": "Metadata.parquet",
        "Metadata.parquet:3": "names no image",
        "c.png": "Metadata.parquet",
        "Metadata.parquet:5": "a.png is named a second time",
    }
    put(tmp_path / "set" / "a.png", "a text")
    assert captions(read_one(tmp_path / "set")) == {"a.png": ("a text",)}, "as for a .csv"


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_columns_are_chosen_or_guessed_and_named(tmp_path: Path, form: str) -> None:
    put(tmp_path / "a.png")
    row = {"path": "a.png", "prompt": "a prompt", "Short": "short", "long": "long, longer"}
    if form == "jsonl":
        put_list(tmp_path, row, name="metadata.jsonl")
    elif form == "csv":
        lines = [",".join(row), ",".join(f'"{value}"' for value in row.values())]
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
    else:
        put_table(tmp_path / "metadata.parquet", **{name: [text] for name, text in row.items()})
    with pytest.warns(UserWarning, match="are named by its path, captions are from prompt"):
        assert captions(read_one(tmp_path)) == {"a.png": ("a prompt",)}
    chosen = read_one(tmp_path, image_column="path", caption_column=("Short", "long"))
    assert captions(chosen) == {"a.png": ("short", "long, longer")}
    why = reasons(read_one(tmp_path, image_column="gone", missing_caption="x"))
    assert any("gone" in text for text in why.values())


def test_a_list_of_urls_says_that_nothing_is_downloaded(tmp_path: Path) -> None:
    put_list(tmp_path, {"url": "https://example.org/a.png", "text": "x"})
    assert "names a URL" in reasons(read_one(tmp_path))["captions.jsonl:1"]


def struct_rows(images: Path, table: Path, folder: Path, **more: list[Any]) -> None:
    """The same images as rows of a table and as files of the same paths in a folder of its name."""
    paths = sorted(images.glob("*.png")) + sorted(images.glob("*.jpg"))
    cells, texts = [], []
    for number, path in enumerate(paths):
        put(folder / table.name / f"{number}", path.with_suffix(".txt").read_bytes())
        (folder / table.name / f"{number}").write_bytes(path.read_bytes())
        (folder / table.name / f"{number}.txt").write_bytes(path.with_suffix(".txt").read_bytes())
        cells.append({"bytes": path.read_bytes(), "path": path.name})
        texts.append(path.with_suffix(".txt").read_text())
    put_table(table, rows_a_group=4, image=cells, text=texts, **more)


def test_images_in_a_table_have_the_bits_of_those_in_a_folder(
    tmp_path: Path, images: Path, base: Path
) -> None:
    table = tmp_path / "packed" / "x.parquet"
    struct_rows(images, table, tmp_path / "loose")
    make_old(tmp_path / "packed")
    settings: dict[str, Any] = {"flip": True, "shuffle_tags": 2}
    plan = [*dry_run(settings_of(table.parent, base, tmp_path / "out", **settings))]
    report = encode(table.parent, base, tmp_path / "out", **settings)
    assert any(f"{report.num_samples:,} images, 0 rejected" in line for line in plan)
    encode(tmp_path / "loose", base, tmp_path / "fresh", **settings)
    assert report.num_samples == 14
    assert samples_of(tmp_path / "out") == samples_of(tmp_path / "fresh")
    before = contents(tmp_path / "out")
    with counted() as count:
        encode(table.parent, base, tmp_path / "out", **settings)
    assert count == (0, 0) and contents(tmp_path / "out") == before
    shutil.move(table, table.with_name("y.parquet"))
    with counted() as count:  # found by its content; each image's own orders of tags are new
        report = encode(table.parent, base, tmp_path / "out", **settings)
    assert report.changes.num_renamed == 14 and count.images == 0


def test_a_row_without_an_image_is_rejected_by_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    cells = [PNG, None, b"", b"no image", PNG, PNG]
    put_table(
        path,
        jpg=cells,
        caption=["a", "b", "c", "d", None, "f"],
        weight=[1.0, 1.0, 1.0, 1.0, 1.0, -1.0],
    )
    source = read_one(tmp_path)
    assert {record.path: record.header is None for record in source.records} == {
        f"{path.name}/0": False,
        f"{path.name}/2": True,  # refused by its bytes, as any file would be
        f"{path.name}/3": True,
    }
    why = reasons(source)
    assert "no bytes of an image" in why[f"{path.name}/1"]
    assert "no caption: caption is empty" in why[f"{path.name}/4"]
    assert "its weight must be" in why[f"{path.name}/5"]
    assert len(why) == 3
    (good, *_) = source.records
    assert good.image.read() == PNG
    assert _blob_from_json(_blob_to_json(good.image)) == good.image
    path.touch()
    why = reasons(read_one(tmp_path, caption_column=("caption", "gone")))
    assert why[path.name].startswith("has no column gone; its columns are ")
    with pytest.raises(ValueError, match="changed while the dataset was encoded"):
        good.image.read()


def test_an_unchanged_table_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_table(tmp_path / "x.parquet", image=[{"bytes": PNG, "path": None}], text=["a"], b=["b"])
    make_old(tmp_path)
    memory = Memory()
    settings = settings_of(tmp_path, tmp_path, tmp_path / "out")
    before = read_dataset(settings, memory)[""]
    again = Memory(stored=memory.seen)
    monkeypatch.setattr(tables, "read_rows", pytest.fail)
    assert read_dataset(settings, again)[""] == before
    monkeypatch.undo()
    other = settings_of(tmp_path, tmp_path, tmp_path / "out", caption_column=("b",))
    assert captions(read_dataset(other, again)[""]) == {"x.parquet/0": ("b",)}


def test_tables_without_images_are_not_used_and_damaged_ones_rejected(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a")
    put_table(tmp_path / "stats.parquet", name=["a"], number=[1])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing of the kind")
    source = read_one(tmp_path)
    assert source.unused == ["stats.parquet"] and set(captions(source)) == {"a.png"}
    assert "is no parquet table" in reasons(source)["broken.parquet"]


def test_a_split_is_known_by_the_names_of_tables(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        put_table(tmp_path / "data" / f"{split}-00000-of-00001.parquet", image=[PNG], text=[split])
    settings = settings_of(tmp_path, tmp_path, tmp_path / "out")
    with pytest.warns(UserWarning, match="to validate on|held out"):
        sources = read_dataset(settings)
    texts = {name: [*captions(source).values()] for name, source in sources.items()}
    assert texts == {"train": [("train",)], "val": [("validation",)]}


def test_without_pyarrow_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_missing(*_: object) -> Any:
        raise ValueError(parquet_files.needs_pyarrow())

    monkeypatch.setattr(parquet_files, "_open", is_missing)
    monkeypatch.setattr(tables, "has_pyarrow", lambda: False)
    monkeypatch.setattr("precompute.dataset.metadata_files.has_pyarrow", lambda: False)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.parquet: parquet needs .*pip install '\.\[tables\]'$"):
        read_one(tmp_path)
    put(tmp_path / "a.png", "a")
    source = read_one(tmp_path)  # what needs no pyarrow is read
    assert set(captions(source)) == {"a.png"}
    assert reasons(source) == {"x.parquet": parquet_files.needs_pyarrow()}
    (tmp_path / "a.txt").unlink()
    (tmp_path / "x.parquet").rename(tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"metadata.parquet: parquet needs .*'\.\[tables\]'$"):
        read_one(tmp_path)


@pytest.mark.parametrize("piece", [1, 4, 9])
def test_a_row_group_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    put_table(tmp_path / "x.parquet", rows_a_group=100, image=[PNG + bytes([n]) for n in range(9)])
    monkeypatch.setattr(parquet_files, "MAX_BATCH_ROWS", 4 if piece == 4 else 1024)
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 1 if piece == 1 else 1 << 27)
    sizes: list[int] = []
    batches = parquet_files._batches

    def watched(*arguments: Any) -> Any:
        for batch in batches(*arguments):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet_files, "_batches", watched)
    source = read_one(tmp_path, missing_caption="x")
    assert sizes[0] == piece and len(source.records) == 9
    assert {record.image.read()[-1] for record in source.records} == set(range(9))


def put_every_form(images: Path, root: Path) -> tuple[str, ...]:
    """The same images and captions in seven folders, each of another kind of source."""
    paths = sorted([*images.glob("*.png"), *images.glob("*.jpg")])
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in paths]
    names, data = [path.name for path in paths], [path.read_bytes() for path in paths]
    for form in ("folder", "csv", "jsonl", "parquet"):
        (root / form / "images").mkdir(parents=True)
        for path in paths:
            shutil.copy(path, root / form / "images")
    for path in paths:
        shutil.copy(path.with_suffix(".txt"), root / "folder" / "images")
    with open(root / "csv" / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *zip(names, texts, strict=True)])
    rows = ({"file_name": n, "text": text} for n, text in zip(names, texts, strict=True))
    put_list(root / "jsonl", *rows, name="metadata.jsonl")
    put_table(root / "parquet" / "metadata.parquet", file_name=names, text=texts)
    cells = [{"bytes": content, "path": name} for content, name in zip(data, names, strict=True)]
    put_table(root / "bytes" / "x.parquet", image=cells, text=texts)
    put_saved(
        root / "arrow",
        {"image": cells[:4], "text": texts[:4]},
        {"image": cells[4:], "text": texts[4:]},
    )
    for number, part in enumerate((slice(0, 9), slice(9, None))):
        files = {}
        for path, text in zip(paths[part], texts[part], strict=True):
            stem = path.name.replace(".", "-")
            files[stem + path.suffix] = path.read_bytes()
            files[stem + ".json"] = json.dumps({"caption": text}).encode()
        put_tar(root / "tars" / f"{number}.tar", files)
    return ("folder", "csv", "jsonl", "parquet", "bytes", "arrow", "tars")


def test_every_kind_of_source_gives_the_same_tensors(
    tmp_path: Path, images: Path, base: Path
) -> None:
    forms = put_every_form(images, tmp_path / "set")
    report = encode(tmp_path / "set", base, tmp_path / "out")
    tensors: dict[str, set[tuple[str, bytes]]] = {form: set() for form in forms}
    for path, members in samples_of(tmp_path / "out").items():
        fields = json.loads(members["json"])
        named = {name: fields[name] for name in fields if name not in ("path", "key")}
        tensors[path.partition("/")[0]].add((json.dumps(named), members["safetensors"]))
    assert report.num_samples == 14 * len(forms) and not report.rejected
    assert all(len(tensors[form]) == 14 for form in forms)
    for form in forms[1:]:
        assert tensors[form] == tensors["folder"], form


def test_the_samples_of_a_source_stand_in_the_order_of_their_paths_digests(
    tmp_path: Path, images: Path
) -> None:
    forms = put_every_form(images, tmp_path)
    orders = {form: [*captions(read_one(tmp_path / form))] for form in forms}
    for paths in orders.values():
        assert paths == sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    assert orders["folder"] == orders["csv"] == orders["jsonl"] == orders["parquet"]
    assert {path.rpartition("/")[0] for path in orders["arrow"]} == {
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    }
