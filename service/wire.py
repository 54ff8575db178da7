"""Wire: bytes to checked arrays and back: JSON and the Open Inference Protocol's binary tensors. No HTTP in here.

In: untrusted bytes.  Out: NumPy arrays and plain values, or a WireError; and the way back, as pieces of an answer.

Every size is a Python int that has been compared with the bytes at hand before anything is allocated: an array never
takes more memory than a small multiple of the body that it came from.
"""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np
import orjson

#: Bytes of one piece of an answer: what is held twice while it is written.
PIECE = 1 << 20
#: Bytes of an answer that is sent at once.
SMALL = 1 << 16
#: The binary extension's JSON header is padded with spaces to this, so that a client may view the tensors in place.
HEADER_ALIGNMENT = 8
#: Bytes that parsing one byte of JSON may take: `[],` is an empty list of 64 and a place in a list that grows.
JSON_MEMORY = 32
#: About how many bytes of JSON one float32 takes, with its comma.
JSON_BYTES_PER_NUMBER = 16

#: The protocol's names of the types that maps, and a file's shapes and constants, have.
DATATYPES = {
    "float32": "FP32", "float64": "FP64", "bool": "BOOL", "int8": "INT8", "int16": "INT16", "int32": "INT32",
    "int64": "INT64", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "float16": "FP16",
}  # fmt: skip
#: What tensors may come as; numbers of UINT8 are divided by 255.
READABLE = {"FP32": "float32", "FP16": "float16", "UINT8": "uint8"}
#: Axes that any tensor may have.
MOST_AXES = 8
#: What tensors of the protocol may ask for in general and not here; to ignore it would be to answer something else.
REFUSED_PARAMETERS = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification")
#: Characters of a model's or layer's name; those of files are paths of modules at times.
LONGEST_NAME = 512
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class WireError(ValueError):
    """Bytes that do not say what they should; the text says what was expected and what came."""


def brief(value) -> str:
    """A value from outside as an error shows it: never long."""
    return _SHORT.repr(value)


def aligned(payload: memoryview, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array of these elements. Kernels want them aligned; what follows a header of any length seldom is."""
    array = np.frombuffer(payload, np.dtype(dtype))
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    return array.reshape(shape)


# ---------------------------------------------------------------------------------------------------------------- JSON


def read_json(data, name: str = "body") -> dict:
    """A JSON object; orjson refuses NaN, deep nesting and broken text."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise WireError(f"{name}: expected JSON, got text that does not parse: {error}") from None
    if not isinstance(document, dict):
        raise WireError(f"{name}: expected a JSON object, got {type(document).__name__}")
    return document


def write_json(document) -> bytes:
    """JSON of any ints and finite floats."""
    try:
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # a cost beyond 64 bits; every int is exact in JSON's grammar
        return json.dumps(document, allow_nan=False).encode()


def read_numbers(data, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Nested lists of numbers as an array; with `shape`, also a flat list of just as many numbers."""
    found, level = [], [data]
    while level and type(level[0]) is list:
        if len(found) == MOST_AXES:
            raise WireError(f"{name}: expected lists at most {MOST_AXES} deep, got deeper ones")
        lengths = {len(item) if type(item) is list else None for item in level}
        if len(lengths) != 1 or None in lengths:
            raise WireError(f"{name}: expected lists of equal lengths, got ragged ones at depth {len(found)}")
        found.append(lengths.pop())
        level = list(chain.from_iterable(level))
    # type() and not isinstance(): true and false are no numbers here.
    numbers = {int} if dtype == "uint8" else {int, float}
    if not level or not found or not set(map(type, level)) <= numbers:
        odd = next((item for item in level if type(item) not in numbers), data)
        raise WireError(f"{name}: expected lists of numbers, got {brief(odd)}")
    if shape is not None and tuple(found) not in (shape, (prod(shape),)):
        raise WireError(f"{name}: expected {list(shape)} or {prod(shape)} numbers, got lists of shape {found}")
    try:
        array = np.array(level, np.float64)
    except OverflowError:
        array = np.array([np.inf])
    least, most = (0, 255) if dtype == "uint8" else (np.finfo(dtype).min, np.finfo(dtype).max)
    if not (least <= array.min() and array.max() <= most):
        raise WireError(f"{name}: expected numbers that fit {dtype}, got a larger one")
    return array.astype(dtype).reshape(shape or found)


def as_json(array: np.ndarray, name: str) -> np.ndarray:
    """The array as `write_json` takes it, unless JSON cannot carry it."""
    if not np.isfinite(array).all():
        raise WireError(f"{name}: holds NaN or infinity, which JSON cannot carry; ask for the binary form")
    return np.ascontiguousarray(array)


def read_option(value, name: str):
    """An option of a convolution: an int, up to four of them, or a name; as text also `2,2` or `leaky_relu,0.2`.

    Which of these an option may be is checked by the library.
    """
    if isinstance(value, str) and len(value) <= 64:
        parts = [_word(part.strip()) for part in value.split(",")]
        return parts[0] if len(parts) == 1 else tuple(parts)
    if value is None or type(value) in (int, bool):
        return value
    if isinstance(value, list) and len(value) <= 4 and all(type(item) in (int, float, str) for item in value):
        return tuple(value)
    raise WireError(f"{name}: expected an integer, up to four of them or a name, got {brief(value)}")


def _word(text: str):
    if re.fullmatch(r"-?[0-9]{1,19}", text):
        return int(text)
    if re.fullmatch(r"-?[0-9]{1,9}\.[0-9]{1,9}", text):
        return float(text)
    return text


def read_shape(value, name: str) -> tuple[int, ...]:
    """A JSON list of sizes."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_AXES or not all(type(size) is int for size in value):
        raise WireError(f"{name}: expected a list of integers, got {brief(value)}")
    if min(value) < 1:
        raise WireError(f"{name}: expected sizes of at least 1, got {value}")
    return tuple(value)


def read_names(value, name: str) -> tuple[str, ...] | None:
    """A JSON list of names, or one text with commas; nothing given is None."""
    if value is None or value == "":
        return None
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise WireError(f"{name}: expected a list of names, got {brief(value)}")
    return tuple(read_name(part, name) for part in parts)


def read_name(value, name: str) -> str:
    """A name from outside, short enough to be compared with others and shown."""
    if not isinstance(value, str):
        raise WireError(f"{name}: expected a name, got {brief(value)}")
    if len(value) > LONGEST_NAME:
        raise WireError(f"{name}: expected a name of at most {LONGEST_NAME} characters, got {len(value)}")
    return value


# ------------------------------------------------------------------------------------- the Open Inference Protocol v2


@dataclass(frozen=True)
class Expected:
    """The one input that a model takes, -1 for a size that may vary, and the layers that it can answer with.

    A request may call the input by any of its names, of which the first is its own.
    """

    model: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    layers: frozenset[str]
    defaults: tuple[str, ...]
    #: Whether it takes photographs, and so JPEG and PNG as BYTES, and how many.
    pictures: bool = False
    most_pictures: int = 0


@dataclass(frozen=True)
class InferRequest:
    """An inference request whose every field has been checked.

    Attributes
    ----------
    images : array, or list of bytes
        Of a type of READABLE; or files to be decoded.
    outputs : dict of layer name to the parameters that came with it
    binary : names of the outputs that are wanted so
    """

    id: str | None
    images: np.ndarray | list[bytes]
    outputs: dict[str, dict]
    binary: frozenset[str]
    timeout_us: int | None = None
    device: str = "auto"


def json_bytes(header: str | None, body_bytes: int) -> int:
    """How much of a body is JSON: all of it without an Inference-Header-Content-Length."""
    if header is None:
        return body_bytes
    if not re.fullmatch(r"[0-9]{1,19}", header) or not 0 < int(header) <= body_bytes:
        raise WireError(f"inference header size should be in range (0, {body_bytes}), got: {brief(header)}")
    return int(header)


def read_infer(body, size: int, expected: Expected) -> InferRequest:
    """An inference request: `size` bytes of JSON, followed by the tensors' bytes."""
    body = memoryview(body)
    document = read_json(body[:size], "inference request")
    identity = document.get("id")
    if identity is not None and not (isinstance(identity, str) and len(identity) <= 256):
        raise WireError(f"id: expected a string of at most 256 characters, got {brief(identity)}")
    try:
        parameters = _object(document.get("parameters"), "parameters")
        images = _input(document.get("inputs"), body[size:], expected)
        outputs, binary = _outputs(document.get("outputs"), _flag(parameters, "binary_data_output", False), expected)
        timeout = parameters.get("timeout")
        if timeout is not None and (type(timeout) is not int or timeout < 0):
            raise WireError(f"timeout: expected microseconds as an integer >= 0, got {brief(timeout)}")
        device = read_name(parameters.get("device", "auto"), "device")
        return InferRequest(identity, images, outputs, binary, timeout or None, device)
    except WireError as error:
        raise (WireError(f"[request id: {identity}] {error}") if identity else error) from None


def _object(value, name: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WireError(f"{name}: expected a JSON object, got {brief(value)}")
    return value


def _tensor_parameters(tensor: dict, name: str) -> dict:
    parameters = _object(tensor.get("parameters"), f"parameters of {name}")
    if refused := [key for key in REFUSED_PARAMETERS if key in parameters]:
        raise WireError(f"parameters of {name}: expected none of {', '.join(REFUSED_PARAMETERS)}, got {refused[0]}")
    return parameters


def _flag(parameters: dict, name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise WireError(f"{name}: expected true or false, got {brief(value)}")
    return value


def _input(inputs, binary: memoryview, expected: Expected) -> np.ndarray | list[bytes]:
    model, name = expected.model, expected.inputs[0]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        count = len(inputs) if isinstance(inputs, list) else brief(inputs)
        raise WireError(f"expected 1 inputs but got {count} inputs for model '{model}'; its input is '{name}'")
    tensor = inputs[0]
    if tensor.get("name") not in expected.inputs:
        came = brief(tensor.get("name"))
        raise WireError(f"unexpected inference input {came} for model '{model}'; expected '{name}'")
    datatype = tensor.get("datatype")
    encoded = datatype == "BYTES" and expected.pictures
    if not encoded and (not isinstance(datatype, str) or datatype not in READABLE):
        raise WireError(f"inference input '{name}' data-type is {brief(datatype)}, but model '{model}' expects 'FP32'")
    sizes, shape = read_shape(tensor.get("shape"), f"shape of input '{name}'"), expected.shape
    if encoded:
        shape = (-1, 1)[: len(sizes)]
    fits = len(sizes) == len(shape)
    if not fits or any(want not in (-1, got) for want, got in zip(shape, sizes, strict=True)):
        wanted, got = (str(list(s)).replace(" ", "") for s in (shape, sizes))
        raise WireError(f"unexpected shape for input '{name}' for model '{model}'. Expected {wanted}, got {got}")
    parameters = _tensor_parameters(tensor, f"input '{name}'")
    if ("data" in tensor) == ("binary_data_size" in parameters):
        both = "both are" if "data" in tensor else "neither is"
        raise WireError(
            f"Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters'. "
            f"But {both} set for input '{name}'"
        )
    if "data" in tensor and datatype in ("FP16", "BYTES"):
        raise WireError(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input '{name}'"
        )
    given = parameters.get("binary_data_size", 0)
    size = given if encoded else prod(sizes) * np.dtype(READABLE[datatype]).itemsize
    if type(given) is not int or given < 0 or given > len(binary) or ("data" not in tensor and given != size):
        raise WireError(
            f"unexpected size for input '{name}', expecting {size} bytes for model '{model}', got binary_data_size "
            f"{brief(given)} and {len(binary)} bytes"
        )
    if len(binary) > given:
        raise WireError(f"unexpected additional input data for model '{model}': {len(binary) - given} bytes")
    if encoded and sizes[0] > expected.most_pictures:  # an empty one takes four bytes here, and a hundred in memory
        raise WireError(f"input '{name}': expected at most {expected.most_pictures} images, got {sizes[0]}")
    if encoded:
        return _elements(binary, sizes[0], f"input '{name}'")
    if given:
        return aligned(binary, np.dtype(READABLE[datatype]).newbyteorder("<"), sizes)
    return read_numbers(tensor["data"], f"input '{name}'", READABLE[datatype], sizes)


def _elements(binary: memoryview, count: int, name: str) -> list[bytes]:
    """The elements of a BYTES tensor: four bytes of length before each."""
    found, start = [], 0
    while start < len(binary) and len(found) < count:
        size = int.from_bytes(binary[start : start + 4], "little")
        found.append(bytes(binary[start + 4 : start + 4 + size]))
        start += 4 + size
    if len(found) != count or start != len(binary):
        raise WireError(f"{name}: expected {count} elements, each after its length in 4 bytes, got something else")
    return found


def _outputs(outputs, default: bool, expected: Expected) -> tuple[dict[str, dict], frozenset[str]]:
    if outputs is None or outputs == []:
        return {layer: {} for layer in expected.defaults}, frozenset(expected.defaults if default else ())
    if not isinstance(outputs, list) or not all(isinstance(o, dict) and "name" in o for o in outputs):
        raise WireError(f"outputs: expected a list of objects with a name, got {brief(outputs)}")
    wanted: dict[str, dict] = {}
    binary = set()
    for output in outputs:
        name = read_name(output["name"], "outputs")
        if name in wanted:
            raise WireError(f"output {brief(name)} already exists in request")
        if name not in expected.layers:
            raise WireError(
                f"unexpected inference output {brief(name)} for model '{expected.model}'; expected one of its layers, "
                f"which GET /v2/models/{expected.model} lists"
            )
        wanted[name] = _tensor_parameters(output, f"output {name!r}")  # which is ours, and no longer than that
        if _flag(wanted[name], "binary_data", default):
            binary.add(name)
    return wanted, frozenset(binary)


def write_infer(
    document: dict, maps: dict[str, tuple[np.ndarray, dict]], binary: frozenset[str]
) -> tuple[bytes, list[np.ndarray]]:
    """The answer's JSON, and the tensors that follow it. Without binary outputs the JSON is the whole answer.

    Every map comes with the parameters that say how to read it.
    """
    outputs, tensors = [], []
    for name, (array, parameters) in maps.items():
        output = {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape)}
        if name in binary:
            tensors.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
            parameters = {**parameters, "binary_data_size": tensors[-1].nbytes}
        else:
            output["data"] = as_json(array, f"output '{name}'").ravel()
        outputs.append({**output, "parameters": parameters} if parameters else output)
    header = write_json({**document, "outputs": outputs})
    if tensors:
        header += b" " * (-len(header) % HEADER_ALIGNMENT)
    return header, tensors


def bytes_of(answer) -> int:
    """Of an answer: text, bytes, arrays, and lists of these."""
    if isinstance(answer, (list, tuple)):
        return sum(map(bytes_of, answer))
    return answer.nbytes if isinstance(answer, np.ndarray) else len(answer)


def pieces(parts: Iterable[bytes | np.ndarray]) -> Iterator[bytes]:
    """An answer's parts in order as bytes of moderate size, so that no array is copied whole; a small answer as one."""
    views = [memoryview(part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8)) for part in parts]
    for view in [b"".join(views)] if sum(map(len, views)) <= SMALL else views:
        for start in range(0, len(view), PIECE):
            yield bytes(view[start : start + PIECE])


def total_bytes(parts: Iterable[bytes | np.ndarray]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)
