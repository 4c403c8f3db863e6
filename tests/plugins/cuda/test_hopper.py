"""The emulated Hopper: products of a warpgroup, barriers, bulk copies, and mistakes that must not pass."""

import subprocess
from pathlib import Path

import pytest

from plugins import toolchain
from tests.plugins.tools import made

SOURCE = Path(__file__).with_name("hopper_cases.cpp")
# Mistake -> what the process says; "wrong" where the product comes out wrong.
MISTAKES = {
    "not_begun": "begin_products() is missing",
    "a_changed": "registers of A were changed before it",
    "b_changed": "operand B was changed before it",
    "d_changed": "D was changed before it",
    "d_read": "wrong",
    "not_published": "wrong",
    "different_products": "issued different products",
    "not_waited_for": "ended with products or operands under way",
    "rows_not_aligned": "expected its rows at a multiple of 1024",
    "no_swizzle": "swizzle 0, base offset 0; expected 1 and 0",
    "one_arrival_too_many": "nobody is missing",
    "one_arrival_missing": "threads wait for ever",
    "bytes_missing": "threads wait for ever",
    "too_many_bytes": "more bytes than it expects",
    "bulk_not_waited_for": "ended with bulk copies under way",
    "bulk_of_eight_bytes": "8 bytes",
    "bulk_from_odd_address": "copy_bulk from: address",
}


def ran(case: str) -> subprocess.CompletedProcess[str]:
    program = made(lambda: toolchain.build_program(SOURCE, toolchain.host_compiler()))
    return subprocess.run([str(program), case], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("case", ["product", "phases"])
def test_is_what_the_manual_says(case: str) -> None:
    result = ran(case)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_does_not_pass(mistake: str) -> None:
    result = ran(mistake)
    assert result.returncode != 0, f"it went through: {result.stdout}"
    assert MISTAKES[mistake] in (result.stdout if MISTAKES[mistake] == "wrong" else result.stderr)
