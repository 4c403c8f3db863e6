"""The form of every result file: what was measured, on what machine, with which versions, when."""

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "tokenizers", "transformers")


def processor() -> str:
    """Name and number of the processors this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = lines[0] if lines else name
    return f"{name}, {len(os.sched_getaffinity(0))} processors"


def write_result(name: str, measured: object) -> Path:
    """Write `bench/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": processor(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "measured": measured,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
