"""Stand-ins for the ONNX packages on a machine that has only torch, so that the torch references can be imported.

The references live in modules that also write ONNX bodies. Those name the packages in annotations and constants at
module level and call them only when a model is written, which a GPU machine never does. A package that is installed
is left alone.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

PACKAGES = ("onnx", "onnx_ir", "onnx_ir.tape", "onnxscript")


class _Anything(type):
    """A class whose attributes are classes like it: enough for `ir.DataType.FLOAT` and `ir.Value | None`."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Absent(ModuleType):
    """A package that is not installed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def stand_in() -> list[str]:
    """Put a stand-in where one of `PACKAGES` is not installed; returns the names of those that were."""
    replaced = []
    for name in PACKAGES:
        root = name.partition(".")[0]
        if root in replaced or importlib.util.find_spec(root) is None:
            sys.modules[name] = _Absent(name)
            replaced.append(name)
    return replaced
