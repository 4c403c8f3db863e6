"""Check and measure the kernels on this machine's GPU: `python -m bench.gpu`.

Needs torch and nvcc only. Builds the kernels, checks every path against the torch references, then measures; each
section's file grows item by item in --work, so the same command goes on where it stopped. Ends with one line a promise
and writes bench/results/gpu.json. Exit 0: all that was asked for is measured and no line failed; 1: it is, and a line
failed; 2: a wrong option; 3: the budget ended first; 4: nothing can be measured here, and one line says why.
"""

import argparse
import json
import os
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.gpu.ceilings import CEILINGS
from bench.gpu.correctness import CORRECTNESS
from bench.gpu.elementwise import ELEMENTWISE
from bench.gpu.gemm import GEMM
from bench.gpu.loops import LOOPS
from bench.gpu.machine import ROOT, Machine, UnusableError, cuda_machine, emulated_machine
from bench.gpu.passes import PASSES
from bench.gpu.quantized import METHODS
from bench.gpu.sanitizer import SANITIZER
from bench.gpu.section import Plan, measure, read_rows
from bench.gpu.verdicts import Verdict, verdicts

# In the order in which a short session should take them.
SECTIONS = {s.name: s for s in (CORRECTNESS, CEILINGS, GEMM, ELEMENTWISE, PASSES, LOOPS, SANITIZER)}
FAILED, UNFINISHED, UNUSABLE = 1, 3, 4


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    listed = "; ".join(f"{name}: {section.about}" for name, section in SECTIONS.items())
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, epilog=listed)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--budget-s", type=float, default=540.0, help="stop before an item that might not end in time")
    parser.add_argument("--again", action="store_true", help="measure anew what the files already hold")
    parser.add_argument("--methods", default=METHODS[0], help=f"of whole models, some of {','.join(METHODS)}")
    parser.add_argument("--seed", type=int, help="of every random input; drawn and recorded by default")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="folder of the sections' files")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of gpu.json")
    parser.add_argument("--library", type=Path, help="an already built library of kernels")
    parser.add_argument("--every", type=_positive, default=1, help="check only every n-th case")
    parser.add_argument("--emulate", action="store_true", help="host library, tiny sizes: no figure means anything")
    options = parser.parse_args(arguments)
    for option, known in (("only", SECTIONS), ("methods", METHODS)):
        unknown = [name for name in getattr(options, option).split(",") if name not in known]
        if unknown:
            parser.error(f"--{option}: got {unknown[0]!r}, expected some of {','.join(known)}")
    return options


def open_machine(options: argparse.Namespace) -> Machine:
    """The GPU, or its emulation where that is asked for, with a library that loads; raises what `_reason` names."""
    if options.emulate:
        from plugins.toolchain import build_host

        machine = emulated_machine(options.library or build_host())
    elif torch.cuda.is_available():
        machine = cuda_machine(options.library)
    else:
        raise UnusableError("torch sees no CUDA device; `--emulate` runs the host library, for tests only")
    try:
        machine.load(False)
    except (AttributeError, AssertionError) as reason:  # of a library without our functions, of another args.h
        raise UnusableError(f"{machine.library} was not built from these kernels: {reason}") from reason
    return machine


def _reason(error: Exception) -> str:
    """One line: of a compiler that failed, whose command stands first, the line that names the error."""
    command, *said = str(error).splitlines() or [type(error).__name__]
    return next((line for line in said if re.search("error|fatal", line)), said[-1] if said else command)


def collect(machine: Machine, work: Path, names: list[str]) -> tuple[dict[str, object], list[Verdict]]:
    """The content of gpu.json from the sections' files of this machine and these kernels, and the verdicts."""
    files = {name: read_rows(work, name) for name in names}
    known = {name: file for name, file in files.items() if file.get("identity") == machine.identity()}
    complete = [name for name, file in known.items() if file["complete"]]
    judged = verdicts({name: file["rows"] for name, file in known.items()}, machine.arch, complete)
    content: dict[str, object] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine.describe(),
        "verdicts": [verdict.as_json() for verdict in judged],
        "sections": known,
    }
    return content, judged


def main(arguments: list[str] | None = None) -> int:
    started, options = time.monotonic(), _options(arguments)
    try:
        machine = open_machine(options)
        options.work.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError, ValueError) as error:  # no tool, a build that fails, no library, a device refused
        print(f"bench.gpu: {_reason(error)}", file=sys.stderr)
        return UNUSABLE
    seed = int.from_bytes(os.urandom(3), "big") if options.seed is None else options.seed
    plan = Plan(
        machine=machine,
        work=options.work,
        seed=seed,
        deadline=started + options.budget_s,
        methods=tuple(options.methods.split(",")),
        every=options.every,
    )
    print(f"{machine.identity()['device']}, seed {seed}, kernels built in {time.monotonic() - started:.0f} s")
    ended = True
    with torch.no_grad():
        for name in options.only.split(","):
            ended = measure(SECTIONS[name], plan, options.again) and ended
            print(f"{name}: {time.monotonic() - started:.0f} s since the start")
    if machine.emulated:
        print("emulation on a CPU: nothing was timed on a device, and no result is written")
        rows = read_rows(options.work, CORRECTNESS.name)["rows"]
        failed = any(row["wrong"] for row in rows.values())
    else:
        content, judged = collect(machine, options.work, list(SECTIONS))
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / "gpu.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(*judged, path, sep="\n")
        failed = any(verdict.outcome == "fail" for verdict in judged)
    if not ended:
        return UNFINISHED
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
