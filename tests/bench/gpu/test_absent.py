"""The measurements import nothing of this project's dependencies but torch (and numpy, which torch brings)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

# In a fresh process: only torch, numpy and the standard library can be imported.
SCRIPT = """
import importlib.util, sys
import torch
absent = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "safetensors", "tokenizers", "pydantic",
          "yaml", "click", "hypothesis", "pytest"}
assert not absent & set(sys.modules), absent & set(sys.modules)
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in absent else find_spec(name, *rest)
import bench.gpu.__main__
from bench.gpu.absent import PACKAGES
from bench.gpu.kernels import References
assert not (absent & set(sys.modules)) - set(PACKAGES)
codes, scale, _ = References().quantize(torch.ones(2, 128))
print(codes.shape, scale.shape)
"""


def test_only_torch_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "torch.Size([2, 64]) torch.Size([2, 1])"


def test_installed_packages_are_left_alone() -> None:
    import onnx_ir

    from bench.gpu.absent import stand_in

    assert stand_in() == []
    assert sys.modules["onnx_ir"] is onnx_ir
