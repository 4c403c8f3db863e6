"""Runs in a process of its own over one of TensorRT's runtimes: what that finds in the plugin library, as JSON.

runtime.py MODULE LIBRARY create PLUGIN JSON      makes a plugin from integers and floats
runtime.py MODULE LIBRARY build MODEL PROFILES    parses the ONNX model and builds its .engine, without a GPU
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def create(trt: Any, plugin: str, given: str) -> dict[str, Any]:
    """Which plugins there are, and whether this one is made from these attributes."""
    registry = trt.get_plugin_registry()
    found = [c.name for c in registry.all_creators if (c.plugin_namespace, c.plugin_version) == ("dllmc", "1")]
    fields = [
        trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
        if isinstance(value, float)
        else trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
        for name, value in json.loads(given).items()
    ]
    creator = registry.get_creator(plugin, "1", "dllmc")
    made = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    return {"found": found, "fields": [field.name for field in creator.field_names], "made": made is not None}


def add_profile(builder: Any, network: Any, config: Any, sizes: dict[str, int]) -> None:
    """From 1 up to `sizes` for the two axes that a model leaves open, B and Q."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        largest = tuple(sizes["BQ"[axis]] if size < 0 else size for axis, size in enumerate(tensor.shape))
        least = tuple(max(size, 1) if size < 0 else size for size in tensor.shape)
        profile.set_shape(tensor.name, least, largest, largest)
    config.add_optimization_profile(profile)


def build(trt: Any, model: str, profiles: str) -> dict[str, Any]:
    """The plugin layers that the parser makes of the model, and its engine."""
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network()
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(model):
        return {"errors": [str(parser.get_error(i)) for i in range(parser.num_errors)]}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    tensors = [layer.get_output(i) for layer in plugins for i in range(layer.num_outputs)]
    described = {tensor.name: [tensor.dtype.name, list(tensor.shape)] for tensor in tensors}
    config = builder.create_builder_config()
    for sizes in json.loads(profiles):
        add_profile(builder, network, config, sizes)
    engine = builder.build_serialized_network(network, config)
    Path(model).with_suffix(".engine").write_bytes(b"" if engine is None else engine)
    return {
        "plugins": [layer.name for layer in plugins],
        "tensors": described,
        "outputs": [network.get_output(i).name for i in range(network.num_outputs)],
    }


def main(module: str, library: str, command: str, *words: str) -> None:
    """Load the library into the runtime and do what is asked."""
    trt = importlib.import_module(module)
    trt.get_plugin_registry().load_library(str(Path(library).resolve()))
    json.dump({"create": create, "build": build}[command](trt, *words), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
