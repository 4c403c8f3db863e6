"""What tests do about compilers, emulators and runtimes that a machine may lack."""

import os
from collections.abc import Callable
from typing import TypeVar

import pytest

from plugins.toolchain import ToolMissingError

Made = TypeVar("Made")


def missing(what: str) -> None:
    """Skip by name; where DLLMC_REQUIRE_TOOLS is set, as in CI, nothing may be missing: fail."""
    if os.environ.get("DLLMC_REQUIRE_TOOLS"):
        pytest.fail(what)
    pytest.skip(what)


def made(build: Callable[[], Made]) -> Made:
    """What `build` returns; `missing` where it lacks a tool."""
    try:
        return build()
    except ToolMissingError as error:
        missing(str(error))
        raise
