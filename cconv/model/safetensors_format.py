"""Safetensors: a file of named tensors as a Graph. The safetensors package checks it; its bytes are mapped, not copied.

In: a path, and an architecture whose state dict it is.  Out: Graph, or a ModelError.

The file says nothing of layers: these are an architecture's, by torchvision's names, or come as JSON in its metadata:

    architecture    a name, used where the caller gives none
    graph           {"input_shape": [3, 224, 224], "nodes": [{"name", "operator", "inputs", "options"}], "outputs": []}
    preprocessing   a name, or an object of Preprocessing's fields

A node's inputs are earlier nodes, tensors of the file, "input", or "" for one that is left out; its options, which it
may lack, are those of `graph.Node`.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import ArgumentError, BackendUnavailable, ModelError
from ..images import Preprocessing
from . import architectures
from .graph import INPUT, SHOWN, Constant, Graph, Node
from .layers import verify
from .mapped import forget, mapped

#: Bytes of a header, which is parsed: that of a network of a thousand layers has some 200 thousand.
LARGEST_HEADER = 1 << 24
#: The format's element types as they lie in the file; what weights and a graph's shapes may have.
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
#: In old files of DenseNets it is norm.1, not norm1.
_NUMBERED = re.compile(r"(denselayer\d+\.[a-z]+)(\d)")
#: What the metadata's objects have: each field and its type, [str] for a list of strings.
_GRAPH = {"input_shape": [int], "nodes": [dict], "outputs": [str]}
_NODE = {"name": str, "operator": str, "inputs": [str], "options": dict}


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
        _check_known(architecture)
    try:
        import safetensors
    except ImportError as error:
        raise BackendUnavailable(
            "safetensors: expected the safetensors package, as `pip install cconv[model]` installs it"
        ) from error
    try:
        return _graph(safetensors, path, architecture)
    except OSError as error:
        raise ModelError(f"{path.name[:SHOWN]}: expected a file that can be read: {error.strerror}") from None
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path.name[:SHOWN]}: expected a valid safetensors file: {error!s:.200}") from None
    except (ValueError, RecursionError) as error:  # ours are ValueErrors too
        raise ModelError(f"{path.name[:SHOWN]}: {error!s:.800}") from None


def _graph(safetensors, path: Path, architecture: str | None) -> Graph:
    file = mapped(path)
    length = int.from_bytes(file[:8], "little")
    if length > LARGEST_HEADER:
        raise ModelError(f"expected a header of at most {LARGEST_HEADER} bytes, got {length}")
    with safetensors.safe_open(path, "numpy") as opened:  # an error unless the tensors are what follows the header
        metadata, tensors, begin = opened.metadata() or {}, {}, 8 + length
        for name in opened.offset_keys():
            entry = opened.get_slice(name)
            if entry.get_dtype() not in TYPES:
                raise ModelError(
                    f"tensor {name[:SHOWN]!r}: expected a type of {', '.join(TYPES)}, got {entry.get_dtype()}"
                )
            array = np.ndarray(entry.get_shape(), TYPES[entry.get_dtype()], file, begin)
            tensors[name] = _constant(name, array, entry.get_dtype())
            begin += array.nbytes
    name, given = architecture or metadata.get("architecture"), metadata.get("preprocessing")
    if name is not None:
        _check_known(name)
        graph = _of_architecture(name, tensors, f"of {path.name[:SHOWN]}")
        given = architectures.ARCHITECTURES[name].preprocessing if given is None else given
    elif "graph" in metadata:
        graph = _described(path.stem, tensors, metadata["graph"])
    else:
        raise ModelError(
            "expected an architecture, as in load(..., architecture='resnet50'), or a graph in the file's metadata, "
            "got neither"
        )
    return replace(graph, forget=partial(forget, file), preprocessing=Preprocessing.of(given))


def _json(word: str, text: str) -> object:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # an error where a string holds half a character
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{word}: expected JSON: {error!s:.200}") from None
    return value


def _constant(name: str, array: np.ndarray, dtype: str) -> Constant:
    """A tensor as float32 if it holds weights: those of the two short types are converted where they are read."""
    if dtype == "BF16":  # the upper half of a float32
        return Constant(name, array.shape, lambda: (array.astype(np.uint32) << 16).view(np.float32))
    if dtype == "F16":
        return Constant(name, array.shape, lambda: array.astype(np.float32))
    return Constant.of(array, name)


def _check_known(name: str) -> None:
    known = list(architectures.ARCHITECTURES)
    if name not in known:
        shown = name[:SHOWN] if isinstance(name, str) else type(name).__name__
        close = ", ".join(difflib.get_close_matches(shown, known, n=3, cutoff=0.3))
        nearest = f"; the closest are {close}" if close else ""
        raise ArgumentError(f"architecture: expected one of {', '.join(known)}, got {shown!r}{nearest}")


def _compared(wanted: Iterable[str], given: Iterable[str], owner: str) -> None:
    """A ModelError unless both are the same names."""
    wanted, given = dict.fromkeys(wanted), dict.fromkeys(given)
    missing, unexpected = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    told = [f"{len(names)} {word} ({_listed(names)})" for word, names in
            (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
    if told:
        raise ModelError(f"expected the {len(wanted)} tensors of {owner}, got {', '.join(told)}")


def _listed(names: list[str]) -> str:
    return ", ".join(name[:SHOWN] for name in names[:3]) + ", ..." * (len(names) > 3)


def _of_architecture(name: str, tensors: Mapping[str, Constant], weights: str) -> Graph:
    """A state dict as torchvision writes it; the last layer may have any number of classes."""
    make = partial(architectures.build, name, lambda key, shape: given[key].read(), weights)
    graph = make()
    new = {_NUMBERED.sub(r"\1.\2", key): key for key in graph.constants}
    # What a batch norm counts in training, and nothing else, is not part of the network.
    given = {new.get(key, key): tensor for key, tensor in tensors.items() if not key.endswith(".num_batches_tracked")}
    _compared(graph.constants, given, name)
    last = given[next(reversed(graph.constants))].shape
    if len(last) == 1 and 0 < last[0] < 2**24:
        graph = make(classes=last[0])
    for key, constant in graph.constants.items():
        if given[key].shape != constant.shape:
            raise ModelError(
                f"tensor {key!r}: expected shape {constant.shape} for {name}, got {given[key].shape!s:.200}"
            )
        if given[key].dtype != constant.dtype:
            raise ModelError(f"tensor {key!r}: expected weights of F32, F16 or BF16, got {given[key].dtype}")
    return graph


def _described(name: str, tensors: Mapping[str, Constant], text: str) -> Graph:
    """The graph that a file's metadata has."""
    shape, given, outputs = _fields(_json("graph", text), _GRAPH)
    if min(shape, default=0) < 1 or math.prod(shape) >= 2**31:
        raise ModelError(f"graph: expected an input_shape of 1 to 2^31 elements, got {shape!s:.200}")
    nodes = []
    for own, operator, inputs, options in (_fields({"options": {}} | node, _NODE) for node in given):
        options = {word: _option(word, value) for word, value in options.items()}
        nodes.append(Node(own, operator, tuple(inputs), options))
    names = {"", INPUT, *(node.name for node in nodes)}
    _compared((one for node in nodes for one in node.inputs if one not in names), tensors, "its graph")
    graph = Graph(name, "A graph in a file's metadata.", tuple(shape), tuple(nodes), tuple(outputs), tensors)
    return verify(graph, "graph")


def _fields(given: object, kinds: Mapping[str, object]) -> list:
    """The values of an object that has just these fields."""

    def fits(value, kind):
        if isinstance(kind, list):
            return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
        return type(value) is kind

    if type(given) is not dict or given.keys() != kinds.keys() or not all(fits(given[k], kinds[k]) for k in kinds):
        told = ", ".join(f"{word} ({f'list of {kind[0].__name__}' if isinstance(kind, list) else kind.__name__})"
                         for word, kind in kinds.items())  # fmt: skip
        raise ModelError(f"graph: expected an object of {told}, got {given!s:.200}")
    return [given[word] for word in kinds]


def _option(word: str, value: object) -> object:
    """A node's option as rules take it: words are bytes as ONNX's are, but for padding's, which are planning's."""
    if isinstance(value, str):
        return value if word == "padding" else value.encode()
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int | float) and abs(number) < math.inf for number in numbers):
        raise ModelError(f"graph: expected options that are words or finite numbers, got {value!s:.100} as {word:.100}")
    return tuple(value) if isinstance(value, list) else value
