"""push: the folder that it would send, its card, and what a hub on this machine receives."""

import contextlib
import io
import re
import shutil
import socket
import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from click.testing import CliRunner
from hub import READER, TOKEN, WritableHub, running
from loras import made_lora
from PIL import Image
from run_folders import make_run

import cli
from cli_push import hidden_settings
from infer.model_card import ModelCard
from sdxl.contact_sheet import contact_sheet, fit_tile, read_sheet, sheet_record
from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.write import lora_bytes
from sdxl.metadata import ModelMetadata
from train.config import TrainConfig

TILE = 64
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREVIEWS = [
    (Image.new("RGB", (40, 90), "red"), "a tall | red <b>one</b>"),
    (Image.new("RGB", (90, 40), "blue"), "a wide \U0001f600 one"),
    (Image.new("RGB", (16, 16), "green"), "a small one"),
]
METADATA = ModelMetadata(
    base="stabilityai/stable-diffusion-xl-base-1.0",
    license="openrail++",
    buckets=((832, 1216, 7), (1024, 1024, 5)),
    steps=144,
    prediction_type="epsilon",
)


def push(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli.commands, ["push", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def refused(*arguments: Any, code: int = 2) -> str:
    """The one line of an error."""
    actual, output = push(*arguments)
    assert actual == code, output
    (line,) = (line for line in output.splitlines() if line.startswith("Error: "))
    return line


def write_sheet(path: Path) -> None:
    contact_sheet(PREVIEWS, TILE).save(path, pnginfo=sheet_record(PREVIEWS, TILE))


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A LoRA of the random base, as a run writes it."""
    unet = made_lora(base, tmp_path_factory.mktemp("lora"))
    return lora_bytes(unet, None, METADATA)


@pytest.fixture
def run(files: dict[str, bytes], tmp_path: Path) -> Path:
    """A run with the weights in it and in its checkpoints, whose average has other ones."""
    folder = make_run(tmp_path / "private-name", base="b", device="cuda:3", val="secret-faces")
    for place in (folder, folder / "checkpoints" / "checkpoint-144"):
        for name, data in files.items():
            (place / name).write_bytes(data)
    best = folder / "checkpoints" / "checkpoint-108"
    (best / "ema").mkdir()
    for name, data in files.items():
        (best / "ema" / name).write_bytes(data)
        (best / name).write_bytes(b"not the average")
    write_sheet(folder / "previews" / "step-000144.png")
    return folder


def front_of(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_a_sheet_is_cut_apart_as_it_was_laid(tmp_path: Path) -> None:
    for num in range(1, len(PREVIEWS) + 1):
        path = tmp_path / f"{num}.png"
        shown, title = PREVIEWS[:num], "step 7" * (num % 2)
        below = [(image, "other text") for image, _ in shown]
        record = sheet_record(shown, TILE, title)
        contact_sheet(below, TILE, title).save(path, pnginfo=record)
        pieces = read_sheet(path)
        assert [prompt for _, prompt in pieces] == [prompt for _, prompt in shown]
        for (piece, _), (image, _) in zip(pieces, shown, strict=True):
            assert piece.tobytes() == fit_tile(image, TILE).tobytes()
    contact_sheet(PREVIEWS, TILE).save(path)
    assert read_sheet(path) == [], "of an earlier version"
    contact_sheet(PREVIEWS, TILE).crop((0, 0, 64, 64)).save(
        path, pnginfo=sheet_record(PREVIEWS, TILE)
    )
    assert read_sheet(path) == [], "changed since"


def test_the_folder_of_a_dry_run(run: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [run, "me/my-style", "--instance-prompt", "ohwx", "--dry-run", "--out", out]
    code, output = push(*arguments)
    assert code == 0, output
    assert f"{out}: what push would send to me/my-style (private):" in output
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    images = {f"images/{number:02d}.png" for number in (1, 2, 3)}
    sent = {"README.md", LORA, "my-style.safetensors", *images}
    assert names == {*sent, "push.json"} and "push.json" not in output
    assert all(f"  {name}  " in output for name in sent)
    assert (out / LORA).read_bytes() == files[LORA]
    assert (out / "my-style.safetensors").read_bytes() == files[KOHYA]
    with Image.open(out / "images" / "02.png") as image:
        assert image.tobytes() == fit_tile(PREVIEWS[1][0], TILE).tobytes()

    card = (out / "README.md").read_text()
    front = front_of(card)
    assert front["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (front["license"], front["instance_prompt"]) == ("openrail++", "ohwx")
    assert {"stable-diffusion-xl", "lora", "text-to-image", "diffusers"} <= set(front["tags"])
    assert [item["text"] for item in front["widget"]] == [prompt for _, prompt in PREVIEWS]
    assert {item["output"]["url"] for item in front["widget"]} == images
    assert r"| a tall \| red \<b\>one\</b\> |" in card
    assert "| ComfyUI | `my-style.safetensors` | ComfyUI/models/loras |" in card
    assert "--lr 0.001\n" in card and "--min-snr-gamma 5\n" in card
    assert "| images an epoch, with their repeats | 12 |" in card
    assert "| resolution | about 1024 x 1024 pixels |" in card
    # Nothing of the machine, nor the names of what lies on it.
    private = [
        str(tmp_path),
        socket.gethostname(),
        "private-name",
        "secret-faces",
        "cuda:3",
        "cats",
    ]
    assert not [word for word in private if word in card]

    assert push(*arguments)[0] == 0, "its own folder is written anew"
    assert not list(tmp_path.glob("*.partial"))
    for name in ("README.md", "images/01.png", "notes.txt", "images/.git/HEAD", ".git/HEAD"):
        path = out / name
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine" + (before or b""))
        line = refused(*arguments)
        assert name.removesuffix("/HEAD") in line and "give another --out" in line
        assert path.read_bytes().startswith(b"mine") and not list(tmp_path.glob("*.partial"))
        if before is not None:
            path.write_bytes(before)
        elif path.name == "HEAD":
            shutil.rmtree(path.parent)
        else:
            path.unlink()
    (out / "push.json").unlink()
    assert "holds something else than push --dry-run wrote" in refused(*arguments)
    assert (out / LORA).exists()


def test_which_checkpoint(run: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    def sent(checkpoint: str) -> tuple[bytes, bool]:
        out = tmp_path / "out"
        code, output = push(run, "me/x", "--checkpoint", checkpoint, "--dry-run", "--out", out)
        assert code == 0, output
        return (out / LORA).read_bytes(), (out / "images" / "01.png").exists()

    assert sent("last") == (files[LORA], True)
    assert sent("best") == (files[LORA], False), "its average; its sheet has no record"
    assert sent("108") == sent("best")
    assert "no good checkpoint 7; there are: 36, 72, 108, 144" in refused(
        run, "me/x", "--checkpoint", 7
    )
    assert "--checkpoint is of a run" in refused(run / LORA, "me/x", "--checkpoint", "last")
    (run / LORA).unlink()
    assert "--checkpoint last takes the newest" in refused(
        run, "me/x", "--dry-run", "--out", tmp_path / "out"
    )


def test_previews_are_of_the_weights_step(
    run: Path, files: dict[str, bytes], base: Path, tmp_path: Path
) -> None:
    """A run that publishes its best weights ends with those of an earlier step."""

    def shown(steps: int | None) -> bytes | None:
        unet = made_lora(base, tmp_path / f"lora-{steps}")
        for name, data in lora_bytes(unet, None, replace(METADATA, steps=steps)).items():
            (run / name).write_bytes(data)
        code, output = push(run, "me/x", "--dry-run", "--out", tmp_path / "out")
        assert code == 0, output
        path = tmp_path / "out" / "images" / "previews.png"
        return path.read_bytes() if path.exists() else None

    sheets = {step: run / "previews" / f"step-{step:06d}.png" for step in (36, 72, 108, 144)}
    sheets[144].write_bytes(sheets[36].read_bytes() + b"of the last step")
    assert shown(72) == sheets[72].read_bytes()
    assert shown(107) == sheets[72].read_bytes(), "the nearest before"
    assert shown(35) is None, "none is of an earlier step"
    assert shown(None) == sheets[144].read_bytes()


def test_what_cannot_be_pushed(run: Path, base: Path, tmp_path: Path) -> None:
    for name in ("me", "me/you/they", "me/-x", "me/a--b", "me/a b", "/x"):
        assert "no repository of the hub; give OWNER/NAME" in refused(run, name)
    assert "--out does nothing without --dry-run" in refused(run, "me/x", "--out", tmp_path / "o")
    assert "no such folder" in refused(tmp_path / "nowhere", "me/x")
    made_lora(base, tmp_path / "bare")
    bare = [tmp_path / "bare", "me/x", "--dry-run", "--out", tmp_path / "out"]
    assert "state no license" in refused(*bare)
    assert push(*bare, "--license", "apache-2.0")[0] == 0
    for name in (LORA, KOHYA):
        intact = (run / name).read_bytes()
        (run / name).write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        assert name in refused(run, "me/x", "--dry-run", "--out", tmp_path / "out")
        (run / name).write_bytes(intact)
    (run / "previews" / "step-000144.png").write_bytes(b"no image")
    code, output = push(run, "me/x", "--dry-run", "--out", tmp_path / "out")
    assert code == 0 and "cannot be read as an image" in output and "no previews are sent" in output


def test_a_kohya_file_alone(base: Path, run: Path, tmp_path: Path) -> None:
    """The other form is made; by --base, as this is not of SDXL's size."""
    out = tmp_path / "out"
    given = shutil.copy(run / KOHYA, tmp_path / "given.safetensors")
    code, output = push(given, "me/x", "--base", base, "--dry-run", "--out", out)
    assert code == 0, output
    assert (out / "x.safetensors").read_bytes() == (run / KOHYA).read_bytes()
    assert (out / LORA).exists()
    card = (out / "README.md").read_text()
    assert str(base.parent) not in card and "images/" not in card
    with_warning = push(given, "me/x", "--dry-run", "--out", out)[1]
    assert f"Warning: {LORA} is not made:" in with_warning
    assert not (out / LORA).exists()


def test_only_a_unets_own_files_are_sent(base: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "full"
    for part in ("unet", "scheduler"):
        shutil.copytree(base / part, folder / part)
        for name in (".env", "notes.txt", "config.json.bak", "train.json"):
            (folder / part / name).write_text("secret")
    (folder / "unet" / "shardtune.json").write_text('{"long_captions": 3}')
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").mkdir()
    code, output = push(folder, "me/x", "--license", "other", "--dry-run", "--out", out)
    assert code == 0, output
    weights = {f"unet/{name}" for name in ("config.json", "shardtune.json", WEIGHTS)}
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {"README.md", "push.json", *weights, "scheduler/scheduler_config.json"}
    renamed = (folder / "unet").rename(folder / "step-7")
    code, output = push(renamed, "me/x", "--license", "other", "--dry-run", "--out", out)
    assert code == 0 and weights < set(output.split()), "of a UNet's folder by another name too"


@pytest.mark.slow
def test_a_unet(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = tmp_path / "full"
    for part in ("unet", "scheduler"):
        shutil.copytree(base / part, folder / part)
    common = [folder, "me/x", "--license", "other", "--dry-run", "--out", out]
    assert push(*common)[0] == 0
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert {"README.md", "unet/config.json", weights} < names and "x.safetensors" not in names
    assert (out / weights).read_bytes() == (folder / weights).read_bytes()
    card = (out / "README.md").read_text()
    assert "lora" not in front_of(card)["tags"] and "There is no file for ComfyUI" in card
    code, output = push(*common, "--base", base)
    assert code == 0, output
    card = (out / "README.md").read_text()
    assert (out / "x.safetensors").exists() and "models/checkpoints" in card


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")  # which older diffusers need
def test_the_code_on_the_card_runs(base: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "me" / "x"
    out.parent.mkdir()
    code, output = push(run, "me/x", "--dry-run", "--out", out)
    assert code == 0, output
    (source,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    for before, after in (
        (METADATA.base or "", str(base)),
        ('"me/x"', repr(str(out))),
        ('"cuda"', '"cpu"'),
        ("float16", "float32"),
        (".images[0]", ".images[0]; active = pipeline.get_active_adapters()"),
        ("pipeline('", "pipeline(height=64, width=64, num_inference_steps=1, prompt='"),
    ):
        assert before in source
        source = source.replace(before, after)
    names: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec(source, names)
    assert names["active"] == ["lora"] and names["image"].size == (64, 64)


def test_a_card_says_what_diffusers_must_be_told() -> None:
    metadata = ModelMetadata(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, long_captions=3
    )
    card = ModelCard(
        repository="me/x",
        is_lora=True,
        base="my-base",
        license="Some License 1.0",
        metadata=metadata,
        diffusers_file=LORA,
        ui_file=None,
    ).text
    front = front_of(card)
    assert (front["license"], front["license_name"]) == ("other", "some-license-1.0")
    assert "base_model" not in front and "widget" not in front
    assert 'prediction_type="v_prediction", rescale_betas_zero_snr=True' in card
    assert "3 x 77 tokens" in card and "`BASE` is the model" in card
    assert "There is no file for ComfyUI" in card and "models/loras" not in card


def test_no_path_of_train_is_shown() -> None:
    hidden = hidden_settings(cli._train_command())
    hints = typing.get_type_hints(TrainConfig)
    paths = {spec.name for spec in fields(TrainConfig) if "Path" in str(hints[spec.name])}
    assert {"out", "val", "init_lora"} <= paths <= hidden
    assert {"caches", "base", "wandb_entity", "device"} <= hidden
    assert not {"lr", "steps", "targets", "rank", "precision"} & hidden


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with running(WritableHub()) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_hub_receives_it(hub: WritableHub, run: Path, files: dict[str, bytes]) -> None:
    code, output = push(run, "someone/x")
    assert code == 0, output
    assert f"{hub.url}/someone/x: 6 files are there" in output
    received = hub.repositories["someone/x"]
    assert received[LORA] == files[LORA] and received["x.safetensors"] == files[KOHYA]
    assert front_of(received["README.md"].decode())["license"] == "openrail++"
    assert hub.private["someone/x"]

    received["notes.md"], received["README.md"] = b"mine", b"old"
    code, output = push(run, "someone/x", "--no-previews")
    assert code == 0, output
    assert f"replaced by a new commit: README.md, {LORA}, x.safetensors; other files stay" in output
    assert received["notes.md"] == b"mine" and received["README.md"] != b"old"
    assert received["images/01.png"] and hub.num_commits == 2

    assert push(run, "someone/shown", "--public")[0] == 0
    assert not hub.private["someone/shown"]
    before = dict(hub.repositories["someone/shown"])
    assert "is there already, and public; --public" in refused(run, "someone/shown")
    assert "stays private" not in push(run, "someone/shown", "--public")[1]
    assert hub.repositories["someone/shown"] == before and hub.num_commits == 4

    code, output = push(run, "someone/x", "--public")
    assert code == 0 and hub.private["someone/x"]
    assert "someone/x was there already, and stays private in spite of --public" in output
    assert f"make it public in {hub.url}/someone/x/settings" in output


def test_a_hub_that_refuses(
    hub: WritableHub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_right = "nobody/x: not pushed: the token has no right to write there"
    assert no_right in refused(run, "nobody/x", code=1)
    hub.repositories["someone/x"], hub.private["someone/x"] = {}, True
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "nothing in it was changed: the token has no right" in refused(run, "someone/x", code=1)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub does not know the token: run `hf auth login`" in refused(
        run, "someone/x", code=1
    )
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "nobody is logged in to the Hugging Face Hub" in refused(run, "someone/x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
        assert "not pushed: the hub could not be reached" in refused(run, "someone/x", code=1)
    assert hub.repositories == {"someone/x": {}} and hub.num_commits == 0
