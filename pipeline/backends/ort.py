"""ONNX Runtime sessions on the CPU; `dllmc` nodes run by their function bodies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.backends.backend import OUTPUTS, Feeds, FullPasses, Record
from pipeline.backends.precheck import precheck
from pipeline.errors import EnvironmentFault, InputRefused, WillNotFit

# Folding unpacks every int4 weight to int8 when the model is loaded: several times faster, twice the memory.
FOLD_BELOW_BYTES = 256 << 20
ELEMENTS = {
    "input_ids": "tensor(int64)",
    "position_ids": "tensor(int64)",
    "kv_len": "tensor(int64)",
    "head_index": "tensor(int64)",
    "logit_bias": "tensor(float)",
    "inv_temp": "tensor(float)",
}


class OrtSession(FullPasses):
    """An opened model with the graph's six inputs and five outputs."""

    def __init__(self, inner: Any, top_k: int) -> None:
        self.inner = inner
        self.top_k = top_k

    def full_pass(self, feeds: Feeds) -> Record:
        if self.inner is None:
            raise ValueError("this session was closed")
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        try:
            outputs = self.inner.run(list(OUTPUTS), feeds.as_dict())
        except state.RuntimeException as fault:
            if "alloc" in str(fault).lower():
                raise WillNotFit(f"not enough memory for a pass of {feeds.input_ids.shape} ids: {fault}") from None
            raise
        return Record(**dict(zip(OUTPUTS, outputs, strict=True)))

    def close(self) -> None:
        self.inner = None


def open_session(path: Path, *, threads: int | None = None, fold: bool | None = None) -> OrtSession:
    """Pre-check and open a model; `threads` None takes every core, `fold` None decides by the size of the model.

    Raises InputRefused for a file that is unsafe, damaged or has another signature, EnvironmentFault without ORT.
    """
    precheck(path)
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as fault:
        raise EnvironmentFault(
            f"onnxruntime cannot be imported ({fault}); install it: pip install onnxruntime"
        ) from None
    if fold is None:
        fold = folds(path)
    try:
        inner = onnxruntime.InferenceSession(
            os.path.abspath(path),
            sess_options=session_options(threads),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[] if fold else ["ConstantFolding"],
        )
    except _load_faults(state) as fault:
        if "bad_alloc" in str(fault):
            raise WillNotFit(f"{path} does not fit the memory: {fault}") from None
        raise InputRefused(f"{path} cannot be run by ONNX Runtime {onnxruntime.__version__}: {fault}") from None
    return OrtSession(inner, _top_k_of(inner, path))


def _load_faults(state: Any) -> tuple[type[Exception], ...]:
    names = "Fail InvalidArgument InvalidGraph InvalidProtobuf NoSuchFile NotImplemented RuntimeException"
    return tuple(getattr(state, name) for name in names.split())


def folds(path: Path) -> bool:
    """Whether the model at `path`, its one data file included, is small enough to fold constants in it."""
    files = (path, path.with_name(f"{path.name}.data"))
    return sum(file.stat().st_size for file in files if file.is_file()) < FOLD_BELOW_BYTES


def session_options(threads: int | None) -> Any:
    """The options of every session of ours; `threads` None takes every core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # A memory plan is kept for every shape seen; canvases have many, and a plan saves little.
    options.enable_mem_pattern = False
    # Else ORT computes int4 linears with int8 activations, which is not what the graph says.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    # Weights outside the arena: it rounds up to powers of two.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


def _top_k_of(inner: Any, path: Path) -> int:
    found = {value.name: value.type for value in inner.get_inputs()}
    if found != ELEMENTS:
        raise InputRefused(f"{path} has inputs {found}; expected {ELEMENTS}")
    shapes = {value.name: value.shape for value in inner.get_outputs()}
    if missing := [name for name in OUTPUTS if name not in shapes]:
        raise InputRefused(f"{path} has no output {missing[0]}; expected {', '.join(OUTPUTS)}")
    top_k = shapes["top_ids"][-1] if shapes["top_ids"] else None
    if not isinstance(top_k, int):
        raise InputRefused(f"{path}: top_ids has shape {shapes['top_ids']}; expected a fixed number of ids last")
    return top_k
