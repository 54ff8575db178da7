"""ONNX: a file as a Graph. The onnx package parses and checks it; nothing in it is executed and no other folder read.

In: a path.  Out: Graph, whose constants are the file's initializers and what is made of them alone; or a ModelError.

What older opsets say in other words is put into those of the newest: rules.py and moves.py know no versions. Weights
stay in the mapped file until a program packs them.
"""

import math
import mmap
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from math import prod
from pathlib import Path

import numpy as np

from ..errors import BackendUnavailable, CconvError, ModelError
from ..images import Preprocessing
from . import folding, protobuf
from .graph import SHOWN, Constant, Graph, Node, Shape
from .layers import OPERATORS, verify
from .mapped import forget, mapped

#: The oldest opset: 6 has what 7 has, but for legacy broadcasting, which is refused.
OLDEST_OPSET = 6
#: Sizes of an image that a file leaves open: channels where there are two more axes, then every other axis.
OPEN_CHANNELS, OPEN_SIZE = 3, 224
#: The largest file that is read whole: protobuf's own limit.
LARGEST_FILE = 1 << 31
#: Bytes of a tensor that stays in the mapped file; smaller ones are copied, several times until the checker has them,
#: and every page of a copy is a fault.
MAPPED = 1 << 12
#: Operators with a window that moves over their maps.
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
#: Operators of which outputs behind the first may be left out, and are.
_MORE_OUTPUTS = ("Dropout", "BatchNormalization", "MaxPool")
#: What a node may be.
_KNOWN = {*OPERATORS, *folding.FOLD, *folding.OF_SHAPES, "Constant"}
#: AttributeProto.type -> the field that has the value, of those that are numbers, text or a tensor.
_VALUES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
_FLOAT, _TENSOR, _LISTS = 1, 4, (6, 7, 8)
#: ONNX's words -> planning's; what planning's are where there is no axis.
_WORDS = {"strides": "stride", "dilations": "dilation", "group": "groups"}
_NEUTRAL = {"stride": 1, "dilation": 1, "output_padding": 0, "output_shape": 1}
_PADDINGS = {b"VALID": "valid", b"SAME_UPPER": "same", b"SAME_LOWER": "same_lower"}


def read(path: str | os.PathLike) -> Graph:
    """The graph of an ONNX file.

    Raises
    ------
    ModelError
        For a file that is missing, damaged, of an opset that is too old or too new, or that holds what is not
        supported; a node is named with its operator.
    BackendUnavailable
        If the onnx package is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendUnavailable(
            "onnx: expected the onnx package, as `pip install cconv[model]` installs it"
        ) from error
    path = Path(path)
    return verify(_graph(onnx, path), path.name)


def _graph(onnx, path: Path) -> Graph:
    from google.protobuf.message import DecodeError

    try:
        if path.stat().st_size >= LARGEST_FILE:
            raise ModelError(f"{path.name}: expected less than {LARGEST_FILE} bytes, got {path.stat().st_size}")
        file = mapped(path)
        slim, places = protobuf.Reader(file).without(MAPPED)
        model = onnx.load_model_from_string(slim)
        reader = _Reader(onnx, model.graph, _opset(onnx, model), path, file, places)
        _without_large_tensors(model, places)
        _with_types(onnx, model)
        onnx.checker.check_model(model)
    except OSError as error:
        raise ModelError(f"{path.name[:SHOWN]}: expected a file that can be read: {error.strerror}") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, CconvError):
            raise
        text = " ".join(str(error).split())
        raise ModelError(f"{path.name[:SHOWN]}: expected a valid ONNX model: {text[:400]}") from None
    return reader.graph(path.stem, _preprocessing(model, path))


def _preprocessing(model, path: Path) -> Preprocessing | None:
    """What the file's metadata says of it: a name, or an object of Preprocessing's fields as JSON."""
    try:
        return Preprocessing.of({one.key: one.value for one in model.metadata_props}.get("preprocessing") or None)
    except CconvError as error:
        raise ModelError(f"{path.name[:SHOWN]}: {error!s:.200}") from None


def _without_large_tensors(model, places: list[protobuf.Place | None]) -> None:
    """Initializers that have been read become inputs: the checker gets a copy of the model, and needs no weights."""
    graph = model.graph
    named = {value.name for value in graph.input}
    for i, (tensor, place) in reversed(list(enumerate(zip(graph.initializer, places, strict=True)))):
        mapped = place and not tensor.HasField("raw_data")
        if not mapped and tensor.ByteSize() < MAPPED and not len(tensor.external_data):
            continue
        if tensor.name not in named:
            kind = graph.input.add(name=tensor.name).type.tensor_type
            kind.elem_type = tensor.data_type
            kind.shape.SetInParent()  # the checker wants one, nothing reads it
            named.add(tensor.name)
        del graph.initializer[i]


def _with_types(onnx, model) -> None:
    """Outputs that were added by name alone, the usual way to get at an inner tensor, lack a type or a shape. The
    checker wants both, nothing here reads them."""
    for value in model.graph.output:
        if not value.HasField("type"):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()


def _opset(onnx, model) -> int:
    newest = onnx.defs.onnx_opset_version()
    versions = [one.version for one in model.opset_import if one.domain in ("", "ai.onnx")]
    if len(versions) != 1 or not OLDEST_OPSET <= versions[0] <= newest:
        raise ModelError(f"opset: expected one from {OLDEST_OPSET} to {newest}, got {versions}")
    return versions[0]


@lru_cache(maxsize=32)
def _dtype(number: int) -> np.dtype:
    """The type that a TensorProto's number stands for, as files have it; KeyError if it is none of NumPy's."""
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(number)).newbyteorder("<")


def _external(tensor, folder: Path) -> tuple[Path, int, int | None]:
    """Where a tensor's bytes lie: a file in the model's own folder or below, an offset and a length."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    base = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(base / location))
    if not location or Path(location).is_absolute() or base not in target.parents or not target.is_file():
        raise ModelError(
            f"tensor {tensor.name[:SHOWN]!r}: expected external data in a file of the model's folder, "
            f"got {location[:SHOWN]!r}"
        )
    try:
        offset, length = int(entries.get("offset", 0)), entries.get("length")
        length = None if length is None else int(length)
    except ValueError:
        raise ModelError(f"tensor {tensor.name[:SHOWN]!r}: expected an offset and a length that are integers") from None
    return target, offset, length


class _Reader:
    """A GraphProto on its way to a Graph."""

    def __init__(self, onnx, proto, opset: int, path: Path, file: mmap.mmap, places: list[protobuf.Place | None]):
        self.onnx, self.proto, self.opset, self.path = onnx, proto, opset, path
        self.nodes: list[Node] = []
        if len(proto.sparse_initializer):
            raise ModelError(f"{path.name}: expected initializers that are dense, got sparse ones")
        self.constants = {}
        self.file = file
        for tensor, place in zip(proto.initializer, places, strict=True):
            if tensor.name in self.constants:
                raise ModelError(f"tensor {tensor.name[:SHOWN]!r}: expected a name of its own, got one that is taken")
            self.constants[tensor.name] = self.constant(tensor, place)

    def graph(self, name: str, preprocessing: Preprocessing | None) -> Graph:
        given, batch, shape = self.image()
        self.outputs = tuple(output.name for output in self.proto.output)
        for node in self.proto.node:
            try:
                self.node(node)
            except (TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError) as error:
                text = str(error) if isinstance(error, CconvError) else f"expected attributes that fit: {error!s:.200}"
                raise ModelError(f"{_named(node)}: {text}") from None
        used = {name for node in self.nodes for name in node.inputs}
        constants = {name: constant for name, constant in self.constants.items() if name in used}
        producer = f" by {self.proto.name[:SHOWN]}" if self.proto.name else ""
        return Graph(
            name, f"ONNX, opset {self.opset}{producer}.", shape, tuple(self.nodes), self.outputs, constants, given,
            batch, partial(forget, self.file), preprocessing,
        )  # fmt: skip

    def image(self) -> tuple[str, int, Shape]:
        """The only input that is no initializer: its name, images a run, and one image's shape."""
        free = [value for value in self.proto.input if value.name not in self.constants]
        if len(free) != 1:
            names = ", ".join(value.name for value in free)[:SHOWN]
            raise ModelError(f"{self.path.name}: expected one input beside the initializers, got {names or 'none'}")
        (value,) = free
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type != self.onnx.TensorProto.FLOAT:
            raise ModelError(f"input {value.name[:SHOWN]!r}: expected a tensor of float32, got another type")
        if not kind.HasField("shape") or not len(kind.shape.dim):
            raise ModelError(f"input {value.name[:SHOWN]!r}: expected a shape of one axis or more, got none")
        batch, *sizes = (dim.dim_value for dim in kind.shape.dim)
        if len(sizes) == 3 and sizes[0] == 0:
            sizes[0] = OPEN_CHANNELS
        if sizes and sizes[0] < 1:
            raise ModelError(f"input {value.name[:SHOWN]!r}: expected a number of channels, got {sizes[0] or 'none'}")
        shape = tuple(size or OPEN_SIZE for size in sizes)
        if batch < 0 or min(shape, default=1) < 1 or prod(shape) * max(batch, 1) >= 2**31:
            raise ModelError(f"input {value.name[:SHOWN]!r}: expected 1 to 2^31 elements, got {(batch, *sizes)!s:.200}")
        return value.name, max(batch, 1), shape

    def constant(self, tensor, place: tuple[int, int] | None = None) -> Constant:
        """A tensor, which may lie at some place of the file; its bytes must be as many as its shape promises."""
        name, shape, onnx = tensor.name, tuple(tensor.dims), self.onnx
        named = f"tensor {name[:SHOWN]!r}"
        try:
            dtype = _dtype(tensor.data_type)
        except KeyError:
            raise ModelError(f"{named}: expected numbers, got element type {tensor.data_type}") from None
        if dtype.kind not in "fiub" or (shape and min(shape) < 0) or tensor.HasField("segment"):
            raise ModelError(f"{named}: expected a dense tensor of numbers, got {dtype} of shape {shape!s:.200}")
        nbytes = prod(shape) * dtype.itemsize
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            array = self.mapped(tensor, nbytes, shape, dtype, named)
        elif place:
            if place[1] - place[0] != nbytes:
                raise ModelError(f"{named}: expected {nbytes} bytes for {shape}, got {place[1] - place[0]}")
            array = np.ndarray(shape, dtype, self.file, place[0])
            if nbytes < MAPPED:
                array = array.copy()
        elif tensor.HasField("raw_data"):
            raw = tensor.raw_data
            if len(raw) != nbytes:
                raise ModelError(f"{named}: expected {nbytes} bytes for {shape}, got {len(raw)}")
            array = np.ndarray(shape, dtype, raw)
        else:
            if nbytes > 16 * tensor.ByteSize():
                raise ModelError(f"{named}: expected {prod(shape)} numbers, got a tensor of {tensor.ByteSize()} bytes")
            try:
                array = onnx.numpy_helper.to_array(tensor).reshape(shape)
            except (ValueError, TypeError) as error:
                raise ModelError(f"{named}: expected {prod(shape)} numbers: {error!s:.200}") from None
        return Constant.of(array, name)

    def mapped(self, tensor, nbytes: int, shape: Shape, dtype: np.dtype, named: str) -> np.ndarray:
        target, offset, length = _external(tensor, self.path.parent)
        there = target.stat().st_size
        if length not in (None, nbytes) or offset < 0 or offset + nbytes > there:
            raise ModelError(f"{named}: expected {nbytes} bytes in {target.name}, got {length} at {offset} of {there}")
        if not nbytes:
            return np.empty(shape, dtype)
        return np.memmap(target, dtype, "r", offset, shape)

    def node(self, proto) -> None:
        operator = proto.op_type
        if proto.domain not in ("", "ai.onnx") or operator not in _KNOWN:
            domain = f"{proto.domain[:SHOWN]}." if proto.domain else ""
            raise ModelError(f"expected an operator of {', '.join(OPERATORS)}, got {domain}{operator[:SHOWN]}")
        options = dict(self.attributes(proto))
        inputs, outputs = tuple(proto.input), tuple(proto.output)
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        options, inputs = self.in_new_words(operator, options, inputs)
        if operator == "Constant":
            self.constants[outputs[0]] = Constant.of(_value_of(options), outputs[0])
        elif operator == "Split":
            for index, output in enumerate(outputs):
                self.add(output, operator, inputs, {**options, "index": index, "count": len(outputs)})
        else:
            if len([name for name in outputs if name]) > 1 and operator not in _MORE_OUTPUTS:
                raise ModelError(f"expected one output, got {len(outputs)}")
            self.add(outputs[0], operator, inputs, options)

    def add(self, name: str, operator: str, inputs: tuple[str, ...], options: dict) -> None:
        """A node; one that no image changes becomes a constant, unless it is asked for."""
        folds = operator in folding.FOLD and name not in self.outputs
        if folds and inputs and all(one in self.constants or not one for one in inputs):
            arrays = [self.constants[one].read() if one else None for one in inputs]
            self.constants[name] = Constant.of(folding.fold(operator, options, arrays), name)
        else:
            self.nodes.append(Node(name, operator, inputs, options))

    def attributes(self, proto) -> Iterator[tuple[str, object]]:
        for attribute in proto.attribute:
            name, kind = attribute.name, attribute.type
            if kind not in _VALUES or attribute.ref_attr_name:
                raise ModelError(f"expected attributes that are values, got {name[:SHOWN]!r}")
            value = getattr(attribute, _VALUES[kind])
            if kind == _TENSOR:
                value = self.constant(value).read()
            elif kind == _FLOAT and not math.isfinite(value) and name not in ("min", "max", "value"):
                raise ModelError(f"expected a finite number as {name[:SHOWN]}, got {value}")
            yield name, list(value) if kind in _LISTS else value

    def in_new_words(self, operator: str, options: dict, inputs: tuple) -> tuple[dict, tuple]:
        """Options and inputs as the newest opset and planning's specs have them."""
        if operator in _WINDOWED:
            return _windows(operator, options), inputs
        if operator == "BatchNormalization":
            training = options.get("training_mode") or (self.opset < 7 and not options.get("is_test"))
            if training or not options.get("spatial", 1):
                raise ModelError("expected running statistics per channel, not those of a batch")
        if operator == "Dropout" and len(inputs) == 3 and self.training(inputs[2]):
            raise ModelError("expected inference, got training_mode")
        if operator in ("Add", "Sub", "Mul", "Div") and self.opset < 7 and "axis" in options:
            raise ModelError("expected operands that spread as NumPy's, got the axis of an old opset")
        if operator == "PRelu" and self.opset < 7:
            options["per_channel"] = True
        if operator == "Softmax" and self.opset < 13:
            options["flat"] = True
        if operator == "Upsample" or (operator == "Resize" and self.opset < 11):
            words = {"coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
            return {**options, **words}, inputs if len(inputs) < 2 else (inputs[0], "", inputs[1])
        return options, inputs

    def training(self, name: str) -> bool:
        return name not in self.constants or bool(self.constants[name].read().any())


def _named(node) -> str:
    name = node.name or next(iter(node.output), "")
    return f"node {name[:SHOWN]!r} ({node.op_type[:SHOWN]})"


def _value_of(options: dict) -> np.ndarray:
    """What a Constant holds."""
    if "value" in options:
        return options["value"]
    for word, dtype in (("float", np.float32), ("floats", np.float32), ("int", np.int64), ("ints", np.int64)):
        if f"value_{word}" in options:
            return np.array(options[f"value_{word}"], dtype)
    raise ModelError(f"expected a value of numbers, got {', '.join(options)[:SHOWN] or 'none'}")


def _windows(operator: str, options: dict) -> dict:
    """Of a convolution or pool, along one axis or two: planning's words, with one row where there is one axis."""
    given = {_WORDS.get(word, word): value for word, value in options.items()}
    mode, pads = given.pop("auto_pad", b"NOTSET"), given.pop("pads", None)
    ranks = {len(given[word]) for word in (*_NEUTRAL, "kernel_shape") if word in given}
    if pads is not None:
        ranks.add(len(pads) / 2)
    if len(ranks) > 1 or not ranks <= {1, 2}:
        raise ModelError(f"expected sizes for one or two axes, the same for all, got {sorted(ranks)}")
    narrow, pool = ranks == {1}, operator.endswith("Pool")
    for word, neutral in _NEUTRAL.items():
        if word in given:
            given[word] = (neutral, *given[word]) if narrow else tuple(given[word])
    kernel = given.get("kernel_shape")
    if pool:
        if kernel is None:
            raise ModelError("expected a kernel_shape, got none")
        del given["kernel_shape"]
        given["kernel_size"] = (1, *kernel) if narrow else tuple(kernel)
        given.setdefault("stride", 1)
        given["ceil_mode"] = bool(given.get("ceil_mode", 0))
        if operator == "AveragePool":
            given["count_include_pad"] = bool(given.get("count_include_pad", 0))
    if mode in _PADDINGS:
        given["padding"] = _PADDINGS[mode]
    elif mode not in (b"NOTSET", b""):
        raise ModelError(f"expected an auto_pad of NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {mode!r:.40}")
    elif pads is not None:
        given["padding"] = (0, pads[0], 0, pads[1]) if narrow else tuple(pads)
    return given
