"""Import the package without its hosts: the reference pages need names, types and defaults, and nothing that runs.

A documentation environment has neither torch nor axolotl, and with both installed the pages must come out the same. So
the hosts are always absent here, and anything that a module takes from them at import time is an :class:`Absent`.
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["HOSTS", "Absent", "hide_hosts"]

HOSTS = frozenset({"axolotl", "datasets", "httpx", "mergekit", "ray", "tenacity", "torch", "transformers", "vllm"})


@dataclass(frozen=True)
class Specification:
    """What mergekit attaches to a merge method."""

    parameters: tuple[Any, ...] = ()


class Absent(ModuleType):
    """A module of a host, or anything in it: every attribute exists, calls do nothing, and subclassing adds nothing."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is decorated, if this is used as a decorator; else itself."""
        decorates = len(args) == 1 and not kwargs and (inspect.isfunction(args[0]) or inspect.isclass(args[0]))
        if decorates and inspect.isfunction(args[0]):
            args[0].spec = Specification()  # type: ignore[attr-defined]
        return args[0] if decorates else self

    def __getitem__(self, item: Any) -> Any:
        return item  # a generic of mergekit's around the annotation that holds the legal values

    def __or__(self, other: Any) -> "Absent":
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in HOSTS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def hide_hosts() -> None:
    """From now on every import of a host gives an :class:`Absent`."""
    sys.meta_path.insert(0, _Finder())
