"""ONNX Runtime sessions on the CPU; `dllmc` nodes run by their function bodies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pipeline.backends.backend import GUIDANCE, OUTPUTS, WRITE_START, Cache, Feeds, Record
from pipeline.backends.ort_cache import (
    Array,
    Layout,
    OrtCache,
    Scratch,
    bind,
    bind_inputs,
    bind_nothing_kept,
    layout_of,
)
from pipeline.backends.precheck import precheck
from pipeline.errors import EnvironmentFault, InputRefused, WillNotFit

# Folding unpacks every int4 weight to int8 when the model is loaded: several times faster, twice the memory.
FOLD_BELOW_BYTES = 256 << 20
ELEMENTS = {
    "input_ids": "tensor(int64)",
    "position_ids": "tensor(int64)",
    WRITE_START: "tensor(int64)",
    "kv_len": "tensor(int64)",
    "head_index": "tensor(int64)",
    "logit_bias": "tensor(float)",
    "inv_temp": "tensor(float)",
}
TOP = ("top_ids", "top_logits")


class OrtSession:
    """An opened model with the graph's inputs and outputs, its caches in this process's memory."""

    cached = True

    def __init__(self, inner: Any, top_k: int, layout: Layout, *, guided: bool = False) -> None:
        self.inner = inner
        self.guided = guided  # rows are pairs, and the record has a row for each pair
        self.top_k = top_k
        self.layout = layout
        self.scratch = Scratch()
        # Binding the memory of many layers takes longer than the small inputs: once for each range of a cache's rows.
        self.bindings: WeakKeyDictionary[OrtCache, dict[tuple[int, int], Any]] = WeakKeyDictionary()

    def allocate(self, batch: int, slots: int) -> OrtCache:
        """An empty cache for this session; raises WillNotFit."""
        cache = OrtCache(self.layout, batch, slots)
        self.bindings[cache] = {}
        return cache

    def run(self, feeds: Feeds, cache: Cache | None = None, *, first_row: int = 0) -> Record:
        if self.inner is None:
            raise ValueError("this session was closed")
        if (feeds.guidance is not None) != self.guided:
            raise ValueError(f"guidance is {feeds.guidance}; this graph is {'' if self.guided else 'not '}guided")
        batch, query = feeds.input_ids.shape
        start = np.zeros(batch, np.int64) if feeds.write_start is None else feeds.write_start
        if cache is None:
            if first_row or start.any():
                raise ValueError(
                    f"a pass without a cache starts at row 0 and slot 0; got row {first_row} and slots {start.tolist()}"
                )
            binding, windows = self.inner.io_binding(), {}
            bind_nothing_kept(binding, self.layout, self.scratch, batch, query)
        else:
            if not isinstance(cache, OrtCache) or cache not in self.bindings:
                raise ValueError("this cache was allocated by another session")
            cache.check(first_row, batch, start, query)
            binding = self._bind_rows(cache, first_row, batch)
            windows = {} if self.layout.in_place else self._bind_windows(binding, batch, query)
        strength = {} if feeds.guidance is None else {GUIDANCE: feeds.guidance}
        record = self._run(binding, feeds.as_dict() | {WRITE_START: start} | strength)
        if isinstance(cache, OrtCache) and windows:
            cache.place(windows, first_row, start)
        return record

    def _bind_rows(self, cache: OrtCache, first_row: int, rows: int) -> Any:
        bindings = self.bindings[cache]
        if (first_row, rows) not in bindings:
            binding = bindings[first_row, rows] = self.inner.io_binding()
            for part in self.layout.parts:
                array = cache.arrays[part.past][first_row : first_row + rows]
                bind(binding.bind_input, part.past, array)
                if self.layout.in_place:
                    bind(binding.bind_output, part.present, array)
        return bindings[first_row, rows]

    def _bind_windows(self, binding: Any, batch: int, query: int) -> dict[str, Array]:
        windows = {
            part.present: self.scratch.array(part.present, part.shape(batch, query), part.dtype)
            for part in self.layout.parts
        }
        for name, array in windows.items():
            bind(binding.bind_output, name, array)
        return windows

    def _run(self, binding: Any, inputs: dict[str, Array]) -> Record:
        held = bind_inputs(binding, inputs)
        rows = len(held.get(GUIDANCE, held["head_index"])), held["head_index"].shape[1]
        outputs = {
            name: np.empty((*rows, self.top_k) if name in TOP else rows, np.int64 if name == "top_ids" else np.float32)
            for name in OUTPUTS
        }
        for name, array in outputs.items():
            bind(binding.bind_output, name, array)
        run_bound(self.inner, binding, held["input_ids"].shape)
        return Record(**outputs)

    def close(self) -> None:
        self.inner = None
        self.bindings.clear()
        self.scratch = Scratch()


def run_bound(inner: Any, binding: Any, shape: tuple[int, ...]) -> None:
    """One pass over ids of this shape on the memory that is bound; raises WillNotFit."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        inner.run_with_iobinding(binding)
    except state.RuntimeException as fault:
        if "alloc" in str(fault).lower():
            raise WillNotFit(f"not enough memory for a pass of {shape} ids: {fault}") from None
        raise


def open_session(path: Path, *, threads: int | None = None, fold: bool | None = None) -> OrtSession:
    """Pre-check and open a model; `threads` None takes every core, `fold` None decides by the size of the model.

    Raises InputRefused for a file that is unsafe, damaged or has another signature, EnvironmentFault without ORT.
    """
    return _checked(open_model(path, threads=threads, fold=fold), path)


def open_model(path: Path, *, threads: int | None = None, fold: bool | None = None) -> Any:
    """The same as ONNX Runtime's own session, whatever its signature."""
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
        return onnxruntime.InferenceSession(
            os.path.abspath(path),
            sess_options=session_options(threads),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[] if fold else ["ConstantFolding"],
        )
    except _load_faults(state) as fault:
        if "bad_alloc" in str(fault):
            raise WillNotFit(f"{path} does not fit the memory: {fault}") from None
        raise InputRefused(f"{path} cannot be run by ONNX Runtime {onnxruntime.__version__}: {fault}") from None


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
    # Between passes the loop needs the core that a waiting worker would spin on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Weights outside the arena: it rounds up to powers of two.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


def checked_layout(inner: Any, path: Path, more: Mapping[str, str]) -> Layout:
    """Of a cached graph's keys and values; raises InputRefused unless its other inputs are ELEMENTS and `more`."""
    layout = layout_of(inner.get_inputs(), inner.get_outputs(), f"{path}")
    pasts = {part.past for part in layout.parts}
    found = {value.name: value.type for value in inner.get_inputs() if value.name not in pasts}
    if found != (expected := {**ELEMENTS, **more}):
        raise InputRefused(f"{path} has inputs {found}; expected {expected}")
    return layout


def _checked(inner: Any, path: Path) -> OrtSession:
    """Raises InputRefused unless inputs and outputs are those of a cached graph."""
    guided = any(value.name == GUIDANCE for value in inner.get_inputs())
    layout = checked_layout(inner, path, {GUIDANCE: "tensor(float)"} if guided else {})
    shapes = {value.name: value.shape for value in inner.get_outputs()}
    if missing := [name for name in OUTPUTS if name not in shapes]:
        raise InputRefused(f"{path} has no output {missing[0]}; expected {', '.join(OUTPUTS)}")
    top_k = shapes["top_ids"][-1] if shapes["top_ids"] else None
    if not isinstance(top_k, int):
        raise InputRefused(f"{path}: top_ids has shape {shapes['top_ids']}; expected a fixed number of ids last")
    return OrtSession(inner, top_k, layout, guided=guided)
