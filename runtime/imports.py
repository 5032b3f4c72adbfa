"""Spares a command the imports of its libraries that it does not use, so that it starts sooner.

diffusers, peft and transformers import whatever they might be asked for: packages that quantize,
wherever these are installed, torch's compiler, and tensors that are sharded over processes. That
is more than half of the processor time before a command begins to work, and few commands use any
of it.
"""

import sys
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

QUANTIZERS = frozenset({"bitsandbytes", "torchao"})
COMPILER = "torch._dynamo"
_MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"  # of which transformers imports a class


def skip_unused_imports(used: Collection[str] = (), *, alone: bool) -> None:
    """Bar the ``QUANTIZERS`` from this process, and load the ``COMPILER`` only when something of it
    is used. Those in ``used`` stay as they are, and so does the compiler if there are any. Where
    the process is ``alone``, torch reports that it was built without its distributed package, as
    some builds are: libraries then import nothing of it.

    It is for the process of a single command, before it imports diffusers: a library that has
    looked for a package once does not look again. A program that imports our modules gets
    everything.
    """
    for name in QUANTIZERS.difference(used, sys.modules):
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of a barred module
    if not used and COMPILER not in sys.modules:
        sys.meta_path.insert(0, _Finder())
    if alone:
        import torch.distributed

        torch.distributed.is_available = lambda: False


class _Finder(MetaPathFinder):
    """Finds the compiler: to be loaded later, or at once where a part of it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if name == COMPILER:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _Later(spec.loader)
            return spec
        if name.startswith(f"{COMPILER}."):
            with suppress(ValueError):  # another thread was first
                sys.meta_path.remove(self)
            load_compiler(sys.modules[COMPILER])
            if name in sys.modules:  # it came with the whole
                return ModuleSpec(name, _Loaded(sys.modules[name]))
        return None


class _Later(Loader):
    """Makes a module that loads itself on first use; it stays the same object."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Compiler
        masks = ModuleType(_MASKS)
        masks.TransformGetItemToIndex = _TransformGetItemToIndex  # type: ignore[attr-defined]
        sys.modules[_MASKS] = masks


class _Loaded(Loader):
    """Gives a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already."""


class _TransformGetItemToIndex:
    """Stands in for the compiler's class of this name; an object of it is one of the real class."""

    def __new__(cls) -> Any:
        load_compiler(sys.modules[COMPILER])
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        return TransformGetItemToIndex()


def _identity(function: Any = None, *_: Any, **__: Any) -> Any:
    """What the compiler's decorators do to a function that is not compiled."""
    return _identity if function is None else function


_MARKS: dict[str, Callable[..., Any]] = {
    "allow_in_graph": _identity,
    "assume_constant_result": _identity,
    "disable": _identity,
    "graph_break": lambda *_, **__: None,
}
_loading = threading.RLock()


class _Compiler(ModuleType):
    """torch's compiler while nothing is compiled: its decorators, which the optimizers and many
    modules use, do nothing then. Any other attribute loads it."""

    def __getattr__(self, name: str) -> Any:
        if name in _MARKS:
            return _MARKS[name]
        if name.startswith("__"):  # which Python asks every module for
            raise AttributeError(name)
        load_compiler(self)
        return getattr(self, name)


def load_compiler(module: ModuleType) -> None:
    """Load the compiler if that was put off."""
    with _loading:
        if type(module) is _Compiler:
            module.__class__ = ModuleType  # type: ignore[assignment]
            del sys.modules[_MASKS]
            spec = module.__spec__
            assert spec is not None and isinstance(spec.loader, _Later)
            spec.loader = module.__loader__ = spec.loader.loader
            spec.loader.exec_module(module)
