"""The torch-free runner: bundle in, text out. Nothing in this folder imports torch, onnx, pydantic or yaml."""

from pipeline.runner.loop import Engine, denoise, generate
from pipeline.runner.results import Block, Done, Event, Request, Result, Step
from pipeline.runner.runner import Completion, Piece, Runner, TextModel
from pipeline.runner.settings import GenerateOptions, Settings, read_settings

__all__ = [
    "Block",
    "Completion",
    "Done",
    "Engine",
    "Event",
    "GenerateOptions",
    "Piece",
    "Request",
    "Result",
    "Runner",
    "Settings",
    "Step",
    "TextModel",
    "denoise",
    "generate",
    "read_settings",
]
