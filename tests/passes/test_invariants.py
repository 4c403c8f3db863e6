"""Every check lets a sound graph through and names the node or weight that breaks it."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.invariants import check_float, check_lowered, check_quantized
from tests.passes.sketch import Sketch, aten, ops


def quantised(codes: Tensor, *, bits: int = 4, fake: bool = True, zero: Tensor | None = None) -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    x = sketch(ops.fake_quant.default, x, 8, True, 0, 1.0, 1.0) if fake else x
    stored = sketch.weight("head.codes", codes), sketch.weight("head.w_scale", torch.ones(len(codes), 1))
    zeros = () if zero is None else (sketch.weight("head.w_zero", zero),)
    return sketch.output(sketch(aten.linear.default, x, sketch(ops.dequantize.default, *stored, bits, 0, *zeros)))


def plain(*, fake: bool = False, half: bool = False) -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    x = sketch(ops.fake_quant.default, x, 8, True, 0, 1.0, 1.0) if fake else x
    weight = sketch.weight("blocks.0.attn.o_proj.weight", torch.ones(4, 4))
    weight = sketch(aten.to.dtype, weight, torch.float32) if half else weight
    return sketch.output(sketch(aten.linear.default, x, weight))


def codes(value: int = 7, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.full((4, 4), value, dtype=dtype)


def test_sound_graphs_pass() -> None:
    check_float(plain())
    check_quantized(plain())
    check_lowered(plain())
    for bits, limit in ((3, 3), (4, 7), (8, 127)):
        check_quantized(quantised(codes(limit), bits=bits))
        check_quantized(quantised(codes(-limit), bits=bits))
    check_quantized(quantised(codes().to("meta")))
    check_lowered(quantised(codes(), fake=False))


def test_a_float_graph_has_float_weights() -> None:
    with pytest.raises(ValueError, match=r"weight head\.codes is torch\.int8, expected floating point"):
        check_float(quantised(codes(), fake=False))


def test_a_float_graph_reads_weights_directly() -> None:
    with pytest.raises(ValueError, match="linear_default does not read a weight"):
        check_float(plain(half=True))


def test_quantised_activations_need_quantised_weights() -> None:
    for half in (False, True):
        message = r"blocks\.0\.attn\.o_proj has quantised activations and a float weight"
        with pytest.raises(ValueError, match=message):
            check_quantized(plain(fake=True, half=half))


def test_integer_linears_have_symmetric_weights() -> None:
    zero = torch.zeros(4, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="head has quantised activations and a weight with a zero point"):
        check_quantized(quantised(codes(), zero=zero))


def test_codes_are_stored() -> None:
    graph = quantised(codes())
    (node,) = (node for node in graph.graph.nodes if node.target is ops.dequantize.default)
    with graph.graph.inserting_before(node):
        node.update_arg(1, graph.graph.call_function(aten.neg.default, (node.args[1],)))
    with pytest.raises(ValueError, match="dequantize_default does not read stored codes and scales"):
        check_quantized(graph)


@pytest.mark.parametrize(("bits", "value"), [(4, 8), (4, -8), (3, 4), (8, -128)])
def test_codes_lie_on_their_grid(bits: int, value: int) -> None:
    spoilt = codes(0)
    spoilt[1, 2] = value
    with pytest.raises(ValueError, match=rf"codes head\.codes span .*{value}.*, expected -{2 ** (bits - 1) - 1}\.\."):
        check_quantized(quantised(spoilt, bits=bits))


def test_with_a_zero_there_is_one_code_more() -> None:
    zero = torch.tensor([[-8], [7], [0], [1]], dtype=torch.int8)
    check_quantized(quantised(codes(-8), zero=zero, fake=False))
    check_quantized(quantised(codes(7), zero=zero, fake=False))
    with pytest.raises(ValueError, match=r"codes head\.codes span -9\.\.-9, expected -8\.\.7"):
        check_quantized(quantised(codes(-9), zero=zero, fake=False))
    with pytest.raises(ValueError, match=r"codes head\.w_zero span -7\.\.8, expected -8\.\.7"):
        check_quantized(quantised(codes(), zero=-zero, fake=False))
    with pytest.raises(ValueError, match=r"codes head\.w_zero are torch\.float32, expected int8"):
        check_quantized(quantised(codes(), zero=zero.float(), fake=False))


def test_codes_are_bytes() -> None:
    with pytest.raises(ValueError, match=r"codes head\.codes are torch\.float32, expected int8"):
        check_quantized(quantised(codes(dtype=torch.float32)))


def test_nothing_simulated_is_left_after_lowering() -> None:
    with pytest.raises(ValueError, match="fake_quant_default still simulates quantisation"):
        check_lowered(quantised(codes()))
