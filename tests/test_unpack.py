"""A cache becomes a folder again, whose captions and keys encode reads back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from encodes import counted, encode, samples_of
from made import made_sample, write_cache
from PIL import Image
from runs import Died

import precompute.unpack
from precompute.unpack import LIST, STATE, is_safe, unpack
from runtime.devices import exact_fp32
from sdxl.base import open_vae
from sdxl.latent_rgb import latents_to_rgb
from sdxl.load import load_vae
from shards.format import CacheError, Sample, sample_key
from shards.manifest import read_manifest

CAPTIONS = {
    "10_cat/a.png": ("a red heart",),
    "10_cat/b.jpg": ("first\nof two lines", "second", "third, tags"),
    "c.jpg": ("  in JSON only \u65e5\u672c".strip(),),
    "c.png": ("the same stem",),
    "deep/er/x y.webp": ("",),
    "e": ("without an ending",),
}


@pytest.fixture
def dataset(images: Path, tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name, captions in CAPTIONS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(images / "000.png") as image:
            image.convert("RGB").save(path, {"jpg": "JPEG", "webp": "WEBP"}.get(name[-3:], "PNG"))
        if len(captions) > 1:
            path.with_suffix(".json").write_text(json.dumps({"caption": captions}))
        else:
            path.with_name(path.name + ".txt").write_text(captions[0])
    with Image.new("L", (64, 64), 0) as mask:
        mask.paste(255, (0, 0, 32, 64))
        mask.save(root / "10_cat/a.mask.png")
    return root


def fields_of(cache: Path) -> dict[str, Any]:
    return {path: json.loads(members["json"]) for path, members in samples_of(cache).items()}


def tensors_of(cache: Path, path: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(samples_of(cache)[path]["safetensors"])


@pytest.mark.filterwarnings("ignore:10_cat/|.*not used")
def test_encode_reads_the_same_captions_and_keys_back(
    dataset: Path, base: Path, tmp_path: Path
) -> None:
    first = encode(dataset, base, tmp_path / "first", empty_captions=True, flip=True).folder
    assert [*unpack(first, tmp_path / "out")][-1] == (6, 6)
    second = encode(tmp_path / "out", base, tmp_path / "second", empty_captions=True).folder
    before, after = fields_of(first), fields_of(second)
    assert {path: fields["captions"] for path, fields in after.items()} == {
        path: [*captions] for path, captions in CAPTIONS.items()
    }
    assert before.keys() == after.keys()
    for path in before:  # and so are the keys and the embeddings
        assert torch.equal(
            tensors_of(first, path)["prompt_embeds"], tensors_of(second, path)["prompt_embeds"]
        )
    masks = [tensors_of(cache, "10_cat/a.png")["mask"][0] for cache in (first, second)]
    assert torch.equal(*masks)

    entries = [json.loads(line) for line in (tmp_path / "out" / LIST).read_text().splitlines()]
    entry = next(entry for entry in entries if entry["path"] == "10_cat/a.png")
    assert entry["key"] == sample_key("10_cat/a.png") and len(entry["variants"]) == 2
    sizes = tensors_of(first, "10_cat/a.png")["sizes"]
    assert [[*variant.values()] for variant in entry["variants"]] == sizes.tolist()
    assert not (tmp_path / "out" / STATE).exists()


def test_previews_are_the_linear_map_or_what_the_vae_decodes(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    exact_fp32()
    manifest = read_manifest(cache)
    list(unpack(cache, tmp_path / "linear"))
    list(unpack(cache, tmp_path / "decoded", str(base), "cpu"))
    vae = load_vae(open_vae(str(base)), torch.float32)
    for path in samples_of(cache):
        latents = tensors_of(cache, path)["latents.mean"][:1].float()
        fit = manifest["latent_rgb"]
        colors = latents_to_rgb(latents, torch.tensor(fit["weight"]), torch.tensor(fit["bias"]))[0]
        with Image.open(tmp_path / "linear" / path) as image:
            size = (8 * latents.shape[3], 8 * latents.shape[2])
            assert image.size == size
            small = np.asarray(
                image.resize((latents.shape[3], latents.shape[2]), Image.Resampling.BOX)
            )
        assert abs(small / 255 - colors.permute(1, 2, 0).numpy()).mean() < 0.05
        with torch.inference_mode():
            plain = vae.decode(latents / vae.config.scaling_factor).sample[0]
        wanted = ((plain / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        with Image.open(tmp_path / "decoded" / path) as image:
            assert abs(np.asarray(image).astype(int) - wanted).max() <= 1


def test_what_was_interrupted_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = precompute.unpack._write_sample, tmp_path / "out"
    written: list[str] = []

    def write_some(folder: Path, sample: Any, image: Any) -> None:
        if len(written) == 5:
            raise Died
        written.append(sample.file)
        write(folder, sample, image)

    monkeypatch.setattr(precompute.unpack, "_write_sample", write_some)
    with pytest.raises(Died):
        list(unpack(cache, out))
    assert not (out / LIST).exists()
    with pytest.raises(ValueError, match="another cache is being unpacked there, or with another"):
        list(unpack(cache, out, vae="other"))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    monkeypatch.setattr(precompute.unpack, "_write_sample", write)
    done = [*unpack(cache, out)]
    assert done[0] == (5, 14) and done[-1] == (14, 14)
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    list(unpack(cache, tmp_path / "fresh"))
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fresh").iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_nothing_of_others_is_written_to(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    for place, words in (
        (out, "not empty; give another --out"),
        (out / "mine.txt", "not a folder"),
        (cache, "is the cache, or one lies in the other"),
        (cache / "inside", "is the cache, or one lies in the other"),
    ):
        with pytest.raises(ValueError, match=words):
            list(unpack(cache, place))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


HOSTILE = (
    "../../escaped.png",
    "/tmp/imports-escaped.png",
    "a/../../b.png",
    "..\\c.png",
    "C:/d.png",
)
HOSTILE += ("", "a//b.png", "./e.png", ".hidden/f.png", "g\n.png", "h.png/", "x" * 300 + ".png")
HOSTILE += ("con\0.png", "passwd.sh", "a/" * 1500 + "b.png", "unpacked.jsonl", "unnamed/i.png")


def test_paths_of_a_strangers_cache_stay_in_the_folder(tmp_path: Path) -> None:
    names = (*HOSTILE, "fine.png", "FINE.png", "folder.png", "folder.png/in.png")
    samples = [
        Sample(**{**vars(made_sample(f"{number}")), "path": name})
        for number, name in enumerate(names)
    ]
    made = write_cache(tmp_path / "cache", samples)
    with pytest.raises(CacheError, match="no latent_rgb map; give --vae"):
        list(unpack(made, tmp_path / "out"))
    manifest = {**read_manifest(made), "latent_rgb": {"weight": [[0.1] * 3] * 4, "bias": [0.0] * 3}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.reader.read_manifest", lambda _: manifest)
        assert [*unpack(made, tmp_path / "deep/out")][-1] == (len(names), len(names))
    written = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png") if path.is_file()
    }
    outside = {name for name in written if not name.startswith("deep/out/")}
    assert not outside and not Path("/tmp/imports-escaped.png").exists()
    named = {name for name in written if not name.startswith("deep/out/unnamed/")}
    assert named == {"deep/out/folder.png/in.png"}  # others are alike where case does not count
    assert len(written) == len(names)


def test_only_safe_paths_are_taken() -> None:
    assert not [path for path in HOSTILE if is_safe(path)]
    assert all(map(is_safe, ("a.png", "10_cat/b c.JPG", "pack.tar/x.webp", "\u65e5.png", "e")))


def test_a_split_cache_is_unpacked_into_two_folders(
    split_cache: Path, tmp_path: Path, base: Path
) -> None:
    from click.testing import CliRunner

    from cli import commands

    result = CliRunner().invoke(
        commands, ["unpack", str(split_cache), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 0, result.output
    parts = {part: set(fields_of(split_cache / part)) for part in ("train", "val")}
    for part, paths in parts.items():
        assert {path.name for path in (tmp_path / "o" / part).glob("*.png")} == paths
    with counted(), pytest.warns(UserWarning, match="not used"):
        from precompute.encode import encode as run_encode
        from tests.encodes import settings_of

        reports = run_encode(settings_of(tmp_path / "o", base, tmp_path / "again"))
    assert [report.num_samples for report in reports] == [len(paths) for paths in parts.values()]
