"""Check and measure the kernels on a GPU: `python -m bench.gpu`. Needs torch and nvcc, nothing else of this project."""

from bench.gpu.absent import stand_in

# Before anything here imports `plugins`, whose modules also write ONNX.
stand_in()
