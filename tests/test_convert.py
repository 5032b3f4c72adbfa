"""``convert``: configs of other trainers, in the shapes that people publish, field by field."""

import json
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from cli import commands
from cli_convert import TOOLS, convert
from cli_tune import check_command
from convert.tables import ALREADY, ALWAYS, NONE, TRANSLATED, UNKNOWN, WITHOUT, Row, read_table
from runtime.options import StageCommand
from tests.configs import (
    BACKENDS,
    CONCEPTS,
    KOHYA_DATA,
    KOHYA_LORA,
    ONETRAINER_LORA,
    SIMPLETUNER_LORA,
)
from tools.draw_images import draw_images

ONLY_SUBSET = {"image_dir", "num_repeats", "is_reg", "class_tokens", "alpha_mask", "metadata_file"}
BASES = {
    "kohya": 'pretrained_model_name_or_path = "base"',
    "onetrainer": 'model_type = "STABLE_DIFFUSION_XL_10_BASE"; base_model_name = "base"',
    "simpletuner": 'model_family = "sdxl"; pretrained_model_name_or_path = "base"',
}
FILES = {
    "prompts.txt": "a cat --n blurry --w 768 --h 512 --d 7 --s 20 --l 5.5\n",
    "samples.json": '[{"prompt": "a cat", "seed": 3}]',
    "concepts.json": '[{"path": "images"}]',
    "library.json": '{"cat": "a cat"}',
    "data.toml": '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n',
    "multidatabackend.json": '[{"instance_data_dir": "images"}]',
}


@pytest.fixture(autouse=True)
def examples_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with the files that examples name."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    return tmp_path


def run(tool: str, config: str, datasets: str | None = None, out: str = "recipes") -> list[str]:
    """The lines that convert prints for configs of these texts."""
    ending = "toml" if tool == "kohya" else "json"
    path = Path(f"config.{ending}")
    path.write_text(config)
    second = None
    if datasets is not None:
        second = Path(f"datasets.{ending}")
        second.write_text(datasets)
    check = partial(check_command, cli.commands)
    return convert(tool, path, second, Path(out), check)


def recipe(name: str, out: str = "recipes") -> dict[str, Any]:
    """A recipe that was written, by the names of options."""
    table = tomllib.loads((Path(out) / f"{name}.toml").read_text())
    return {key.replace("-", "_"): value for key, value in table.items()}


def encodes(out: str = "recipes") -> list[dict[str, Any]]:
    return [recipe(path.stem, out) for path in sorted(Path(out).glob("encode-*.toml"))]


def entries(lines: list[str]) -> dict[str, tuple[str, str]]:
    """What was printed of each option: its class, and the text."""
    classes = (TRANSLATED, ALREADY, WITHOUT, UNKNOWN)
    kind, result = "", {}
    for line in lines:
        heading = line.rpartition(" (")[0]
        if heading in classes:
            kind = heading
        elif not line.startswith("  "):
            kind = ""
        elif kind:
            label, _, text = line.strip().partition(": ")
            assert label not in result, label
            result[label] = (kind, text)
    return result


# Each row of the tables, which docs/coming-from.md shows


def nested(assignments: str) -> dict[str, Any]:
    """``a = 1; b.c = 2`` as a table; JSON's true and false are TOML's."""
    values = tomllib.loads(
        assignments.replace("; ", "\n").replace(
            '{"enable": true, "count": 3}', "{enable = true, count = 3}"
        )
    )
    assert isinstance(values, dict)
    return values


def example_configs(tool: str, row: Row, example: str) -> tuple[str, str | None]:
    """The smallest config and dataset config with a row's example in it."""
    values = nested(example)
    own = {key: values.pop(key) for key in [*values] if is_of_dataset(tool, row, key)}
    if tool == "kohya":
        has_dataset = not {"train_data_dir", "dataset_config", "in_json"} & {*values}
        config = nested(BASES[tool]) | values
        text = "".join(f"{key} = {toml(value)}\n" for key, value in config.items())
        general = "".join(f"{k} = {toml(v)}\n" for k, v in own.items() if k not in ONLY_SUBSET)
        subset = {"image_dir": "images"} | {k: v for k, v in own.items() if k in ONLY_SUBSET}
        lines = "".join(f"{key} = {toml(value)}\n" for key, value in subset.items())
        data = f"[general]\n{general}[[datasets]]\n[[datasets.subsets]]\n{lines}"
        return text, data if has_dataset else None
    config = nested(BASES[tool]) | values
    if tool == "onetrainer":
        concepts = [{"path": "images"} | own]
        if own.get("type") == "VALIDATION":
            concepts = [{"path": "images"}, concepts[0]]
        if "concept_file_name" not in config and "concepts" not in config:
            config["concepts"] = concepts
        return json.dumps(config), None
    data = [{"instance_data_dir": "images"} | own]
    return json.dumps(config), None if "data_backend_config" in config else json.dumps(data)


def is_of_dataset(tool: str, row: Row, key: str) -> bool:
    if tool == "kohya":
        return key in {
            name for row in read_table(tool) for name in row.names.split() if name in DATASET_NAMES
        }
    prefix = {"onetrainer": "concepts.", "simpletuner": "backend."}[tool]
    names = {name for name in row.names.split() if name.startswith(prefix)}
    return bool(names) and (
        key in ("image", "text")
        or any(
            row_name.startswith(f"{prefix}{key}")
            for other in read_table(tool)
            for row_name in other.names.split()
        )
    )


DATASET_NAMES = {
    *ONLY_SUBSET,
    *("caption_prefix", "shuffle_caption", "keep_tokens", "enable_wildcard", "flip_aug"),
    *("caption_dropout_rate", "random_crop", "resolution", "enable_bucket", "bucket_reso_steps"),
    *("batch_size", "validation_split", "color_aug", "caption_suffix", "caption_extension"),
}


def toml(value: Any) -> str:
    return json.dumps(value)


def table_rows(kinds: bool) -> list[Any]:
    return [
        pytest.param(tool, row, id=f"{tool}-{row.names.split()[0]}")
        for tool in TOOLS
        for row in read_table(tool)
        if (row.becomes in (ALWAYS, NONE)) != kinds
    ]


@pytest.mark.parametrize(("tool", "row"), table_rows(True))
def test_each_example_becomes_what_its_row_says(tool: str, row: Row) -> None:
    outcomes = entries(run(tool, *example_configs(tool, row, row.example)))
    command, _, option = row.becomes.split(", ")[0].partition(" ")
    name = f"encode-{2 if row.gives.startswith('val = ') else 1:02}-images"
    if "photos" in row.example:
        name = "encode-01-photos"
    written = Path("recipes") / f"{command if command != 'encode' else name}.toml"
    assert row.gives in written.read_text().splitlines()
    for target in row.becomes.split(", "):
        command, _, option = target.partition(" ")
        stage = commands.commands[command]
        assert isinstance(stage, StageCommand)
        names = {field for field in stage.settings.__dataclass_fields__}
        assert option.removeprefix("--").replace("-", "_").lower() in names, target
    for label, (kind, text) in outcomes.items():
        if label.rpartition("].")[2].removeprefix("general.") in row.names.split():
            assert kind == TRANSLATED and text, (label, kind, text)
    assert not [label for label, (kind, _) in outcomes.items() if kind == UNKNOWN]


@pytest.mark.parametrize(("tool", "row"), table_rows(False))
def test_an_option_without_a_counterpart_changes_nothing(tool: str, row: Row) -> None:
    run(tool, *example_configs(tool, row, ""))
    plain = {path.name: path.read_text() for path in Path("recipes").glob("*.toml")}
    names = [name for name in row.names.split() if "." not in name and not name.endswith("*")]
    values = "; ".join(f"{name} = false" for name in names if name not in row.example)
    if row.example:
        values, names = row.example, [name for name in names if name in row.example]
    outcomes = entries(run(tool, *example_configs(tool, row, values)))
    kinds = {label.rpartition(".")[2]: kind for label, (kind, _) in outcomes.items()}
    for name in names:
        assert kinds[name] == (ALREADY if row.becomes == ALWAYS else WITHOUT), name
    now = {path.name: path.read_text() for path in Path("recipes").glob("*.toml")}
    if "metadata_file" not in names:  # without its list of captions, none are assumed
        assert now == plain


# Whole configs


def put_images(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        Path(name).mkdir(parents=True)
        for number in range(count):
            (Path(name) / f"{number}.png").touch()


def test_a_lora_of_kohya_with_subsets_and_regularization_images() -> None:
    put_images({"cats": 8, "more": 20, "reg": 25})
    lines = run("kohya", KOHYA_LORA, KOHYA_DATA)
    cats, more, reg = encodes()
    assert cats == {
        "dataset": "cats",
        "out": "out/cat-cache-01-cats",
        "base": "models/sdxl.safetensors",
        "vae": "models/vae.safetensors",
        "missing_caption": "empty",
        "caption_prefix": "ohwx,",
        "shuffle_tags": 8,
        "keep_tokens": 1,  # the prefix is the other one
        "flip": True,
        "resolution": 768,
        "long_captions": 3,
        "preview_prompts": "recipes/prompts.jsonl",
    }
    assert "caption_prefix" not in more and "keep_tokens" not in more and more["shuffle_tags"] == 8
    assert (reg["missing_caption"], reg["resolution"]) == ("a cat", 576)  # 512 x 768 in its area
    assert "square" not in reg
    train = recipe("train")
    caches = train.pop("caches")
    # 8 x 10 + 20 samples, and as many of 25 regularization images
    names = [f"out/cat-cache-0{number}" for number in (1, 2, 3)]
    assert caches == [
        f"{names[0]}-cats,repeats=10",
        f"{names[1]}-more",
        f"{names[2]}-reg,weight=0.5,repeats=4",
    ]
    assert train == {
        "out": "out/cat",
        "base": "models/sdxl.safetensors",
        "rank": 32,
        "alpha": 1.0,
        "targets": "all",
        "batch_size": 4,
        "epochs": 10,
        "optimizer": "adamw8bit",
        "lr": 3e-4,
        "weight_decay": 0.05,
        "lr_schedule": "cosine-restarts",
        "num_cycles": 3,
        "warmup_steps": 50,  # of 10 epochs of (100 + 100) / 4
        "min_snr_gamma": 5.0,
        "noise_offset": 0.0357,
        "seed": 42,
        "prediction_type": "epsilon",
        "zero_terminal_snr": False,
        "caption_dropout": 0.1,
        "precision": "bf16",
        "checkpoint_every": "2ep",
        "keep": 4,
        "preview_every": "1ep",
    }
    assert recipe("generate") == {
        "out": "out/cat-images",
        "lora": ["out/cat"],
        "prompts": "recipes/prompts.jsonl",
        "base": "models/sdxl.safetensors",
        "vae": "models/vae.safetensors",
        "sampler": "ddim",
        "guidance_scale": 7.5,
    }
    (prompt,) = Path("recipes/prompts.jsonl").read_text().splitlines()
    assert json.loads(prompt) == {
        "text": "a cat",
        "negative": "blurry",
        "width": 768,
        "height": 512,
        "seed": 7,
        "num_steps": 20,
        "guidance_scale": 5.5,
    }
    outcomes = entries(lines)
    assert outcomes["network_aplha"] == (UNKNOWN, "did you mean network_alpha?")
    assert outcomes["max_train_steps"][0] == outcomes["learning_rate"][0] == WITHOUT
    assert outcomes["full_bf16"][0] == outcomes["text_encoder_lr"][0] == WITHOUT
    assert outcomes["optimizer_args.betas"][0] == WITHOUT
    assert outcomes["cache_latents"][0] == ALREADY
    assert outcomes["datasets[1].subsets[1].num_repeats"] == (
        TRANSLATED,
        f"train: caches has {names[0]}-cats,repeats=10",
    )
    text = "\n".join(lines)
    assert "network_alpha is 1 for kohya: train: alpha = 1.0" in text
    assert "f00dcafe" not in text and not any(
        "f00dcafe" in path.read_text() for path in Path("recipes").iterdir()
    )
    given = sum(len(part) for part in tomllib.loads(KOHYA_LORA).values()) + 1  # optimizer_args: 2
    given += sum(line.strip()[:1].isalpha() for line in KOHYA_DATA.splitlines())
    assert len(outcomes) == given, "each option is in one class"
    commands_printed = [line.split()[2:] for line in lines if line.startswith("  python cli.py")]
    assert [command[0] for command in commands_printed] == ["encode"] * 3 + ["train", "generate"]
    assert all(Path(command[2]).is_file() for command in commands_printed)
    assert Path("recipes/README.txt").read_text().splitlines() == lines[:-2]


def test_a_lora_of_kohya_in_folders_with_repeats_in_their_names() -> None:
    put_images({"img/10_ohwx cat": 3, "img/2_ohwx dog": 2, "img/notes": 1, "reg/1_cat": 4})
    config = BASES["kohya"] + (
        '\ntrain_data_dir = "img"\nreg_data_dir = "reg"\nresolution = "1024,1024"\n'
        'network_dim = 8\nnetwork_alpha = 4\noptimizer_type = "Prodigy"\nlearning_rate = 1\n'
    )
    lines = run("kohya", config)
    cat, dog, reg = encodes()
    assert [part["dataset"] for part in (cat, dog, reg)] == [
        "img/10_ohwx cat",
        "img/2_ohwx dog",
        "reg/1_cat",
    ]
    assert [part["missing_caption"] for part in (cat, dog, reg)] == ["ohwx cat", "ohwx dog", "cat"]
    assert all(part["square"] and part["resolution"] == 1024 for part in (cat, dog, reg))
    train = recipe("train")
    repeats = [use.rpartition(",repeats=")[2] for use in train["caches"]]
    assert repeats == ["10", "2", "8"]  # 34 samples, and about as many of 4 images
    assert (train["optimizer"], train["lr"], train["weight_decay"]) == ("prodigy", 1.0, 0.0)
    assert (train["steps"], train["precision"]) == (1600, "fp32")
    assert any("kohya would train the text encoders too" in line for line in lines)
    run("kohya", config.replace('"img"', '"elsewhere"'), out="other")
    (tree, reg) = encodes("other")
    assert tree["repeat_folders"] and "missing_caption" not in tree


def test_a_full_fine_tune_of_kohya() -> None:
    config = BASES["kohya"] + (
        '\nlearning_rate = 1e-5\noptimizer_type = "Adafactor"\nmixed_precision = "bf16"\n'
        'optimizer_args = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]\n'
        "full_bf16 = true\nfused_backward_pass = true\ngradient_checkpointing = true\n"
        "v_parameterization = true\nzero_terminal_snr = true\ntrain_text_encoder = true\n"
        'lr_scheduler = "constant_with_warmup"\nlr_warmup_steps = 100\nsave_every_n_steps = 500\n'
        "save_last_n_steps = 1000\nunet_lr = 1.0\n"
    )
    outcomes = entries(run("kohya", config, FILES["data.toml"]))
    train = recipe("train")
    assert train["full"] and train["pure_bf16"] and train["fused_backward"]
    assert train["gradient_checkpointing"] and not {"rank", "alpha", "targets"} & set(train)
    assert (train["prediction_type"], train["zero_terminal_snr"]) == ("v_prediction", True)
    assert (train["optimizer"], train["lr"], train["weight_decay"]) == ("adafactor", 1e-3, 0.0)
    assert (train["lr_schedule"], train["warmup_steps"]) == ("constant", 100)
    assert (train["checkpoint_every"], train["keep"]) == ("500", 3)  # 1000 steps back, and the last
    for name in ("learning_rate", "unet_lr", "train_text_encoder"):
        assert outcomes[name][0] == WITHOUT


@pytest.mark.parametrize(
    ("kind", "args", "expected"),
    [
        ("Adafactor", "", ("adafactor", 0.01)),
        ("Adafactor", '"relative_step=False"', ("adafactor", 3e-4)),
        ("Adafactor", '"relative_step=False", "scale_parameter=False"', ("adamw", 3e-4)),
        ("DAdaptAdam", "", ("prodigy", 3e-4)),
        ("Lion", "", ("adamw", 3e-4)),
        ("PagedAdamW8bit", "", ("adamw8bit", 3e-4)),
    ],
)
def test_optimizers_by_meaning(kind: str, args: str, expected: tuple[str, float]) -> None:
    config = BASES["kohya"] + (
        f'\nnetwork_dim = 8\nlearning_rate = 3e-4\noptimizer_type = "{kind}"\n'
        f"optimizer_args = [{args}]\n"
    )
    outcomes = entries(run("kohya", config, FILES["data.toml"]))
    train = recipe("train")
    assert (train["optimizer"], train["lr"]) == expected
    is_exact = kind in ("Adafactor", "PagedAdamW8bit")
    assert outcomes["optimizer_type"][0] == (TRANSLATED if is_exact else WITHOUT)


def test_a_lora_of_onetrainer() -> None:
    put_images({"cats": 5})
    Path("my-concepts.json").write_text(json.dumps(CONCEPTS))
    outcomes = entries(lines := run("onetrainer", json.dumps(ONETRAINER_LORA)))
    (encode,) = encodes()
    assert encode == {
        "dataset": "cats",
        "out": "models/cat-cache-01-cats",
        "base": "stabilityai/stable-diffusion-xl-base-1.0",
        "caption_lines": True,
        "shuffle_tags": 8,
        "keep_tokens": 1,
        "flip": True,
        "resolution": 1024,
        "preview_prompts": "recipes/prompts.jsonl",
    }
    assert recipe("train") == {
        "out": "models/cat",
        "base": "stabilityai/stable-diffusion-xl-base-1.0",
        "batch_size": 4,
        "accumulate": 2,
        "max_grad_norm": 0.0,
        "rank": 16,
        "alpha": 1.0,
        "targets": "all",
        "epochs": 20,
        "optimizer": "adamw",
        "lr": 3e-4,
        "weight_decay": 0.01,
        "min_snr_gamma": 5.0,
        "caption_dropout": 0.05,
        "precision": "bf16",
        "checkpoint_every": "50",  # of 100 batches
        "caches": ["models/cat-cache-01-cats,weight=0.5,repeats=3"],
        "lr_schedule": "cosine",
        "warmup_steps": 50,
    }
    (prompt,) = Path("recipes/prompts.jsonl").read_text().splitlines()
    assert json.loads(prompt)["guidance_scale"] == 7.0 and json.loads(prompt)["seed"] == 3
    assert outcomes["colour_jitter"][0] == UNKNOWN
    assert outcomes["concepts[1].image.random_hue_max_strength"][0] == WITHOUT
    assert outcomes["optimizer.beta1"][0] == outcomes["backup_after"][0] == WITHOUT
    assert any("concepts[2] is left out" in line for line in lines)


def test_a_lora_of_simpletuner() -> None:
    lines = run("simpletuner", json.dumps(SIMPLETUNER_LORA), json.dumps(BACKENDS))
    outcomes = entries(lines)
    cats, held_out = encodes()
    assert cats == {
        "dataset": "cats",
        "out": "output/models/shardtune-cache-01-cats",
        "base": "base",
        "caption_lines": True,
        "resolution": 1000,
        "square": True,
        "preview_prompts": "recipes/prompts.jsonl",
    }
    train = recipe("train")
    assert train["caches"] == ["output/models/shardtune-cache-01-cats,repeats=5"]
    assert train["val"] == held_out["out"] == "output/models/shardtune-cache-02-held-out"
    assert (train["rank"], train["alpha"], train["targets"]) == (8, 8.0, "attention")
    assert (train["steps"], "epochs" in train) == (1000, False)
    assert (train["lr"], train["lr_schedule"], train["warmup_steps"]) == (1e-4, "linear", 100)
    assert (train["batch_size"], train["precision"], train["caption_dropout"]) == (2, "bf16", 0.1)
    assert (train["checkpoint_every"], train["keep"], train["preview_every"]) == ("250", 5, "100")
    (prompt,) = Path("recipes/prompts.jsonl").read_text().splitlines()
    assert (json.loads(prompt)["width"], json.loads(prompt)["height"]) == (1024, 1000)
    assert recipe("generate")["guidance_scale"] == 4.5
    assert outcomes["flux_guidance_mode"][0] == UNKNOWN
    assert outcomes["lr_scheduler"][0] == outcomes["push_to_hub"][0] == WITHOUT
    assert "f00d" not in "\n".join(lines)


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("v2 = true", "config.toml: v2: is Stable Diffusion 2"),
        ('pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"', "is no SDXL by its"),
        ('pretrained_model_name_or_path = "models/v1-5-pruned.safetensors"', "is no SDXL by its"),
        ('network_module = "networks.lora_flux"', "network_module: 'networks.lora_flux' is not of"),
        ('t5xxl = "t5.safetensors"', "t5xxl: is of another model than SDXL"),
        ('network_dim = "many"', "config.toml: network_dim: must be a whole number, not 'many'"),
        ("network_dim = 1.5", "network_dim: must be a whole number, not 1.5"),
        ("learning_rate = true", "learning_rate: must be a number, not True"),
        ("flip_aug = 1", "flip_aug: must be true or false, not 1"),
        ("network_dim = 0", "its train cannot be converted: --rank must be at least 1, not 0"),
        ('optimizer_args = ["x"]', "optimizer_args: must be a list of name=value, not 'x'"),
        ('mixed_precision = "int4"', "mixed_precision: must be no, fp16 or bf16"),
        ('resolution = "big"', "resolution: must be N or W,H in pixels, not 'big'"),
        ("lr_warmup_steps = -3", "lr_warmup_steps: must be steps or a share, not '-3'"),
        ("network_train_text_encoder_only = true", "text encoders cannot be trained here"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "'seed' is given in two sections"),
        ("seed = ", "config.toml: not valid TOML"),
        ("full_bf16 = true", "its train cannot be converted: --pure-bf16 computes in bf16"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(config: str, message: str) -> None:
    base = "" if "pretrained" in config else BASES["kohya"] + "\n"
    config_text, data = base + config, FILES["data.toml"]
    with pytest.raises(ValueError) as error:
        run("kohya", config_text, data)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("recipes").exists()


def test_an_sdxl_is_not_taken_for_another_by_its_name() -> None:
    for name in ("sdxl-v1-5", "noobai-v1-5", "OWNER/stable-diffusion-xl-base-1.0", "sd_xl_2.0"):
        config = f'pretrained_model_name_or_path = "{name}"'
        run("kohya", config, FILES["data.toml"])
        assert recipe("train")["base"] == name


@pytest.mark.parametrize(
    ("tool", "change", "message"),
    [
        ("onetrainer", {"model_type": "STABLE_DIFFUSION_15"}, "model_type: 'STABLE_DIFFUSION_15'"),
        ("onetrainer", {"training_method": "EMBEDDING"}, "'EMBEDDING' cannot be trained here"),
        ("onetrainer", {"epochs": "ten"}, "epochs: must be a whole number, not 'ten'"),
        ("onetrainer", {"unet": {"train": False}}, "unet.train: must be true"),
        ("onetrainer", {"concepts": [{}]}, "concepts[1].path: is missing"),
        ("simpletuner", {"model_family": "flux"}, "model_family: 'flux' is not sdxl"),
        (
            "simpletuner",
            {"model_type": "lora", "lora_rank": [8]},
            "lora_rank: must be a whole number, not a list",
        ),
    ],
)
def test_other_tools_are_refused_likewise(tool: str, change: dict[str, Any], message: str) -> None:
    config = nested(BASES[tool]) | change
    if tool == "onetrainer":
        config.setdefault("concepts", [{"path": "images"}])
    data = json.dumps([{"instance_data_dir": "images"}]) if tool == "simpletuner" else None
    with pytest.raises(ValueError) as error:
        run(tool, json.dumps(config), data)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("config.json")


def test_only_a_former_conversion_is_replaced() -> None:
    config = BASES["kohya"] + "\nseed = 1"
    run("kohya", config, FILES["data.toml"])
    run("kohya", config.replace("1", "2"), FILES["data.toml"])
    assert recipe("train")["seed"] == 2
    (note := Path("recipes/notes.txt")).write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which convert did not write"):
        run("kohya", config, FILES["data.toml"])
    note.unlink()
    with open("recipes/train.toml", "a") as file:
        file.write("rank = 8\n")
    with pytest.raises(ValueError, match=r"train\.toml was changed since convert wrote it"):
        run("kohya", config, FILES["data.toml"])
    assert recipe("train")["seed"] == 2
    Path("folder").mkdir()
    run("kohya", config, FILES["data.toml"], out="folder")  # an empty one
    Path("other").mkdir()
    Path("other/a.txt").touch()
    for out in ("other", "prompts.txt"):
        with pytest.raises(ValueError, match="give another --out"):
            run("kohya", config, FILES["data.toml"], out=out)
    assert Path("other/a.txt").exists() and not Path("recipes.partial").exists()


def test_prompts_as_kohya_reads_them() -> None:
    Path("prompts.toml").write_text(
        '[prompt]\nwidth = 770\nscale = 6\n[[prompt.subset]]\nprompt = "a"\nsample_steps = 5000\n'
        '[[prompt.subset]]\nprompt = "b"\nsample_sampler = "heun"\ncontrolnet_image = "x.png"\n'
    )
    config = BASES["kohya"] + '\nsample_prompts = "prompts.toml"\nsample_sampler = "lms"'
    outcomes = entries(run("kohya", config, FILES["data.toml"]))
    rows = [json.loads(line) for line in Path("recipes/prompts.jsonl").read_text().splitlines()]
    assert rows == [
        {"width": 768, "guidance_scale": 6.0, "text": "a", "num_steps": 999},
        {"width": 768, "guidance_scale": 6.0, "text": "b"},
    ]
    assert "left out of prompts: controlnet_image, sampler 'heun'" in outcomes["sample_prompts"][1]
    assert outcomes["sample_sampler"][0] == WITHOUT and "sampler" not in recipe("generate")
    run("kohya", config.replace(".toml", ".gone"), FILES["data.toml"])
    assert not Path("recipes/prompts.jsonl").exists() and "prompts" not in recipe("train")
    Path("prompts.txt").write_text("a cat --W 512 --g 3 --n \na dog --d 99999999999999999999999\n")
    with pytest.raises(ValueError, match=r"prompts\.txt, line 2: .*seed"):
        run("kohya", config.replace(".toml", ".txt"), FILES["data.toml"])


def test_the_docs_have_the_tables() -> None:
    from tools.conversion_tables import DOCS, with_tables

    text = DOCS.read_text(encoding="utf-8")
    assert with_tables(text) == text, "python -m tools.conversion_tables writes them"


@pytest.mark.slow
def test_the_commands_of_a_conversion_make_a_lora() -> None:
    draw_images(Path("10_shapes"), count=6)
    draw_images(Path("reg"), count=3, seed=1)
    Path("img").mkdir()
    Path("10_shapes").rename("img/10_shapes")
    config = (
        'pretrained_model_name_or_path = "miniature"\nnetwork_module = "networks.lora"\n'
        'network_dim = 4\nnetwork_train_unet_only = true\ntrain_data_dir = "img"\n'
        'reg_data_dir = "regs"\nresolution = 64\nenable_bucket = true\nbucket_reso_steps = 16\n'
        'caption_extension = ".txt"\nshuffle_caption = true\nmax_train_steps = 3\n'
        "learning_rate = 1e-3\ntrain_batch_size = 2\nprior_loss_weight = 0.5\n"
        'sample_prompts = "prompts.txt"\nsample_every_n_steps = 2\nsave_every_n_steps = 2\n'
    )
    Path("regs").mkdir()
    Path("reg").rename("regs/1_shape")
    Path("prompts.txt").write_text("a red circle --w 64 --h 64 --s 2 --d 3\n")
    Path("config.toml").write_text(config)
    done = CliRunner().invoke(commands, ["convert", "kohya", "config.toml", "--out", "recipes"])
    assert done.exit_code == 0, done.output
    typed = [line.split()[2:] for line in done.output.splitlines() if "  python cli.py" in line]
    assert [arguments[0] for arguments in typed] == ["encode", "encode", "train", "generate"]
    for arguments in typed:
        ran = CliRunner().invoke(commands, [*arguments, "--device", "cpu"])
        assert ran.exit_code == 0, ran.output
    assert Path("output/last/pytorch_lora_weights.safetensors").is_file()
    assert len([*Path("output/last-images").glob("0*.png")]) == 1
    settings = json.loads(Path("output/last/config.json").read_text())
    assert (settings["rank"], settings["alpha"]) == (4, 1.0)
