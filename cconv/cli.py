"""Cli: the `cconv` command: what is here, what a computation costs, how long it takes, and maps out of image files.

In: command-line words and image files.  Out: tables (or JSON) on stdout, .npz and .png files, an exit code: 0, 2 after
one line on stderr about what was wrong, 130 when interrupted.

    main -> one function per command -> a Workload (cost, estimate), a Maps file (extract) -> the public API
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from . import Conv2d, Cost, device, estimate, images, load, model_names, show_config
from .devices import NAMES as DEVICES
from .devices import Device
from .errors import ArgumentError, BackendUnavailable, CconvError, ShapeError
from .planning import cost, specs
from .tables import SUFFIXES, dimensions, duration, scaled, table

#: The lecture's question: how long do ten such layers take for a million samples on two processors?
LECTURE = ["--x", "1,100,64,64", "--w", "100,100,5,5", "--padding", "2", "--count", "10", "--samples", "1000000"]
LECTURE_RATES = (0.15e12, 12e12)

LAYER_OPTIONS = ("x", "w", "bias", "residual", "stride", "padding", "dilation", "groups", "activation", "count")
MODEL_OPTIONS = ("size", "batch", "layers", "architecture")
COST_COLUMNS = ("macs", "flops", "flops_other", "bytes")


def integers(text: str) -> tuple[int, ...]:
    """ "1,100,64,64" or "3x224x224" as a tuple."""
    try:
        return tuple(int(word) for word in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers like 1,100,64,64, got {text!r}") from None


def integer_or_tuple(text: str):
    """ "2" as 2, "1,2" as (1, 2)."""
    values = integers(text)
    return values if len(values) > 1 else values[0]


def padding(text: str):
    return text if text in ("same", "valid") else integer_or_tuple(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def layer_count(text: str) -> int:
    if positive(text) > 100_000:
        raise argparse.ArgumentTypeError(f"expected at most 100000 layers, each is a row, got {text:.40}")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return found


def target(text: str) -> Path:
    path = Path(text)
    if not path.name or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file's name, got {text!r}")
    return path


def rate(text: str) -> float:
    """ "0.15T", "300G" or "1e12": operations per second."""
    digits, scale = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1.0)
    try:
        value = float(digits) * scale
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a rate above 0 like 0.15T, 300G or 1e12, got {text!r}")
    return value


def show(arguments, record: dict, text: str) -> None:
    print(json.dumps(record, indent=2) if arguments.json else text)


@dataclass(frozen=True)
class Row:
    """One layer of a workload."""

    name: str
    operator: str
    output_shape: tuple[int, ...]
    parameters: int
    cost: Cost


@dataclass(frozen=True)
class Workload:
    """A layer, or the layers of a model that must run, on one batch."""

    title: str
    rows: list[Row]
    total: Cost
    #: Makes a function that computes it once on a device.
    prepare: Callable[[Device], Callable[[], object]]


def workload(arguments) -> Workload:
    """What the command line asks about: a model by name, or a layer by its shapes."""
    foreign, owner = (LAYER_OPTIONS, "a layer (--x and --w)") if arguments.model else (MODEL_OPTIONS, "a model")
    for name in foreign:
        if getattr(arguments, name) != arguments.default_of(name):
            raise ArgumentError(f"--{name}: expected only with {owner}")
    if arguments.model:
        return _model_workload(arguments)
    if arguments.x and arguments.w:
        return _layer_workload(arguments)
    raise ArgumentError(f"expected a model ({', '.join(model_names())}) or both --x N,C,H,W and --w K,C,R,S")


def _layer_workload(arguments) -> Workload:
    options = {name: getattr(arguments, name) for name in ("stride", "padding", "dilation", "groups", "activation")}
    if len(arguments.x) not in (3, 4):
        raise ShapeError(f"--x: expected N,C,H,W or C,H,W, got {dimensions(arguments.x)}")
    *n, c, h, w = arguments.x
    spec = specs.conv((c, h, w), arguments.w, bias=arguments.bias, residual=arguments.residual, **options)
    each = cost.of(spec, n[0] if n else 1)
    parameters = prod(arguments.w) + (spec.K if arguments.bias else 0)
    output = (*n, *spec.output)

    def prepare(place):
        rng = np.random.default_rng(0)

        def draw(shape):
            return rng.standard_normal(shape, np.float32)

        layer = Conv2d(place.put(draw(arguments.w)), place.put(draw(spec.K)) if arguments.bias else None, **options)
        x, residual = place.put(draw(arguments.x)), place.put(draw(output)) if arguments.residual else None
        return _timed(place, lambda: [layer(x, residual) for _ in range(arguments.count)])

    title = f"x {dimensions(arguments.x)}, weight {dimensions(arguments.w)}"
    row = Row("conv2d", "Conv", output, parameters, each)
    if arguments.count == 1:
        return Workload(title, [row], each, prepare)
    rows = [replace(row, name=f"conv2d.{i + 1}") for i in range(arguments.count)]
    return Workload(f"{arguments.count} layers, each {title}", rows, each * arguments.count, prepare)


def _model_workload(arguments) -> Workload:
    model = load(arguments.model, architecture=arguments.architecture)
    channels, *size = model.input_shape
    if arguments.size:
        size = arguments.size if isinstance(arguments.size, tuple) else (arguments.size, arguments.size)
    shape = (arguments.batch, channels, *size)
    bill = model.cost(shape, arguments.layers)
    layers = {layer.name: layer for layer in model.layers}
    rows = [
        Row(name, layers[name].operator, output, layers[name].parameters, bill.layers[name])
        for name, output in model.shapes(shape, bill.layers).items()
    ]

    def prepare(place):
        x = place.put(np.random.default_rng(0).random(shape, np.float32))
        return _timed(place, lambda: model.run(x, arguments.layers))

    return Workload(f"{model.name} on {dimensions(shape)}", rows, bill.total, prepare)


def _timed(place, run: Callable[[], object]) -> Callable[[], None]:
    """A run and the wait for its end: a GPU only queues it."""

    def call():
        run()
        place.synchronize()

    return call


def measured_seconds(run: Callable[[], object]) -> float:
    """Median wall-clock time of a run: once to warm up, then at least 3 times and for a second or more."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1.0:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def info(arguments) -> None:
    """Versions, the instruction set and threads in use, and which backends work here."""
    record = {
        **show_config(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "models": list(model_names()),
    }

    def lines(values: dict, indent: str = "") -> Iterable[str]:
        width = max(map(len, map(str, values)))
        for key, value in values.items():
            if isinstance(value, dict) and value:
                yield f"{indent}{key}"
                yield from lines(value, indent + "  ")
            else:
                text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                yield f"{indent}{str(key).ljust(width)}  {text}"

    show(arguments, record, "\n".join(lines(record)))


def costs(arguments) -> None:
    """What a layer or a model costs, exactly."""
    work = workload(arguments)
    rows = [
        (r.name, r.operator, dimensions(r.output_shape), r.parameters, *(r.cost.as_dict()[c] for c in COST_COLUMNS))
        for r in work.rows
    ]
    parameters = sum(r.parameters for r in work.rows)
    record = {
        "workload": work.title,
        "layers": [
            {"name": r.name, "operator": r.operator, "output_shape": list(r.output_shape), "parameters": r.parameters}
            | r.cost.as_dict()
            for r in work.rows
        ],
        "total": {"parameters": parameters} | work.total.as_dict(),
    }
    total = ("total", "", "", parameters, *(work.total.as_dict()[c] for c in COST_COLUMNS))
    text = table(("layer", "operator", "output", "parameters", *COST_COLUMNS), rows, total)
    show(arguments, record, f"{work.title}\n{text}\nmacs are multiply-accumulates; flops = 2 * macs")


def estimates(arguments) -> None:
    """How long it takes at given rates, counting macs or flops, and on this machine."""
    work = workload(arguments)
    asked = [("macs", r) for r in arguments.macs_per_s] + [("flops", r) for r in arguments.flops_per_s]
    rates = asked or [(unit, r) for r in LECTURE_RATES for unit in ("macs", "flops")]
    rows, record = [], []
    for unit, per_second in rates:
        seconds = estimate(work.total, arguments.samples, **{f"{unit}_per_s": per_second})
        rows.append((f"{scaled(per_second)} {unit}/s", f"counting {unit}", duration(seconds)))
        record.append({"counting": unit, "rate_per_s": per_second, "seconds": seconds})
    whole = work.total * arguments.samples
    result = {"workload": work.title, "samples": arguments.samples, **whole.as_dict(), "estimates": record}
    if arguments.measure:
        if work.total.bytes > sys.maxsize:
            raise ShapeError(f"--measure: expected arrays that fit in memory, got {work.total.bytes:,} bytes of them")
        place = device(arguments.device)
        each = measured_seconds(work.prepare(place))
        here = {"macs_per_s": work.total.macs / each, "flops_per_s": work.total.flops / each}
        result["measured"] = {
            **here, "device": place.name, "seconds_each": each, "seconds": each * arguments.samples,
        }  # fmt: skip
        rates_here = f"{scaled(here['macs_per_s'])} macs/s = {scaled(here['flops_per_s'])} flops/s"
        name = "machine" if place.name == "cpu" else "machine's GPU, arrays already there"
        rows.append((f"this {name}: {rates_here}", "measured", duration(each * arguments.samples)))
    head = f"{work.title}; samples: {arguments.samples:,}; {whole.macs:,} macs = {whole.flops:,} flops"
    show(arguments, result, f"{head}\n{table(('rate', 'how', 'time'), rows)}")


@contextmanager
def maps_file(path: Path | None):
    """A function that appends an array to the .npz file at `path`, which appears whole or not at all."""
    if path is None:
        yield lambda key, array: None
        return
    draft = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with zipfile.ZipFile(draft, "w", allowZip64=True) as archive:

            def append(key: str, array: np.ndarray) -> None:
                with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)

            yield append
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _labels(paths: list[Path]) -> list[str]:
    """A name for each image: its file's name, numbered where several files share it."""
    seen: dict[str, int] = {}
    labels = []
    for path in paths:
        seen[path.name] = seen.get(path.name, 0) + 1
        labels.append(path.name if seen[path.name] == 1 else f"{path.name}#{seen[path.name]}")
    return labels


def _draw(path: Path, maps: np.ndarray) -> None:
    """Maps (K, P, Q), or numbers (K,), as a grid in a PNG file."""
    path.write_bytes(images.png(images.grid(maps.reshape(len(maps), *(maps.shape[1:] or (1, 1))))))


def extract(arguments) -> None:
    """The feature maps of image files, one by one, and the bill for each."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise BackendUnavailable("extract: needs tqdm; install cconv[batch]") from None
    words = ("architecture", "preprocessing", "precision")
    model = load(arguments.model, **{word: getattr(arguments, word) for word in words})
    wanted, place = arguments.layers or model.outputs, device(arguments.device)
    columns = ("macs", "flops", "flops_other")
    bills, rows, total, executed = [], [], Cost(), 0
    labelled = list(zip(_labels(arguments.images), arguments.images, strict=True))
    with maps_file(arguments.out) as append:
        for label, path in tqdm(labelled, unit="image", disable=None if len(labelled) > 1 else True, leave=False):
            picture = model.prepare(images.read(path))
            bill = model.cost(picture.shape, wanted).total
            maps = place.run(lambda x: model.run(x, wanted), picture, whole=True)
            for layer, values in maps.items():
                append(f"{label}/{layer}", values)
                if arguments.png:
                    suffix = "" if len(labelled) * len(maps) == 1 else f".{label}.{layer}"
                    _draw(arguments.png.with_stem(arguments.png.stem + suffix), values)
            total += bill
            executed += model.executed_flops(picture.shape, wanted, place.name)
            shapes = {layer: list(values.shape) for layer, values in maps.items()}
            bills.append({"image": label, "path": str(path), "input_shape": list(picture.shape), "maps": shapes})
            bills[-1] |= bill.as_dict()
            told = " ".join(f"{layer} {dimensions(shape)}" for layer, shape in shapes.items())
            rows.append((label, dimensions(picture.shape), told, *(bill.as_dict()[column] for column in columns)))
    result = {
        "model": model.name,
        "device": place.name,
        "images": bills,
        "total": total.as_dict(),
        "executed_flops": executed,
    }
    last = ("total", "", "", *(total.as_dict()[column] for column in columns))
    text = table(("image", "input", "maps", *columns), rows, last)
    where = "here" if place.name == "cpu" else "of the GPU"
    show(arguments, result, f"{text}\nthe convolution kernels {where} issued {executed:,} flops for it")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, where argparse would print the usage too."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a built-in model's name, or a file *.onnx or *.safetensors")
    parser.add_argument("--architecture", help="of a safetensors file: resnet50, for example")
    parser.add_argument("--size", type=integer_or_tuple, help="of the model's images: 224, or 224,320 for height,width")
    parser.add_argument("--batch", type=positive, default=1, help="how many images the model is given at once")
    parser.add_argument("--layers", type=names, help="the model's layers that are wanted, separated by commas")
    parser.add_argument("--x", type=integers, metavar="N,C,H,W", help="a layer's input")
    parser.add_argument("--w", type=integers, metavar="K,C,R,S", help="a layer's weight")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--stride", type=integer_or_tuple, default=1)
    parser.add_argument("--padding", type=padding, default=0, help="2, h,w, top,left,bottom,right, same or valid")
    parser.add_argument("--dilation", type=integer_or_tuple, default=1)
    parser.add_argument("--groups", type=positive, default=1)
    parser.add_argument("--activation")
    parser.add_argument("--count", type=layer_count, default=1, help="how many such layers, one after another")


def _add_device(parser: argparse.ArgumentParser) -> None:
    text = "where to compute; auto is a GPU that works or else the CPU; default: cpu"
    parser.add_argument("--device", choices=DEVICES, default="cpu", help=text)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="cconv", description="Convolution, counted.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def command(name: str, run: Callable) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(run=run, default_of=added.get_default)
        return added

    command("info", info)
    _add_workload(command("cost", costs))

    estimating = command("estimate", estimates)
    _add_workload(estimating)
    estimating.add_argument("--samples", type=int, default=1)
    for unit in ("macs", "flops"):
        estimating.add_argument(f"--{unit}-per-s", type=rate, action="append", default=[], metavar="0.15T")
    _add_device(estimating)
    estimating.add_argument("--measure", action=argparse.BooleanOptionalAction, help="run it here and show that too")

    extracting = command("extract", extract)
    extracting.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a JPEG or PNG file")
    extracting.add_argument("--model", default="edges", help="a built-in model's name, or a file; default: edges")
    extracting.add_argument("--architecture", help="of a safetensors file: resnet50, for example")
    extracting.add_argument("--preprocessing", help=f"{', '.join(images.PREPROCESSING)}; default: the model's own")
    _add_device(extracting)
    extracting.add_argument("--precision", choices=specs.PRECISIONS, default="highest", help="default: highest")
    extracting.add_argument("--layers", type=names, help="separated by commas; default: the model's outputs")
    extracting.add_argument("--out", type=target, metavar="maps.npz", help="an array per image and layer: image/layer")
    extracting.add_argument("--png", type=target, metavar="grid.png", help="a grid of the maps, per image and layer")
    return top


def _parsed(words: list[str]) -> argparse.Namespace:
    arguments = parser().parse_args(words)
    if arguments.command == "estimate" and not (arguments.model or arguments.x or arguments.w):
        # The lecture's case is the default; what was given comes later and wins.
        arguments = parser().parse_args(["estimate", *LECTURE, "--measure", *words[1:]])
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    try:
        arguments = _parsed(sys.argv[1:] if argv is None else list(argv))
        arguments.run(arguments)
        sys.stdout.flush()
    except SystemExit as end:  # argparse: --help, or a word that it does not know
        return end.code if isinstance(end.code, int) else 2
    except (CconvError, OSError, MemoryError, OverflowError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader is gone: give the interpreter's last flush somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        # The text of the other two may be empty or does not say what it is about.
        kind = "" if isinstance(error, (CconvError, OSError)) else f"{type(error).__name__}: "
        print(f"cconv: error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cconv: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
