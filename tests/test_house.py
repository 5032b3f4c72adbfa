"""The rules of the tree that can be tested: who imports whom, and what the entry point loads."""

import ast
import re
import signal
import subprocess
import sys
import tokenize
import tomllib
import warnings
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cli
from runtime.errors import handle_errors

ROOT = Path(__file__).parent.parent
ROOMS = {"precompute", "train", "infer", "convert", "pages", "shards", "sdxl", "runtime"}
ROOMS |= {"cli", "tools", "tests", "benchmarks"}
ALLOWED = {
    "precompute": {"shards", "sdxl", "runtime"},
    "train": {"shards", "sdxl", "runtime"},
    "infer": {"sdxl", "runtime"},
    "convert": {"shards", "sdxl", "runtime"},
    "pages": {"shards", "sdxl", "runtime"},
    "shards": {"runtime"},
    "sdxl": {"runtime"},
    "runtime": set(),
}


def imported(path: Path) -> set[str]:
    """The rooms of ours that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names & ROOMS


@pytest.mark.parametrize("room", ALLOWED)
def test_each_room_imports_only_those_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[room] | {room}, path


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & modules or {node.module or ""}
    return names & modules


def test_no_file_imports_itself_by_way_of_others() -> None:
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for room in ALLOWED
        for path in (ROOT / room).rglob("*.py")
    }
    graph = {name: imports_of(path, set(paths)) - {name} for name, path in paths.items()}
    assert sum(map(len, graph.values())) > len(graph)  # the imports were found
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_only_runtime_files_renames() -> None:
    """So that what a rename must survive is thought of in one place."""
    renames = {"os.replace", "os.rename", "os.renames", "shutil.move"}
    renaming = set()
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if called in renames or called.endswith(".rename"):
                    renaming.add(path.relative_to(ROOT).as_posix())
    assert renaming == {"runtime/files.py"}


def test_only_one_file_copies_without_waiting() -> None:
    """What is not pinned, or not for CUDA, must be waited for: ``runtime/devices.py`` knows."""
    copying = [
        path.relative_to(ROOT).as_posix()
        for room in (*ALLOWED, "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "non_blocking"
    ]
    assert set(copying) == {"runtime/devices.py"}


def test_contributing_lists_every_file_of_the_product() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text.split("```")[1].split()
    paths = [path for room in ALLOWED for path in (ROOT / room).rglob("*.py")]
    missing = [path for path in paths if path.name != "__init__.py" and path.name not in tree]
    assert not missing
    table = text.split("| To follow |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 4
    for row in table:
        *_, opened, number, _ = row.split("|")
        named = [name.strip(" `") for name in opened.split(",")]
        assert len(named) == int(number), row
        for name in named:
            assert (ROOT / name).is_file() or (ROOT / "precompute" / name).is_file(), name


def test_cli_imports_stages_inside_its_commands_only() -> None:
    tree = ast.parse((ROOT / "cli.py").read_text())
    outside = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(n, "module", None) or n.names[0].name for n in outside}
    assert {module.split(".")[0] for module in modules} & ROOMS <= {"runtime"}


@pytest.mark.parametrize("command", ["", *cli.commands.commands])
def test_help_loads_no_torch(command: str) -> None:
    code = (
        "import sys, cli\n"
        f"try: cli.commands({[*command.split(), '--help']!r})\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'jinja2'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Usage: " in run.stdout


def test_it_is_an_application_and_installs_no_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"] == {"packages": [], "py-modules": []}


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [name for group in (project["dependencies"], *extras) for name in group]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()
    }
    for dependency in wanted:
        if dependency.startswith("shardtune["):
            continue  # the extras themselves
        name = dependency.split(">")[0].split("<")[0].lower()
        assert name in pinned, name


@pytest.mark.parametrize("room", ALLOWED)
def test_warnings_of_every_room_are_printed(room: str, capsys: pytest.CaptureFixture[str]) -> None:
    with handle_errors(debug=False):
        warnings.warn_explicit("look", UserWarning, "x.py", 1, module=f"{room}.x")
    assert capsys.readouterr().err == "Warning: look\n"


def test_a_command_puts_signals_and_warnings_back() -> None:
    before, filters, show = (
        signal.getsignal(signal.SIGTERM),
        [*warnings.filters],
        warnings.showwarning,
    )
    with handle_errors(debug=False):
        assert signal.getsignal(signal.SIGTERM) != before and warnings.showwarning != show
    assert signal.getsignal(signal.SIGTERM) == before
    assert [*warnings.filters] == filters and warnings.showwarning == show


# Words of which a name may have none: nobody could guess them, or the field has another.
PRIVATE_WORDS = {"picture", "pictures", "door", "crew", "studio", "twin", "kin", "fellow"}
PRIVATE_WORDS |= {"told", "said", "mine", "theirs", "deaf", "doomed", "settle", "settled"}
# Words that are no name by themselves: they do not say what the value is.
VAGUE_NAMES = {"one", "found", "ours", "asked", "known", "whole", "held", "gone", "about", "halves"}
VAGUE_NAMES |= {"what", "there", "here"}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_names_are_the_fields_words(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")) or ROOT.glob(f"{room}*.py"):
        with open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", token.string)}
                if token.type == tokenize.NAME and not token.string.startswith("test_"):
                    is_bad = token.string.lower() in VAGUE_NAMES or words & PRIVATE_WORDS
                    assert not is_bad, f"{path}:{token.start[0]}: {token.string}"
