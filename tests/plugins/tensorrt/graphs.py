"""ONNX graphs as the TensorRT profile has them: packed INT8 codes and weights, fragment order, no function bodies.

Shape letters: B batch, Q query rows, D hidden, F feed-forward, V vocabulary.
"""

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh

from plugins import OPS
from plugins.op import DOMAIN, PLUGIN

D, F, V = 128, 256, 48
MASK_ID = 7
NAMED_TYPES = {"top_ids": onnx.TensorProto.INT64}


class GraphWriter:
    """Collects nodes; weights are random, since nothing is computed."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._draw = np.random.default_rng(0)

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(onh.from_array(array, name))
        return name

    def floats(self, name: str, *shape: int) -> str:
        return self.constant(name, self._draw.standard_normal(shape).astype(np.float32))

    def codes(self, name: str, *shape: int) -> str:
        return self.constant(name, self._draw.integers(-128, 128, shape).astype(np.int8))

    def dllmc(self, op: str, name: str, inputs: dict[str, str], **numbers: float) -> list[str]:
        """A node of the op with the given inputs; attributes that are not given have the reference's default."""
        declared = OPS[op]
        defaults = {n: p.default for n, p in declared.signature.parameters.items()}
        attributes = declared.attributes({**defaults, **dict.fromkeys(declared.inputs), **inputs, **numbers})
        assert declared.present(attributes) == tuple(inputs)
        outputs = [f"{name}.{output}" for output in declared.outputs(attributes)]
        given = {**attributes, **PLUGIN}
        node = oh.make_node(str(declared.onnx_type), list(inputs.values()), outputs, name, domain=DOMAIN, **given)
        self.nodes.append(node)
        return outputs

    def standard(self, op_type: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(oh.make_node(op_type, list(inputs), [name], f"node_{name}", **attributes))
        return name

    def linear(self, name: str, codes: list[str], outputs: int, inner: int, **more: object) -> str:
        """A linear over a quantiser's outputs; `residual` names a tensor, the rest are attributes."""
        residual = more.pop("residual", None)
        a_bits, w_bits = int(str(more.setdefault("a_bits", 4))), int(str(more.setdefault("w_bits", 4)))
        op = "int4_linear" if w_bits <= 4 else "int8_linear"
        groups = inner // int(str(more.get("a_group") or more.get("w_group") or inner))
        inputs = {"codes": codes[0], "scale": codes[1]}
        inputs |= {"zero": codes[2]} if len(codes) > 2 else {}
        inputs["weight"] = self.codes(f"{name}.weight", outputs, inner // 2 if w_bits <= 4 else inner)
        inputs["w_scale"] = self.floats(f"{name}.w_scale", outputs, groups if more.get("w_group") else 1)
        if len(codes) > 2:
            inputs["w_sum"] = self.constant(f"{name}.w_sum", np.zeros((outputs, groups), np.int32))
        if more.pop("bias", False):
            inputs["bias"] = self.floats(f"{name}.bias", outputs)
        if residual:
            inputs["residual"] = str(residual)
        return self.dllmc(op, name, inputs, **{**more, "a_bits": a_bits, "layout": 1})[0]  # type: ignore[arg-type]

    def model(self, inputs: dict[str, tuple[int, list[int | str]]], outputs: dict[str, int]) -> onnx.ModelProto:
        graph = oh.make_graph(
            self.nodes,
            "plugins",
            [oh.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [oh.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
            self.initializers,
        )
        opsets = [oh.make_opsetid("", 24), oh.make_opsetid(DOMAIN, 1)]
        return oh.make_model(graph, opset_imports=opsets, ir_version=11)


def block() -> onnx.ModelProto:
    """A block with every op in it: FLOAT residual stream, HALF elsewhere, states from the ids, head rows at the end."""
    g = GraphWriter()
    state = g.standard("Cast", "state", g.standard(
        "Equal", "masked", "input_ids", g.constant("mask_id", np.array(MASK_ID, np.int32))
    ), to=onnx.TensorProto.INT32)  # fmt: skip
    factors = {"left": g.floats("left", 8, 8), "right": g.floats("right", 16, 16)}
    normed = {"norm_weight": g.floats("norm", D)}
    q = g.dllmc("quantize", "q1", {"x": "x", **normed, **factors, "state": state}, gate_axis=1, gate_size=1)
    h = g.linear("query", q, D, D, bias=True)
    turn = {"blocks": g.floats("blocks", D // 16, 16, 16), "perm": g.constant("perm", np.arange(D)[::-1].copy())}
    h = g.dllmc("rotate", "turn", {"x": h, **turn})[0]
    tac = {"tac_matrix": g.floats("tac_matrix", D // 16, 16, 16), "tac_bias": g.floats("tac_bias", D)}
    q = g.dllmc("quantize", "q2", {"x": h, **tac}, symmetric=0)
    x = g.linear("output", q, D, D, residual="x")
    q = g.dllmc("quantize", "q3", {"x": x, **normed, "channel_scale": g.floats("channel_scale", D)}, bits=8)
    h = g.linear("gate_up", q, 2 * F, D, a_bits=8, swiglu=1)
    q = g.dllmc("quantize", "q4", {"x": h}, a_group=128)
    x = g.linear("down", q, D, F, a_group=128, w_group=128, residual=x)
    q = g.dllmc("quantize", "q5", {"x": x, **normed}, bits=8)
    x = g.linear("wide", q, D, D, a_bits=8, w_bits=8, residual=x)
    q = g.dllmc("quantize", "q6", {"x": x, **normed}, bits=8)
    inputs = {"codes": q[0], "scale": q[1], "weight": g.codes("head.weight", V, D)}
    inputs |= {
        "w_scale": g.floats("head.w_scale", V, 1),
        "logit_bias": g.floats("head.bias", V),
        "inv_temp": "inv_temp",
    }
    names = g.dllmc("head", "head", inputs, top_k=4, layout=1)
    kinds = [NAMED_TYPES.get(name.removeprefix("head."), onnx.TensorProto.FLOAT) for name in names]
    float32, int32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    fed = {"x": (float32, ["B", "Q", D]), "input_ids": (int32, ["B", "Q"]), "inv_temp": (float32, ["B"])}
    return g.model(fed, dict(zip(names, kinds, strict=True)))
