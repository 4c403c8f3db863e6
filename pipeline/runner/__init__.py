"""The torch-free runner: bundle in, text out. Nothing in this folder imports torch, onnx, pydantic or yaml."""

from pipeline.runner.canvas import Result
from pipeline.runner.loop import Step, generate
from pipeline.runner.settings import GenerateOptions, Settings, read_settings

__all__ = ["GenerateOptions", "Result", "Settings", "Step", "generate", "read_settings"]
