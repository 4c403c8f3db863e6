"""What the machine can compute: the custom ops, each with its torch reference and its meaning in standard ONNX.

Importing this package registers the ops as `torch.ops.dllmc.*`.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from plugins import functions
from plugins.attend import ATTEND
from plugins.cache_update import CACHE_UPDATE
from plugins.dequantize import DEQUANTIZE
from plugins.dequantize_rows import DEQUANTIZE_ROWS
from plugins.fake_quant import FAKE_QUANT
from plugins.guide import GUIDE
from plugins.head import HEAD
from plugins.int4_linear import INT4_LINEAR
from plugins.int8_linear import INT8_LINEAR
from plugins.log_probability import LOG_PROBABILITY
from plugins.op import Op
from plugins.pack import PACK
from plugins.prepare import PREPARE
from plugins.quantize import QUANTIZE
from plugins.record import RECORD
from plugins.rotate import ROTATE

OPS: dict[str, Op] = {
    "quantize": QUANTIZE,
    "int4_linear": INT4_LINEAR,
    "int8_linear": INT8_LINEAR,
    "head": HEAD,
    "record": RECORD,
    "log_probability": LOG_PROBABILITY,
    "guide": GUIDE,
    "rotate": ROTATE,
    "fake_quant": FAKE_QUANT,
    "dequantize": DEQUANTIZE,
    "prepare": PREPARE,
    "pack": PACK,
    "dequantize_rows": DEQUANTIZE_ROWS,
    "cache_update": CACHE_UPDATE,
    "attend": ATTEND,
}

_OVERLOADS: dict[str, torch._ops.OpOverload] = {name: op.overload for name, op in OPS.items()}


def translation_table() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`: how each op becomes a node."""
    return {_OVERLOADS[name]: op.translation() for name, op in OPS.items() if op.onnx_type}


def attach_functions(model: ir.Model) -> int:
    """Give every `dllmc` node its variant, types and function body; returns how many nodes were met."""
    return functions.attach_functions(model, OPS)
