"""No path, link or number in an ONNX file may lead a runtime outside the bundle."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.backends.precheck import precheck
from pipeline.errors import InputRefused

DATA = "model.onnx.data"


def external(entries: list[tuple[str, str]]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    return tensor


def at(location: str = DATA, offset: str = "0", length: str = "16") -> onnx.TensorProto:
    return external([("location", location), ("offset", offset), ("length", length)])


def graph_of(nodes=(), tensors=(), sparse=()) -> onnx.GraphProto:
    return oh.make_graph(list(nodes), "g", [], [], initializer=list(tensors), sparse_initializer=list(sparse))


def initializer(tensor):
    return oh.make_model(graph_of(tensors=[tensor]))


def attribute(tensor):
    return oh.make_model(graph_of([oh.make_node("Constant", [], ["y"], value=tensor)]))


def attribute_list(tensor):
    node = oh.make_node("Custom", [], ["y"])
    node.attribute.add(name="values", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    return oh.make_model(graph_of([node]))


def subgraph(tensor):
    inner = graph_of(tensors=[tensor])
    return oh.make_model(graph_of([oh.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]))


def graph_list(tensor):
    node = oh.make_node("Custom", [], ["y"])
    node.attribute.add(name="bodies", type=onnx.AttributeProto.GRAPHS).graphs.append(graph_of(tensors=[tensor]))
    return oh.make_model(graph_of([node]))


def function(tensor):
    body = [oh.make_node("Constant", [], ["y"], value=tensor)]
    inner = oh.make_function("dllmc", "F", [], ["y"], body, [oh.make_opsetid("", 21)])
    return oh.make_model(graph_of(), functions=[inner])


def function_default(tensor):
    inner = oh.make_function("dllmc", "F", [], [], [], [oh.make_opsetid("", 21)])
    inner.attribute_proto.append(oh.make_attribute("value", tensor))
    return oh.make_model(graph_of(), functions=[inner])


def sparse(tensor):
    return oh.make_model(graph_of(sparse=[onnx.SparseTensorProto(values=tensor, dims=[8])]))


def sparse_attribute(tensor):
    node = oh.make_node("Constant", [], ["y"])
    found = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    found.sparse_tensor.indices.CopyFrom(tensor)
    return oh.make_model(graph_of([node]))


PLACES = [
    initializer,
    attribute,
    attribute_list,
    subgraph,
    graph_list,
    function,
    function_default,
    sparse,
    sparse_attribute,
]


def write(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "bundle"
    inner.mkdir()
    (inner / DATA).write_bytes(bytes(64))
    (tmp_path / "secret").write_bytes(bytes(64))
    for name in ("a", "sub"):  # so that hostile paths lead somewhere
        (inner / name).mkdir()
        (inner / name / DATA).write_bytes(bytes(64))
    return inner


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_every_place_a_tensor_can_stand_is_walked(folder, place):
    precheck(write(folder, place(at(offset="48"))))
    with pytest.raises(InputRefused, match="not a plain file name"):
        precheck(write(folder, place(at("../secret"))))


def test_what_onnx_itself_saves_is_accepted(folder):
    model = initializer(onnx.numpy_helper.from_array(np.ones((32, 32), np.float32), "w"))
    (folder / DATA).unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=0)
    precheck(folder / "model.onnx")


HOSTILE = [
    "/etc/passwd",
    "../secret",
    "a/../../secret",
    "..",
    ".",
    "",
    "./" + DATA,
    "sub/" + DATA,
    "sub\\" + DATA,
    "..\\secret",
    "C:" + DATA,
    "C:\\secret",
    "\\\\host\\share\\x",
    "//host/share/x",
    "file:///etc/passwd",
    DATA + "\0",
    "\0",
    "a\nb",
    "~/x",
    ".hidden",
    "-",
    "model.onnx.data:stream",
    "x" * 300,
    "\u2025/secret",
    "\uff0fetc\uff0fpasswd",
    "m\u043edel.onnx.data",
    "*/_ORT_MEM_ADDR_/*",
    DATA + " ",
    " " + DATA,
]


@pytest.mark.parametrize("location", HOSTILE, ids=ascii)
def test_hostile_locations_are_refused(folder, location):
    with pytest.raises(InputRefused, match="not a plain file name"):
        precheck(write(folder, initializer(at(location))))


PIECES = st.sampled_from(
    ["..", ".", "/", "\\", "//", "\0", "C:", "a", DATA, "secret", "~", " ", "\u2215", "%2e%2e", "\n", ":", "*", "etc"]
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=30)),
    st.sampled_from([place for place in PLACES if place is not graph_list]),
)
def test_only_the_file_beside_the_model_is_ever_accepted(folder, location, place):
    try:
        precheck(write(folder, place(at(location, length="8"))))
    except InputRefused:
        return
    assert location in (DATA, "model.onnx")


NUMBERS = st.one_of(
    st.integers(0, 80).map(str),
    st.integers(2**31 - 2, 2**66).map(str),
    st.sampled_from(["-1", "", "0x10", "1e3", " 1", "1 ", "+1", "\u0661", "1" * 25, "1.0", "None"]),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NUMBERS, NUMBERS)
def test_only_bytes_inside_the_file_are_accepted(folder, offset, length):
    path = write(folder, initializer(at(offset=offset, length=length)))
    inside = all(t.isascii() and t.isdigit() and len(t) < 20 for t in (offset, length))
    if inside and int(length) > 0 and int(offset) + int(length) <= 64:
        precheck(path)
    else:
        with pytest.raises(InputRefused):
            precheck(path)


def swap(folder: Path, kind: str) -> None:
    data = folder / DATA
    data.unlink()
    if kind == "symlink":
        data.symlink_to(folder.parent / "secret")
    elif kind == "inner symlink":
        (folder / "other").write_bytes(bytes(64))
        data.symlink_to("other")
    elif kind == "hard link":
        os.link(folder.parent / "secret", data)
    elif kind == "fifo":
        os.mkfifo(data)
    elif kind == "folder":
        data.mkdir()
    elif kind == "device":
        data.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["symlink", "inner symlink", "hard link", "fifo", "folder", "device", "absent"])
def test_data_that_is_no_ordinary_file_is_refused(folder, kind):
    path = write(folder, initializer(at()))
    precheck(path)
    swap(folder, kind)
    with pytest.raises(InputRefused, match=r"model\.onnx\.data"):
        precheck(path)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "folder", "absent", "empty"])
def test_a_model_that_is_no_ordinary_file_is_refused(folder, kind):
    path = write(folder, initializer(at()))
    shutil.copy(path, folder / "other.onnx")
    path.unlink()
    if kind == "symlink":
        path.symlink_to("other.onnx")
    elif kind == "hard link":
        os.link(folder / "other.onnx", path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    with pytest.raises(InputRefused, match=r"model\.onnx"):
        precheck(path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputRefused, match="not a folder"):
        precheck(tmp_path / "nowhere" / "model.onnx")


def test_a_bare_name_means_the_working_folder(folder, monkeypatch):
    write(folder, initializer(at()))
    monkeypatch.chdir(folder)
    precheck(Path("model.onnx"))


KEYS = [("location", DATA), ("offset", "0"), ("length", "16")]


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([*KEYS, ("prepacked_0", "x|0;1;2")], "unknown"),
        ([*KEYS, ("__class__", "x")], "unknown"),
        ([*KEYS, ("location", "../secret")], "twice"),
        (KEYS[:2], "whole numbers"),
        ([], "not a plain file name"),
    ],
)
def test_keys_beyond_the_known_ones_are_refused(folder, entries, why):
    with pytest.raises(InputRefused, match=why):
        precheck(write(folder, initializer(external(entries))))


def test_entries_count_even_where_the_tensor_says_it_is_not_external(folder):
    tensor = at("../secret")
    tensor.data_location = onnx.TensorProto.DEFAULT
    with pytest.raises(InputRefused, match="plain file name"):
        precheck(write(folder, initializer(tensor)))


def test_a_second_graph_that_protobuf_would_merge_is_refused(folder):
    good = initializer(at()).SerializeToString()
    with pytest.raises(InputRefused, match="stands twice"):
        precheck(write(folder, good + good))


def test_nesting_without_end_is_refused(folder):
    graph = graph_of(tensors=[at()])
    for _ in range(25):
        graph = graph_of([oh.make_node("If", ["c"], ["y"], then_branch=graph)])
    with pytest.raises(InputRefused, match="within each other"):
        precheck(write(folder, oh.make_model(graph)))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_leaks_a_location_past_the_check(folder, data):
    """Whatever bytes change, a model that passes has only the one location when protobuf reads it."""
    whole = bytearray(subgraph(at()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        precheck(write(folder, bytes(whole)))
    except InputRefused:
        return
    try:
        model = onnx.ModelProto.FromString(bytes(whole))
    except Exception as fault:  # protobuf's error class differs between its implementations
        assert "pars" in str(fault).lower() or "utf" in str(fault).lower()
        return
    for node in model.graph.node:
        for found in node.attribute:
            for tensor in [*found.g.initializer, found.t]:
                for entry in tensor.external_data:
                    assert entry.key != "location" or entry.value in (DATA, "model.onnx")
