"""Finding compilers and keeping what they made, with shell scripts in place of compilers."""

from pathlib import Path

import pytest

from plugins import toolchain
from plugins.toolchain import ToolMissingError, compiled, linked
from tests.plugins.tools import made

# Writes its arguments to what follows -o, and a line to a log for every run.
COMPILER = """#!/bin/sh
echo run >> "$LOG"
while [ $# -gt 0 ]; do [ "$1" = -o ] && shift && echo made > "$1"; shift; done
"""


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return str(program(tmp_path / "compiler", COMPILER))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, text in {"near.h": "#pragma once\n", "deep.h": '#include "near.h"\n', "other.h": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "kernel.cu").write_text('#include <cstdio>\n#include "deep.h"\n#include "gpu.h"\n')
    return tmp_path / "kernel.cu"


def test_is_compiled_once_per_content(compiler: str, source: Path, tmp_path: Path) -> None:
    def runs() -> int:
        return len((tmp_path / "log").read_text().splitlines())

    first = compiled([compiler, "-c"], source, ".o", tmp_path / "build")
    assert first.read_text() == "made\n" and first.name.startswith("kernel-") and first.suffix == ".o"
    (tmp_path / "other.h").write_text("// nobody includes it\n")
    assert compiled([compiler, "-c"], source, ".o", tmp_path / "build") == first and runs() == 1
    assert compiled([compiler, "-c", "-g"], source, ".o", tmp_path / "build") != first and runs() == 2
    (tmp_path / "near.h").write_text("#pragma once\nint changed;\n")
    second = compiled([compiler, "-c"], source, ".o", tmp_path / "build")
    assert second != first and runs() == 3
    library = linked([compiler], [first], "kernels", tmp_path / "build")
    assert library.name.startswith("libkernels-") and library.suffix == ".so"
    assert linked([compiler], [first], "kernels", tmp_path / "build") == library and runs() == 4
    assert linked([compiler], [second], "kernels", tmp_path / "build") != library and runs() == 5


def test_a_change_in_what_options_name_is_seen(compiler: str, source: Path, tmp_path: Path) -> None:
    headers, exports, build = tmp_path / "headers", tmp_path / "exports.map", tmp_path / "build"
    headers.mkdir()
    (headers / "far.h").write_text("#pragma once\n")
    source.write_text('#include "far.h"\n')
    command = [compiler, f"-I{headers}", "-c"]
    first = compiled(command, source, ".o", build)
    (headers / "far.h").write_text("#pragma once\nint changed;\n")
    second = compiled(command, source, ".o", build)
    assert second != first
    exports.write_text("{ local: *; };\n")
    link = [compiler, f"-Wl,--no-undefined,--version-script={exports}"]
    library = linked(link, [second], "kernels", build)
    assert linked(link, [second], "kernels", build) == library
    exports.write_text("{ global: one; local: *; };\n")
    changed = linked(link, [second], "kernels", build)
    assert changed != library
    second.write_text("made by CMake under one name\n")
    assert linked(link, [second], "kernels", build) != changed
    flags = tmp_path / "flags"
    flags.write_text("-O1\n")
    for option in (f"@{flags}", f"--options-file={flags}"):
        flagged = compiled([compiler, option], source, ".o", build)
        flags.write_text(flags.read_text() + "-g\n")
        assert compiled([compiler, option], source, ".o", build) != flagged


def test_a_failed_compiler_says_why_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    broken = program(tmp_path / "broken", "#!/bin/sh\necho half > /dev/null\necho no such type >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="no such type"):
        compiled([str(broken)], source, ".o", tmp_path / "build")
    assert not list((tmp_path / "build").rglob("*.o"))


def test_cuda_programs_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path, wheel = (tmp_path / name for name in ("home", "path", "wheel"))
    monkeypatch.setattr(toolchain, "TOOLS", tmp_path / "tools")
    monkeypatch.setattr("sys.path", [str(wheel)])
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(ToolMissingError, match="no CUDA program nvnothing"):
        toolchain.cuda_program("nvnothing")
    for place in (wheel / "nvidia/cu13/bin", tmp_path / "tools/cuda/nvidia/cu13/bin", path):
        expected = program(place / "nvnothing")
        assert toolchain.cuda_program("nvnothing") == expected
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert toolchain.cuda_program("nvnothing") == path / "nvnothing"
    assert toolchain.cuda_program("nvnothing") != program(home / "bin/nvnothing").with_name("other")
    assert toolchain.cuda_program("nvnothing") == home / "bin/nvnothing"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "TOOLS", tmp_path / "build" / "tools")
    monkeypatch.delenv("CXX", raising=False)
    lacks = {
        toolchain.host_compiler: r"no C\+\+ compiler \(g\+\+\)",
        toolchain.aarch64_compiler: r"no C\+\+ compiler for aarch64 \(aarch64-linux-gnu-g\+\+\)",
        toolchain.aarch64_emulator: r"no emulator of aarch64 \(qemu-aarch64\)",
        toolchain.build_host: r"no C\+\+ compiler",
        lambda: toolchain.fetched("lean-11.4"): r"no lean-11.4 in build/tools \(make tools\)",
    }
    for find, reason in lacks.items():
        with pytest.raises(ToolMissingError, match=reason):
            find()


def test_without_a_tool_tests_skip_by_name_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Path:
        raise ToolMissingError("no such tool")

    monkeypatch.delenv("DLLMC_REQUIRE_TOOLS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no such tool"):
        made(find)
    monkeypatch.setenv("DLLMC_REQUIRE_TOOLS", "1")
    with pytest.raises(pytest.fail.Exception, match="no such tool"):
        made(find)


def test_every_flag_stands_in_one_place() -> None:
    for flags in (toolchain.HOST_FLAGS, toolchain.NVCC_FLAGS):
        assert "-std=c++17" in flags.read_text() and "error" in flags.read_text().lower()
    cmake = (toolchain.CUDA.parent / "CMakeLists.txt").read_text()
    assert "host.flags" in cmake and "nvcc.flags" in cmake and "-O" not in cmake
