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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    values = tomllib.loads(assignments.replace("; ", "\n").replace('{"enable": true, "count": 3}',
                           "{enable = true, count = 3}"))
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
    return bool(names) and (key in ("image", "text") or any(
        row_name.startswith(f"{prefix}{key}")
        for other in read_table(tool)
        for row_name in other.names.split()
    ))


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
    name = f"encode-{2 if row.gives.startswith('val') else 1:02}-images"
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
    for name in row.names.split():
        if name.endswith("*") or "." in name:
            continue
        values = row.example or f"{name} = false"
        outcomes = entries(run(tool, *example_configs(tool, row, values)))
        kind, text = next(
            outcomes[label] for label in outcomes if label.rpartition(".")[2] == name
        )
        assert kind == (ALREADY if row.becomes == ALWAYS else WITHOUT), (name, kind, text)
        now = {path.name: path.read_text() for path in Path("recipes").glob("*.toml")}
        if name not in ("in_json", "concept_file_name"):
            assert now == plain, name
