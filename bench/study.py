"""All methods against each other on both reference models. `python -m bench.study -o DIR [--parts grid draws ...]`

Goes on in DIR where it was stopped. Writes rows and findings of every part to `results/study.json`, the pages to
`results/study.md`; the figures of every level and step, and the pictures, stay in DIR.
"""

from bench.parts import Part, measure_parts
from pipeline.study.grid import QUANTISING
from pipeline.study.subject import Sizes

PARTS = {
    "grid": Part(
        why="Every method at every format, one draw",
        bits=("w8a8", "w4a16", "w3a16", "w4a8", "w4a4"),
        methods=QUANTISING,
    ),
    "draws": Part(
        why="W4A4 by three draws of calibration and rotations",
        bits=("w4a4",),
        methods=QUANTISING,
        seeds="3",
        tasks=("nll", "agreement"),
    ),
    "exact": Part(
        why="Formats that should lose nothing, on 2,000 problems",
        bits=("w8a8", "w4a16"),
        methods=QUANTISING,
        tasks=("match",),
        sizes=Sizes(problems=2000),
    ),
    "clean": Part(
        why="Calibrated on clean text, as the study does",
        bits=("w4a16", "w4a4"),
        methods=tuple(name for name in QUANTISING if name not in ("rtn", "freeact", "star")),
        states="clean",
        tasks=("nll", "agreement"),
    ),
}


if __name__ == "__main__":
    measure_parts("study", PARTS, __doc__)
