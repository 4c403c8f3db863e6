"""Memory does not grow with the depth of the model: twice the blocks, the same peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RESET = Path("/proc/self/clear_refs")

PEAKS = """
import json, re, sys
from pathlib import Path
import torch
from pipeline.calibrate import collect_stats
from pipeline.calibration.states import Sample, make_states
from pipeline.calibration.stream import Means
from pipeline.models.checkpoint import open_checkpoint, write_checkpoint
from pipeline.quantize import write_weights
from pipeline.recipe_file import load_recipe
from tests.pipeline.models.folders import make_config, random_state

torch.set_num_threads(1)
root = Path(sys.argv[1])
sizes = dict(hidden_size=256, intermediate_size=1024, num_heads=4, num_kv_heads=4, head_dim=64)
for layers in (3, 6):
    config = make_config("llada", num_layers=layers, **sizes)
    write_checkpoint(root / str(layers), config, random_state(config))

def peak(layers, stage, workers, disk):
    checkpoint = open_checkpoint(root / str(layers))
    samples = [Sample([(n * k) % 80 for k in range(32)], 0) for n in range(24)]
    states = make_states(samples, checkpoint.config, seed=0, noised=True)
    means = Means(workers=workers, folder=root / "cache" if disk else None)
    Path("/proc/self/clear_refs").write_text("5")
    if stage == "calibrate":
        collect_stats(checkpoint, states, num_buckets=1, on_piece=lambda _: None, means=means)
    else:
        recipe = load_recipe("gptq-w4a16")
        write_weights(checkpoint, recipe, root / "weights", states=states, on_piece=lambda _: None, means=means)
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

ways = [("calibrate", 2, False), ("quantize", 1, True)]
for stage, *_ in ways:
    peak(3, stage, 2, True)  # what is made once
print(json.dumps({stage: [peak(layers, stage, *way) for layers in (3, 6)] for stage, *way in ways}))
"""
BLOCK_BYTES = 4 * (4 * 256 * 256 + 3 * 256 * 1024)


@pytest.mark.skipif(not RESET.exists(), reason="this system does not tell the peak of a part of a process")
def test_twice_the_depth_needs_no_more_memory(tmp_path: Path) -> None:
    """Three more blocks that stayed would be three times the limit."""
    # Freed memory goes back to the system at once, so that a peak is what was alive together.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | at_once,
    )
    for stage, (before, after) in json.loads(done.stdout).items():
        growth = after - before
        assert growth <= BLOCK_BYTES, f"{stage}: the peak rose by {growth} bytes, a block has {BLOCK_BYTES}"
