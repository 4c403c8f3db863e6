"""What nvcc made of the kernels: registers, memory and instructions of each one on each target.

`python -m plugins.cuda_census` compiles the plugin library for both CPU architectures and writes the table of what the
kernels take, plugins/cuda/resources.json. A target is a compute capability as nvcc names it: 80, 90a, ...
Dynamic shared memory is what the op's host code asks for: the most over the sizes of LLaDA-8B and Dream-7B.
"""

import hashlib
import json
import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plugins import cuda_launches, toolchain

RESOURCES = toolchain.CUDA / "resources.json"
COLUMNS = ("registers", "stack bytes", "static shared bytes", "dynamic shared bytes")

SYSTEM_SHARED_BYTES = 1024  # from 90 on, part of the shared memory of every kernel that uses any


@dataclass
class Kernel:
    """One kernel on one target; `instructions` counts opcodes with their modifiers, like IMMA.16832.S8.S8.

    `dynamic` shared bytes are None where none of the sizes of `cuda_launches` launches it.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    dynamic: int | None = None
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, opcode: str) -> int:
        """How many instructions have this opcode: all its leading parts, so IMMA counts IMMA.16832.S8.S8."""
        parts = opcode.split(".")
        return sum(n for name, n in self.instructions.items() if name.split(".")[: len(parts)] == parts)

    @property
    def is_trap(self) -> bool:
        """Whether it was left out for this target: it ends the launch and writes nothing."""
        return self.count("BPT.TRAP") > 0 and self.count("ST") + self.count("STG") == 0


Census = Mapping[str, Mapping[str, Kernel]]


def _lines(*command: str) -> Iterator[str]:
    """What a program prints; cuobjdump calls nvdisasm by name."""
    path = os.pathsep.join([str(toolchain.cuda_program("nvdisasm").parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603
        assert process.stdout
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}")


def _number(target: str) -> int:
    return int(target.rstrip("a"))


def _short(demangled: str) -> str:
    """`void dllmc::(anonymous namespace)::name<dllmc::Int4, 2>(dllmc::Args)` -> `name<Int4, 2>`."""
    name = re.sub(r"\(anonymous namespace\)::|dllmc::|^void ", "", demangled)
    return re.sub(r"\([^()]*\)$", "", name).replace("> >", ">>")


def _names(mangled: set[str]) -> dict[str, str]:
    ordered = sorted(mangled)
    shorts = [_short(line.strip()) for line in _lines("c++filt", *ordered)]
    assert len(set(shorts)) == len(ordered), "two kernels of one name"
    return dict(zip(ordered, shorts, strict=True))


def _resources(cuobjdump: str, library: Path, found: dict[str, dict[str, Kernel]]) -> None:
    target = kernel = ""
    for line in _lines(cuobjdump, "--dump-resource-usage", str(library)):
        if match := re.search(r"^arch = sm_(\w+)", line):
            target = match[1]
        elif match := re.search(r"Function (\w+):", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            made = found[target][kernel]
            made.registers, made.stack, made.shared = map(int, match.groups())
            if made.shared and _number(target) >= 90:
                made.shared -= SYSTEM_SHARED_BYTES


def _instructions(cuobjdump: str, library: Path, found: dict[str, dict[str, Kernel]]) -> None:
    """Counts opcodes in lines like `        /*0010*/   @!P0 IMAD R1, RZ, RZ, R2 ;   /* 0x... */`."""
    target = ""
    counts: Counter[str] = Counter()
    for line in _lines(cuobjdump, "--dump-sass", str(library)):
        if line.startswith("        /*"):
            words = line.split(None, 3)
            opcode = words[2] if words[1].startswith("@") else words[1]
            counts[opcode.rstrip(";")] += 1
        elif "Function : " in line:
            counts = found[target][line.split()[-1]].instructions
        elif line.startswith("arch = sm_"):
            target = line.removeprefix("arch = sm_").strip()


def _count(library: Path) -> Census:
    cuobjdump = str(toolchain.cuda_program("cuobjdump"))
    found: dict[str, dict[str, Kernel]] = defaultdict(lambda: defaultdict(Kernel))
    _resources(cuobjdump, library, found)
    _instructions(cuobjdump, library, found)
    names = _names({name for kernels in found.values() for name in kernels})
    return {target: {names[name]: kernel for name, kernel in kernels.items()} for target, kernels in found.items()}


def census(library: Path) -> Census:
    """Target -> kernel -> what it takes, counted once a library: half a minute of disassembly.

    Raises ToolMissingError without cuobjdump and nvdisasm.
    """
    digest = hashlib.sha256(library.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    kept = toolchain.BUILD.parent / "census" / f"{digest}.json"
    with toolchain.locked(kept.with_suffix(".lock")):
        if not kept.exists():
            found = _count(library)
            kept.write_text(json.dumps(found, default=vars))
    return {
        target: {
            name: Kernel(**{**kernel, "instructions": Counter(kernel["instructions"])})
            for name, kernel in kernels.items()
        }
        for target, kernels in json.loads(kept.read_text()).items()
    }


def table(found: Census) -> dict[str, list[list[int | None] | None]]:
    """Kernel -> per target, in order, its COLUMNS; None where the kernel is left out."""
    targets = sorted(found, key=_number)
    kernels = sorted({name for kernels in found.values() for name in kernels})

    def row(kernel: Kernel) -> list[int | None] | None:
        return None if kernel.is_trap else [kernel.registers, kernel.stack, kernel.shared, kernel.dynamic]

    return {name: [row(found[target][name]) for target in targets] for name in kernels}


def resources(found: Census) -> str:
    """The text of resources.json: one line a kernel."""
    head = {
        "nvcc": toolchain.cuda_version(),
        "columns": COLUMNS,
        "targets": sorted(found, key=_number),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in table(found).items()]
    text = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    return "{\n" + text + ' "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n"


def blocks_per_sm(library: Path) -> Mapping[str, int]:
    """Kernel -> how many of its blocks are to run on an SM at once: the second of its launch bounds, from the PTX."""
    cuobjdump = str(toolchain.cuda_program("cuobjdump"))
    found: dict[str, int] = {}
    for line in _lines(cuobjdump, "--dump-ptx", str(library)):
        if match := re.search(r"\.entry (\w+)", line):
            kernel = match[1]
        elif match := re.match(r"\.minnctapersm (\d+)", line):
            found[kernel] = int(match[1])
    names = _names(set(found))
    return {names[kernel]: blocks for kernel, blocks in found.items()}


def whole_census() -> Census:
    """The census of both plugin libraries, with what launches ask for."""
    found = {**census(toolchain.build_plugin("x86_64")), **census(toolchain.build_plugin("aarch64"))}
    asked = cuda_launches.dynamic_shared_bytes(cuda_launches.recording_library())
    names = _names({name for kernels in asked.values() for name in kernels})
    for target, kernels in asked.items():
        for name, shared in kernels.items():
            found[target][names[name]].dynamic = shared
    return found


if __name__ == "__main__":
    RESOURCES.write_text(resources(whole_census()))
