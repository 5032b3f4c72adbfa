"""What a folder says of its images besides captions; and that nothing is read twice."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from precompute.dataset.records import Blob, Memory
from precompute.dataset.sources import read_dataset
from precompute.settings import EncodeSettings
from tests.folders import captions, put, put_list, read_one, read_set, reasons


def repeats(folder: Path, **settings: Any) -> dict[str, int]:
    return {record.path: record.repeats for record in read_one(folder, **settings).records}


# Repeats and weights.


def test_repeat_folders_count_where_they_are_wanted(tmp_path: Path) -> None:
    names = ["10_a cat/x.png", "10_a cat/deep/y.png", "3_b/2_c/z.png", "plain/w.png", "5/v.png"]
    for name in names:
        put(tmp_path / name, "x")
    put(tmp_path / "0_off" / "u.png", "x")
    with pytest.warns(UserWarning, match="0_off/: each .* once an epoch; .* give --repeat-folders"):
        assert repeats(tmp_path) == dict.fromkeys([*names, "0_off/u.png"], 1)
    result = repeats(tmp_path, repeat_folders=True)
    assert result == dict(zip(names, [10, 10, 2, 1, 1], strict=True))
    refused = reasons(read_one(tmp_path, repeat_folders=True))
    assert refused == {"0_off/u.png": "its folder 0_off takes it 0 times an epoch"}


def test_repeat_folders_that_are_not_there_are_a_warning(tmp_path: Path) -> None:
    put(tmp_path / "cats" / "a.png", "x")
    with pytest.warns(UserWarning, match="no folder with images is named N_name"):
        assert repeats(tmp_path, repeat_folders=True) == {"cats/a.png": 1}


def test_repeat_folders_whose_images_are_all_refused_are_there(tmp_path: Path) -> None:
    put(tmp_path / "2_cats" / "a.png")
    assert repeats(tmp_path, repeat_folders=True) == {}  # no warning: it would be an error


def test_weight_and_repeats_of_a_list(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {},
        {"weight": 0.25, "repeats": 4},
        {"weight": 0, "repeats": None},
        {"weight": -1},
        {"weight": True},
        {"weight": float("nan")},
        {"weight": 1e9},
        {"repeats": 0},
        {"repeats": 2.5},
        {"repeats": True},
    ]
    for number in range(len(rows)):
        put(tmp_path / "2_x" / f"{number}.png")
    named = [{"file_name": f"2_x/{n}.png", "text": "x"} | row for n, row in enumerate(rows)]
    put_list(tmp_path, *named)
    source = read_one(tmp_path, repeat_folders=True)
    results = {record.path: (record.weight, record.repeats) for record in source.records}
    assert results == {"2_x/0.png": (1.0, 2), "2_x/1.png": (0.25, 8), "2_x/2.png": (0.0, 2)}
    why = reasons(source)
    assert set(why) == {f"2_x/{number}.png" for number in range(3, len(rows))}
    for path, words in why.items():
        line = int(path[4]) + 1
        field = "weight must be a number from 0" if line < 8 else "repeats must be a whole number"
        assert words.startswith(f"captions.jsonl:{line}: its {field}"), words


# Masks.


def masks(folder: Path, **settings: Any) -> dict[str, bytes | None]:
    records = read_one(folder, **settings).records
    return {record.path: record.mask and record.mask.read() for record in records}


def test_a_mask_beside_an_image_is_no_image(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "sub/a.png", "c.png", "lone.mask.png", "two.png"):
        put(tmp_path / name, "x")
    for name in ("a.mask.png", "b-masklabel.PNG", "two.mask.png", "two-masklabel.png"):
        put(tmp_path / name, data=name.encode())
    assert masks(tmp_path) == {
        "a.jpg": b"a.mask.png",
        "b.png": b"b-masklabel.PNG",
        "sub/a.png": None,
        "c.png": None,
        "lone.mask.png": None,  # of no image, and it has a caption
    }
    why = reasons(read_one(tmp_path))
    assert why == {"two.png": "both two-masklabel.png and two.mask.png: which is its mask?"}


def test_a_title_with_the_word_mask_and_a_caption_is_an_image(tmp_path: Path) -> None:
    titles = ["gas mask.png", "sub/mask cat.png"]
    for name in ("gas.png", "sub/Cat.png", "dog.png", *titles):
        put(tmp_path / name, name)
    put(tmp_path / "dog mask.png", data=b"of the dog")
    by_path = masks(tmp_path)
    assert by_path["dog.png"] == b"of the dog"
    assert by_path.keys() == {"gas.png", "sub/Cat.png", "dog.png", *titles}
    put(tmp_path / "cat.png", "x")
    put(tmp_path / "cat_mask.png", "a caption that a tool wrote for every file")
    assert masks(tmp_path)["cat.png"] is not None


def test_a_list_may_name_masks(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png", "images/f.png"):
        put(tmp_path / name)
    for name in ("masks/a.png", "b.mask.png", "b2.png", "c.mask.png", "images/f.mask.png"):
        put(tmp_path / name, data=name.encode())
    named = {"a": "masks/a.png", "b": "b2.png", "d": "gone.png", "e": 5, "f": "f.mask.png"}
    rows = [{"file_name": f"{n}.png", "text": "x", "mask": named.get(n)} for n in "abcdef"]
    put_list(tmp_path, *rows)
    assert masks(tmp_path) == {
        "a.png": b"masks/a.png",
        "b.png": b"b2.png",  # what the list says wins
        "c.png": b"c.mask.png",
        "images/f.png": b"images/f.mask.png",
    }
    assert reasons(read_one(tmp_path)) == {
        "d.png": "captions.jsonl:4: its mask gone.png: no such file, nor in images/",
        "e.png": "captions.jsonl:5: its mask must be a file's name, not 5",
    }


# Folders.


def test_linked_folders_are_read_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "store" / "x.png", "x")
    put(tmp_path / "set" / "a.png", "a")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "sub").mkdir()
    (tmp_path / "set" / "sub" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "lost.png").symlink_to(tmp_path / "gone.png")
    source = read_one(tmp_path / "set")
    assert set(captions(source)) == {"a.png", "more/x.png"}
    assert reasons(source) == {"lost.png": "a link that leads nowhere"}


# Stamps.


def test_a_text_is_not_opened_again_until_it_changes(tmp_path: Path) -> None:
    settings = EncodeSettings(dataset=tmp_path, base="", out=tmp_path / "out")
    texts = {"train": tmp_path / "train" / "a.txt", "val": tmp_path / "val" / "a.txt"}
    for name, text in texts.items():
        put(text.with_suffix(".png"), name)
        os.utime(text, ns=(1, 1))

    def read(memory: Memory) -> dict[str, str]:
        return {
            n: item.records[0].captions[0] for n, item in read_dataset(settings, memory).items()
        }

    first = Memory()
    assert read(first) == {"train": "train", "val": "val"}
    stored = json.loads(json.dumps(first.seen))
    for text in texts.values():
        text.write_text(text.read_text()[::-1])
        os.utime(text, ns=(1, 1))  # unseen: as long and as old as before
    again = Memory(stored)
    assert read(again) == {"train": "train", "val": "val"}
    assert again.seen == stored
    os.utime(texts["train"], ns=(2, 2))
    assert read(Memory(stored)) == {"train": "niart", "val": "val"}
    texts["val"].write_text("longer")
    assert read(Memory(stored)) == {"train": "niart", "val": "longer"}


def test_what_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """It may be written again within one tick of the file system's clock."""
    put(tmp_path / "a.png", "a")
    settings = EncodeSettings(dataset=tmp_path, base="", out=tmp_path / "out")
    memory = Memory()
    read_dataset(settings, memory)
    assert memory.seen == {}
    hour_ago = time.time_ns() - 3600 * 10**9
    os.utime(tmp_path / "a.txt", ns=(hour_ago, hour_ago))
    read_dataset(settings, memory)
    assert [*memory.seen] == ["a.txt"]


def test_a_blob_is_what_it_was_or_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"0123456789")
    blob = Blob.of(file)
    part = Blob(file, 4, blob.mtime_ns, offset=3)
    assert (blob.read(), part.read()) == (b"0123456789", b"3456")
    with pytest.raises(ValueError, match="it changed"):
        Blob(file, 11, blob.mtime_ns).read()
    os.utime(file, ns=(1, 1))
    for changed in (blob, part):
        with pytest.raises(ValueError, match="it changed"):
            changed.read()


def test_masks_of_another_folder(tmp_path: Path) -> None:
    """Under the image's path or its name; one beside the image, and one in a list, come first."""
    data, masks = tmp_path / "data", tmp_path / "masks"
    for name in ("a.jpg", "cats/b.jpg", "cats/c.jpg", "d.jpg", "e.jpg", "f.png"):
        put(data / name, name)
    put(data / "d.mask.png")
    for name in ("a.png", "cats/b-masklabel.PNG", "c.png", "d.png", "f.png", "f.webp", "z.png"):
        put(masks / name)
    with pytest.warns(UserWarning) as warned:
        source = read_one(data, masks=masks)
    paths = {
        record.path: record.mask and os.path.relpath(record.mask.file, tmp_path)
        for record in source.records
    }
    assert paths == {
        "a.jpg": "masks/a.png",
        "cats/b.jpg": "masks/cats/b-masklabel.PNG",
        "cats/c.jpg": "masks/c.png",
        "d.jpg": "data/d.mask.png",
        "e.jpg": None,
    }
    assert [(each.path, each.reason) for each in source.rejected] == [
        ("f.png", "has several masks in --masks: f.png, f.webp")
    ]
    (message,) = [str(warning.message) for warning in warned]
    assert message.startswith(f"--masks {masks}: 4 masks of no image") and "e.g. d.png" in message
    (mask,) = [record.mask for record in source.records if record.path == "a.jpg"]
    assert mask is not None and str(tmp_path) not in mask.place_in(data)


def test_masks_of_another_folder_for_splits(tmp_path: Path) -> None:
    for name in ("train/a.jpg", "val/a.jpg"):
        put(tmp_path / "data" / name, "x")
        put(tmp_path / "masks" / name.replace("jpg", "png"))
    sources = read_set(tmp_path / "data", masks=tmp_path / "masks")
    for name, source in sources.items():
        (record,) = source.records
        assert record.mask is not None
        assert record.mask.file == tmp_path / "masks" / name / "a.png"
