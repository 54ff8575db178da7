"""Safetensors: a file of named tensors as a Graph. The safetensors package checks it; its bytes are mapped, not copied.

In: a path, and an architecture whose state dict it is.  Out: Graph, or a ModelError.

The file says nothing of layers: these are an architecture's, by torchvision's names, or come as JSON in its metadata:

    architecture    a name, used where the caller gives none
    graph           {"input_shape": [3, 224, 224], "nodes": [{"name", "operator", "inputs", "options"}], "outputs": []}
    preprocessing   a name, or an object of Preprocessing's fields

A node's inputs are earlier nodes, tensors of the file, or "input"; its options are those of `graph.Node`.
"""

import difflib
import json
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from math import isfinite, prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ArgumentError, BackendUnavailable, ModelError
from ..images import Preprocessing
from . import architectures
from .graph import SHOWN, Constant, Graph, Node, Shape
from .layers import verify
from .mapped import forget, mapped

#: Bytes of a header, which is parsed: that of a network of a thousand layers has some 200 thousand.
LARGEST_HEADER = 1 << 24
#: The format's element types as NumPy's; bfloat16 is the upper half of a float32.
TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
#: Those that are weights, the two short ones exactly; and those that a graph's shapes may have.
FLOATS, INTEGERS = ("F32", "F16", "BF16"), ("I64", "I32")
#: Names of old DenseNet files: norm.1 for norm1.
_OLD_NAME = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)")
#: Options of nodes that are words of planning; all other words are ONNX's, which are bytes.
_WORDS = ("padding",)


class Tensor(NamedTuple):
    """Where a tensor of a file lies."""

    file: mmap.mmap
    dtype: str
    shape: Shape
    begin: int

    def read(self) -> np.ndarray:
        """The array: a view of the file, but for the types that are converted."""
        count, dtype = prod(self.shape), TYPES[self.dtype]
        flat = np.frombuffer(self.file, dtype, count, self.begin) if count else np.empty(0, dtype)
        if self.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype == "F16":
            flat = flat.astype(np.float32)
        return flat.reshape(self.shape)

    def constant(self, name: str) -> Constant:
        dtype = "float32" if self.dtype in FLOATS else np.dtype(TYPES[self.dtype]).name
        return Constant(name, self.shape, self.read, dtype)


def read(path: str | os.PathLike, architecture: str | None = None) -> Graph:
    """The graph of a safetensors file.

    Raises
    ------
    ModelError
        For a file that is missing or damaged, and for tensors that are not the architecture's.
    ArgumentError
        For an unknown architecture; the text has the nearest names.
    BackendUnavailable
        If the safetensors package is not installed.
    """
    path = Path(path)
    if architecture is not None:
        _known(architecture, ArgumentError)
    tensors, metadata, file = _opened(path)
    given = metadata.get("preprocessing")
    if architecture is None and "architecture" not in metadata:
        if "graph" not in metadata:
            raise ModelError(
                f"{path.name[:SHOWN]}: expected an architecture, as in load(..., architecture='resnet50'), "
                "or a graph in the file's metadata, got neither"
            )
        graph = verify(_described(path, tensors, metadata["graph"]), path.name)
    else:
        name = architecture or _known(metadata["architecture"], ModelError)
        graph = _of_architecture(path, tensors, name)
        given = architectures.ARCHITECTURES[name].preprocessing if given is None else given
    try:
        preprocessing = Preprocessing.of(_json(given) if given and given.startswith("{") else given)
    except (ArgumentError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name[:SHOWN]}: {error!s:.200}") from None
    return replace(graph, forget=partial(forget, file), preprocessing=preprocessing)


def _known(name: str, kind: type[Exception]) -> str:
    known = list(architectures.ARCHITECTURES)
    if name not in known:
        shown = name[:SHOWN] if isinstance(name, str) else type(name).__name__
        close = ", ".join(difflib.get_close_matches(shown, known, n=3, cutoff=0.3))
        nearest = f"; the closest are {close}" if close else ""
        raise kind(f"architecture: expected one of {', '.join(known)}, got {shown!r}{nearest}")
    return name


def _json(text: str) -> object:
    """JSON without the numbers that Python adds to it."""

    def refuse(word):
        raise ValueError(f"expected JSON, got {word}")

    return json.loads(text, parse_constant=refuse)


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str], mmap.mmap]:
    """Every tensor of a file, its metadata, its bytes; all that a header says has been checked."""
    try:
        import safetensors
    except ImportError as error:
        raise BackendUnavailable(
            "safetensors: expected the safetensors package, as `pip install cconv[model]` installs it"
        ) from error
    named = path.name[:SHOWN]
    try:
        file = mapped(path)
        length = int.from_bytes(file[:8], "little")
        if not 2 <= length <= min(LARGEST_HEADER, len(file) - 8):
            raise ModelError(
                f"{named}: expected a header of 2 to {LARGEST_HEADER} bytes in the file, "
                f"got {length} in {len(file)} bytes"
            )
        with safetensors.safe_open(path, "numpy"):  # an error unless the header is whole and fits the file
            header = _json(file[8 : 8 + length].decode())
    except OSError as error:
        raise ModelError(f"{named}: expected a file that can be read: {error.strerror}") from None
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{named}: expected a valid safetensors file: {error!s:.200}") from None
    metadata, tensors = header.pop("__metadata__", None) or {}, {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in TYPES:
            raise ModelError(f"tensor {name[:SHOWN]!r}: expected a type of {', '.join(TYPES)}, got {dtype!s:.20}")
        if (
            not 0 <= begin <= end <= len(file) - 8 - length
            or end - begin != prod(shape) * np.dtype(TYPES[dtype]).itemsize
        ):
            raise ModelError(f"tensor {name[:SHOWN]!r}: expected {shape!s:.200} of {dtype}, got {end - begin} bytes")
        tensors[name] = Tensor(file, dtype, shape, 8 + length + begin)
    return tensors, metadata, file


def _compared(path: Path, wanted: Iterable[str], given: Iterable[str], owner: str) -> None:
    """A ModelError unless both are the same names."""
    wanted, given = dict.fromkeys(wanted), dict.fromkeys(given)
    missing, unexpected = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    told = [f"{len(names)} {word} ({_listed(names)})" for word, names in
            (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
    if told:
        raise ModelError(f"{path.name[:SHOWN]}: expected the {len(wanted)} tensors of {owner}, got {', '.join(told)}")


def _listed(names: list[str]) -> str:
    return ", ".join(name[:SHOWN] for name in names[:3]) + ", ..." * (len(names) > 3)


def _of_architecture(path: Path, tensors: dict[str, Tensor], name: str) -> Graph:
    """A state dict as torchvision writes it; the last layer may have any number of classes."""
    given = {}
    for key, tensor in tensors.items():
        # What a batch norm counts in training, and nothing else, is not part of the network.
        if key.rpartition(".")[2] != "num_batches_tracked":
            given[_OLD_NAME.sub(r"\1\2", key)] = tensor
    make = partial(architectures.build, name, lambda key, shape: given[key].read(), f"of {path.name[:SHOWN]}")
    graph = make()
    _compared(path, graph.constants, given, name)
    last = given[next(reversed(graph.constants))].shape
    if len(last) == 1 and 0 < last[0] < 2**24:
        graph = make(classes=last[0])
    for key, constant in graph.constants.items():
        tensor = given[key]
        if tensor.shape != constant.shape:
            raise ModelError(f"tensor {key!r}: expected shape {constant.shape} for {name}, got {tensor.shape!s:.200}")
        if tensor.dtype not in FLOATS:
            raise ModelError(f"tensor {key!r}: expected weights of {', '.join(FLOATS)}, got {tensor.dtype}")
    return graph


def _described(path: Path, tensors: dict[str, Tensor], text: str) -> Graph:
    """The graph that a file's metadata has."""
    where = f"{path.name[:SHOWN]}: graph"
    try:
        described = _json(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: expected JSON: {error!s:.200}") from None
    if not isinstance(described, dict) or not {"input_shape", "nodes", "outputs"} <= set(described):
        raise ModelError(f"{where}: expected an object of input_shape, nodes and outputs, got {_kind(described)}")
    shape, nodes, outputs = (described[word] for word in ("input_shape", "nodes", "outputs"))
    if not _is_list(shape, int) or min(shape, default=0) < 1 or prod(shape) >= 2**31:
        raise ModelError(f"{where}: expected an input_shape of 1 to 2^31 elements, got {shape!s:.200}")
    if not _is_list(nodes, dict) or not nodes or not _is_list(outputs, str):
        raise ModelError(f"{where}: expected a list of nodes and a list of names as outputs")
    made = tuple(_node(node, where) for node in nodes)
    names = {node.name for node in made}
    _compared(
        path, (i for n in made for i in n.inputs if i not in {"", "input"} and i not in names), tensors, "its graph"
    )
    for key, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS, *INTEGERS):
            raise ModelError(f"tensor {key[:SHOWN]!r}: expected {', '.join(FLOATS + INTEGERS)}, got {tensor.dtype}")
    constants = {name: tensor.constant(name) for name, tensor in tensors.items()}
    return Graph(
        path.stem, "A graph in the metadata of its weights.", tuple(shape), made, tuple(outputs), constants
    )  # fmt: skip


def _kind(value: object) -> str:
    return (
        f"{type(value).__name__} of {', '.join(map(str, value))!s:.100}"
        if isinstance(value, dict)
        else str(type(value))
    )


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _node(given: dict, where: str) -> Node:
    name, operator, inputs = given.get("name"), given.get("operator"), given.get("inputs")
    options = given.get("options", {})
    shown = name[:SHOWN] if isinstance(name, str) else name
    if not isinstance(name, str) or not isinstance(operator, str) or not _is_list(inputs, str):
        raise ModelError(f"{where}: expected nodes with a name, an operator and a list of inputs, got {shown!s:.100}")
    if not isinstance(options, dict) or set(given) - {"name", "operator", "inputs", "options"}:
        raise ModelError(f"{where}: node {shown!r}: expected name, operator, inputs and options, got {_kind(given)}")
    return Node(name, operator, tuple(inputs), {word: _option(word, value, where) for word, value in options.items()})


def _option(word: str, value: object, where: str) -> object:
    if isinstance(value, str):
        return value if word in _WORDS else value.encode()
    if isinstance(value, list) and _is_list(value, (int, float)):
        value = tuple(value)
    elif not isinstance(value, (bool, int, float)):
        raise ModelError(f"{where}: expected options that are numbers, words or lists of numbers, got {word[:SHOWN]}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not isfinite(number):
            raise ModelError(f"{where}: expected finite numbers as {word[:SHOWN]}, got {number}")
    return value
