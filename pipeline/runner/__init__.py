"""The torch-free runner: bundle in, text out. Nothing in this folder imports torch, onnx, pydantic or yaml."""

from pipeline.runner.canvas import Result
from pipeline.runner.loop import Step, generate
from pipeline.runner.runner import Completion, Runner, TextModel
from pipeline.runner.settings import GenerateOptions, Settings, read_settings

__all__ = [
    "Completion",
    "GenerateOptions",
    "Result",
    "Runner",
    "Settings",
    "Step",
    "TextModel",
    "generate",
    "read_settings",
]
