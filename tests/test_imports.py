"""What a command imports: nothing heavy that it does not use, and all that it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.imports import COMPILER, QUANTIZERS
from train.config import TrainConfig
from train.option_values import CacheUse

ROOT = Path(__file__).parent.parent
LOADED = f"{COMPILER}.eval_frame"  # is there when the compiler is, and not its stand-in
UNUSED = {*QUANTIZERS, LOADED, "torch._inductor", "torch.distributed.tensor", "wandb"}

# Runs cli.py with the arguments that follow, and prints the names of all that is imported then.
COMMAND = """
import json, runpy, sys
try:
    runpy.run_path("cli.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([name for name, module in sys.modules.items() if module is not None]))
"""

DRIVERS = """
import json, sys
from runtime.imports import skip_unused_imports
skip_unused_imports(alone=True)
import infer.generate, precompute.encode, train.loop
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()  # torch's own calls of the compiler
print(json.dumps([name for name, module in sys.modules.items() if module is not None]))
"""

# The stand-in is replaced, in place, when something needs the compiler.
COMPILED = """
from runtime.imports import skip_unused_imports
skip_unused_imports(alone=True)
import sys, torch
from torch._dynamo import allow_in_graph, disable
import torch._dynamo as compiler
assert "torch._dynamo.eval_frame" not in sys.modules
assert disable(len) is len and allow_in_graph(len) is len
{ask}
seen = []
twice = torch.compile(lambda x: x + x, backend=lambda graph, _: seen.append(graph) or graph.forward)
assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0)) and seen
assert compiler is sys.modules["torch._dynamo"] and type(compiler).__name__ == "module"
assert compiler.disable is not disable
"""
ASKS = {
    "attribute": "assert compiler.config.recompile_limit",
    "part": "import torch._dynamo.config",
    "class": "from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex\n"
    "assert isinstance(TransformGetItemToIndex(), torch.overrides.TorchFunctionMode)",
    "use": "",
}


def python(code: str, *arguments: object) -> str:
    """What ``code`` prints last, run in a process of its own."""
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'cli.py'\n{code}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def test_drivers_import_nothing_unused() -> None:
    assert not UNUSED & set(json.loads(python(DRIVERS)))


@pytest.mark.slow
@pytest.mark.parametrize("ask", ASKS)
def test_the_compiler_is_there_when_asked_for(ask: str) -> None:
    assert python(COMPILED.format(ask=ASKS[ask])) == ""  # its own assertions hold


def test_a_compiled_run_imports_the_compiler() -> None:
    config = TrainConfig(
        caches=(CacheUse(Path("cache")),), base="base", out=Path("run"), steps=1, compile=True
    )
    assert config.special_imports == {COMPILER}


@pytest.mark.slow
def test_commands_import_what_they_use(images: Path, base: Path, tmp_path: Path) -> None:
    def imported_by(*arguments: object) -> set[str]:
        return set(json.loads(python(COMMAND, *arguments, "--base", base, "--device", "cpu")))

    cache, run, generated = tmp_path / "cache", tmp_path / "run", tmp_path / "images"
    size = "--resolution", 64, "--bucket-step", 16
    assert not UNUSED & imported_by("encode", images, "--out", cache, *size)
    train = "train", cache, "--steps", 2, "--rank", 2, "--out"
    assert not UNUSED & imported_by(*train, run)
    drawn = "--prompt", "a", "--num-steps", 1, "--size", "64x64"
    assert not UNUSED & imported_by("generate", "--lora", run, "--out", generated, *drawn)

    assert not UNUSED & imported_by(*train, tmp_path / "int8", "--base-quant", "int8")
    nf4 = imported_by(*train, tmp_path / "nf4", "--base-quant", "nf4", "--optimizer", "adamw8bit")
    assert "bitsandbytes" in nf4 and "torchao" not in nf4
