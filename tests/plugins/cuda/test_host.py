"""The emulated GPU: fragments against a textbook product, what threads exchange, and mistakes that must not pass."""

import subprocess
from pathlib import Path

import pytest

from plugins import toolchain
from tests.plugins.tools import made

HERE = Path(__file__).parent
CASES = (
    "mma_int4",
    "mma_int8",
    "mma_half",
    "load_matrices",
    "load_matrices_transposed",
    "shuffles",
    "barriers",
    "waiting_until",
    "copies_all_done",
    "copies_one_pending",
    "copies_not_waited_for",
    "reused_memory",
    "halves",
    "numbers",
    "races",
    "refusals",
)
# Mistake -> what the process says before it ends; None where a fault says it all.
MISTAKES: dict[str, str | None] = {
    "lane_leaves_its_warp": "threads wait for ever",
    "two_operations": "thread 37 (warp 1): ballot at",
    "two_branches": "but other lanes are in shuffle at",
    "barrier_not_reached": "threads wait for ever",
    "barrier_of_two_counts": "barrier 1 of 64 and of 32 threads",
    "half_a_warp_at_a_barrier": "counted part of a warp",
    "trap": "trap at",
    "misaligned_load": "load_once: address",
    "misaligned_copy": "copy_async to: address",
    "copy_to_global": "is not in shared memory",
    "write_behind_shared": "wrote outside the 1000 bytes",
    "write_just_before_shared": "wrote outside the 1000 bytes",
    "wait_for_ever": "a value that never comes at",
    "misaligned_vector": "misaligned address",
    "write_past_the_guard": None,
    "write_before_shared": None,
}


def program(name: str, compiler: Path) -> str:
    return str(made(lambda: toolchain.build_program(HERE / f"{name}.cpp", compiler)))


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("case", CASES)
def test_is_what_the_manual_says(case: str) -> None:
    result = ran(program("host_cases", made(toolchain.host_compiler)), case)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_the_process(mistake: str) -> None:
    result = ran(program("host_mistakes", made(toolchain.host_compiler)), mistake)
    said = MISTAKES[mistake]
    assert result.returncode != 0, f"it went through: {result.stdout}"
    if said is None:
        assert result.returncode < 0, "it should end by a signal"
    else:
        assert said in result.stderr
        assert "host_mistakes.cpp" in result.stderr or "wrote outside" in said


def test_is_the_same_on_aarch64() -> None:
    compiler, emulator = made(toolchain.aarch64_compiler), made(toolchain.aarch64_emulator)
    right, wrong = (program(name, compiler) for name in ("host_cases", "host_mistakes"))
    for case in CASES:
        result = ran(*emulator, right, case)
        assert result.returncode == 0, case + result.stdout + result.stderr
    for mistake, said in MISTAKES.items():
        result = ran(*emulator, wrong, mistake)
        assert result.returncode != 0 and (said or "") in result.stderr, mistake + result.stdout + result.stderr
