"""Networks: whole models from ONNX files, on cconv and on peers that read them, measured in turns.

In: the nine networks of the ONNX package's suite and the lecture's ten layers, with random weights.
Out: text while it runs, a JSON file, and a table as Markdown.

    python benchmarks/networks.py --peer-python .venv-bench/bin/python [--networks vgg,lecture] [--rounds 7] [--tensors]

As in compare.py every library has a process of its own and takes turns. One image, float32, default precision; outputs
are compared with ONNX Runtime's, and with --tensors what every convolution, ReLU and pool gives, instead of the times.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

#: L2 error over the norm beyond which two libraries' answers differ.
LARGEST_ERROR = 1e-4
#: Operators whose tensors --tensors compares, so many at a time: those that are asked for are not fused.
COMPARED, AT_A_TIME = ("Conv", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool"), 10
#: Of all ratios, geometrically.
MEAN = 1.4
BEGIN, END = "<!-- networks: begin -->", "<!-- networks: end -->"


class Network(NamedTuple):
    """A network, and how many times faster than its best peer it has to be."""

    name: str
    bar: float
    batch: int = 1


NETWORKS = (
    Network("vgg19", 1.8), Network("resnet50", 1.3), Network("squeezenet", 1.1), Network("densenet121", 1.1),
    Network("inception_v1", 1.1), Network("inception_v2", 1.1), Network("shufflenet", 1.1),
    Network("bvlc_alexnet", 1.0), Network("zfnet512", 1.0), Network("lecture", 2.2), Network("lecture", 2.2, batch=8),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the files


def _lecture(batch: int):
    """Ten 5x5 layers of 100 maps on 64x64."""
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, weights = np.random.default_rng(0), [], []
    for i in range(10):
        weight = rng.standard_normal((100, 100, 5, 5), np.float32) * np.float32(math.sqrt(2 / 2500))
        weights += [
            numpy_helper.from_array(weight, f"w{i}"),
            numpy_helper.from_array(np.zeros(100, np.float32), f"b{i}"),
        ]
        nodes.append(helper.make_node("Conv", [f"c{i}", f"w{i}", f"b{i}"], [f"s{i}"], pads=[2] * 4))
        nodes.append(helper.make_node("Relu", [f"s{i}"], [f"c{i + 1}"]))
    shape = batch, 100, 64, 64
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("c0", "c10")]
    graph = helper.make_graph(nodes, "lecture", *sides, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _suites(name: str):
    """A network of the suite, whose weights, of one value each there, are drawn."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(Path(onnx.__path__[0]) / "backend/test/data/light" / f"light_{name}.onnx")
    graph, rng = model.graph, np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    variances = {node.input[4] for node in graph.node if node.op_type == "BatchNormalization"}
    scales = {node.input[1] for node in graph.node if node.op_type == "BatchNormalization"}
    # A scale may be a layer of its own: Unsqueeze, then Mul.
    factors = {name for node in graph.node if node.op_type == "Mul" for name in node.input}
    scales |= {node.input[0] for node in graph.node if node.op_type == "Unsqueeze" and node.output[0] in factors}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape, output = tuple(shapes[node.input[0]]), node.output[0]
        if output in variances or output in scales:
            array = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            array = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        else:
            array = rng.standard_normal(shape) * 0.1
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), output))
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    filled = {tensor.name for tensor in graph.initializer if tensor.name in used}
    images = [value for value in graph.input if value.name in used - filled]
    weights = [tensor for tensor in graph.initializer if tensor.name in filled]
    del graph.input[:], graph.initializer[:]
    graph.input.extend(images)
    graph.initializer.extend(weights)
    model.ir_version = max(model.ir_version, 4)  # initializers need not be inputs
    return model


def write(network: Network, path: Path) -> None:
    """The network's file."""
    import onnx

    model = _lecture(network.batch) if network.name == "lecture" else _suites(network.name)
    onnx.save(model, path)


def give(path: Path, names: list[str]) -> Path:
    """A copy of a file whose outputs are tensors of these names."""
    import onnx

    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    copy = path.with_name("tensors.onnx")
    onnx.save(model, copy)
    return copy


def tensors_of(path: Path) -> list[str]:
    """The names of what the operators of COMPARED give."""
    import onnx

    return [node.output[0] for node in onnx.load(path).graph.node if node.op_type in COMPARED]


def image(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


# ------------------------------------------------------------------------------------------------------- libraries


def cconv(path: str, batch: int, threads: int) -> list:
    from peers import Form

    import cconv

    cconv.set_num_threads(threads)
    model = cconv.load(path)
    x = image((batch, *model.input_shape))
    name = model.outputs[0]
    return [Form("cconv", "Model.run", lambda: model.run(x)[name])]


def onnxruntime(path: str, batch: int, threads: int) -> list:
    import onnxruntime
    from peers import Form

    def form(variant: str, spinning: str) -> Form:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        feed = {given.name: image((batch, *given.shape[1:]))}
        return Form("onnxruntime", variant, lambda: session.run(None, feed)[0])

    return [form("spinning", "1"), form("not spinning", "0")]


def openvino(path: str, batch: int, threads: int) -> list:
    import openvino
    from peers import Form

    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }  # fmt: skip
    model = openvino.Core().read_model(path)
    x = image((batch, *model.input().shape[1:]))
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

    def run() -> np.ndarray:
        request.infer()
        return request.get_output_tensor(0).data

    run.input = x  # the request has only its address
    return [Form("openvino", "f32", run)]


#: Library -> its forms of a file and a batch. ncnn's package reads no ONNX.
Library = Callable[[str, int, int], list]
LIBRARIES: dict[str, Library] = {"cconv": cconv, "onnxruntime": onnxruntime, "openvino": openvino}
PEERS = ("onnxruntime", "openvino")


def _every_cconv(path: str, batch: int, threads: int) -> dict:
    import cconv

    cconv.set_num_threads(threads)
    model = cconv.load(path)
    return model.run(image((batch, *model.input_shape)))


def _every_onnxruntime(path: str, batch: int, threads: int) -> dict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {given.name: image((batch, *given.shape[1:]))}), strict=True))


#: Library -> all outputs of a file, by name.
EVERY = {"cconv": _every_cconv, "onnxruntime": _every_onnxruntime}


# ------------------------------------------------------------------------------------------------------ the driver


def measured(network: Network, workers: list, arguments) -> dict:
    """One network on every library, in turns."""
    forms, answers = [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write(network, path)
        for worker in workers:
            begin = time.perf_counter()
            answer = worker.ask(network=str(path), batch=network.batch, folder=folder)
            for number, form in enumerate(answer["forms"]):
                answers[worker.name] = np.load(form.pop("output"))
                forms.append(form | {"worker": worker, "number": number, "times_s": []})
            forms[-1]["ready_s"] = time.perf_counter() - begin
    truth = answers["onnxruntime"].astype(np.float64) if "onnxruntime" in answers else None
    for name, answer in answers.items():
        if truth is not None:
            error = float(np.linalg.norm(answer.reshape(truth.shape) - truth) / np.linalg.norm(truth))
            if not error < LARGEST_ERROR:
                raise SystemExit(f"networks: {name} and onnxruntime differ on {network.name}: L2 {error:.1e}")
    for _ in range(arguments.rounds):
        for form in forms:
            form["times_s"].append(form["worker"].ask(time=form["number"], seconds=arguments.seconds)["seconds"])
    best: dict[str, dict] = {}
    for form in forms:
        name = form.pop("worker").name
        form |= {"median_s": statistics.median(form["times_s"]), "least_s": min(form["times_s"])}
        if name not in best or form["median_s"] < best[name]["median_s"]:
            best[name] = form
    label = network.name + (f", batch {network.batch}" if network.batch > 1 else "")
    return {"network": label, "bar": network.bar, "forms": forms, "fastest": best}


def compared(network: Network, workers: dict, folder: Path) -> str:
    """The largest difference between cconv's tensors and ONNX Runtime's."""
    path = folder / "network.onnx"
    write(network, path)
    names, worst = tensors_of(path), (0.0, "")
    for begin in range(0, len(names), AT_A_TIME):
        some = names[begin : begin + AT_A_TIME]
        copy = give(path, some)
        given = {}
        for library, worker in workers.items():
            saved = worker.ask(tensors=str(copy), batch=network.batch, folder=str(folder))["file"]
            with np.load(saved) as arrays:
                given[library] = {name: arrays[name].astype(np.float64) for name in some}
        for name in some:
            truth = given["onnxruntime"][name]
            error = np.linalg.norm(given["cconv"][name].reshape(truth.shape) - truth) / np.linalg.norm(truth)
            worst = max(worst, (float(error), name))
    if not worst[0] < LARGEST_ERROR:
        raise SystemExit(f"networks: cconv and onnxruntime differ on {network.name}, {worst[1]}: L2 {worst[0]:.1e}")
    return f"{network.name}: {len(names)} tensors as ONNX Runtime's, L2 of the worst, {worst[1]}, {worst[0]:.1e}"


def ratio(row: dict) -> float | None:
    """The fastest peer's time over cconv's."""
    peers = [form["median_s"] for name, form in row["fastest"].items() if name != "cconv"]
    return min(peers) / row["fastest"]["cconv"]["median_s"] if peers else None


def line(row: dict) -> str:
    times = "  ".join(f"{name} {form['median_s'] * 1e3:.2f} ms" for name, form in row["fastest"].items())
    got = ratio(row)
    verdict = "" if got is None else f"{got:.2f} (>= {row['bar']:g}{'' if got >= row['bar'] else ', MISSED'}); "
    return f"{row['network']}: {verdict}{times}"


def mean(rows: list[dict]) -> float:
    return math.exp(statistics.mean(math.log(ratio(row)) for row in rows))


def table(record: dict) -> str:
    names = list(dict.fromkeys(name for row in record["networks"] for name in row["fastest"]))
    head = ["milliseconds", *names, "ratio / bar"]
    rows = []
    for row in record["networks"]:
        times = [f"{row['fastest'][name]['median_s'] * 1e3:.2f}" for name in names]
        got = ratio(row)
        judged = "–" if got is None else f"{got:.2f} / {row['bar']:g}{'' if got >= row['bar'] else ' ✗'}"
        rows.append([row["network"], *times, judged])
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
    place = f"{record['date'][:10]}, commit {record['commit']}, {record['processor']}, {record['threads']} threads, "
    total = f"\n\nGeometric mean of the ratios {mean(record['networks']):.2f} (>= {MEAN})." if len(names) > 1 else ""
    return f"{place}{record['rounds']} rounds, medians.\n\n{body}{total}\n"


def main() -> None:
    from compare import ROOT, Worker, commit, processor

    parser = argparse.ArgumentParser(description="cconv against its peers on whole networks.")
    parser.add_argument("--peer-python", help="a Python that has the peers; without it cconv is measured alone")
    parser.add_argument("--networks", default="", help="only networks whose name holds one of these texts, with commas")
    parser.add_argument("--tensors", action="store_true", help="compare tensors inside, and measure nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="the JSON file; default out/networks-DATE.json")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, between its marks")
    arguments = parser.parse_args()
    texts = [text for text in arguments.networks.split(",") if text]
    chosen = [network for network in NETWORKS if not texts or any(text in network.name for text in texts)]
    if not chosen:
        raise SystemExit(f"networks: expected some of {[network.name for network in NETWORKS]}, got {texts}")
    if arguments.tensors:
        pythons = {"cconv": sys.executable, "onnxruntime": arguments.peer_python}
        workers = {name: Worker(name, python, arguments.threads) for name, python in pythons.items()}
        with tempfile.TemporaryDirectory() as folder:
            for network in chosen:
                print(compared(network, workers, Path(folder)), flush=True)
        return
    now = datetime.datetime.now(datetime.UTC)
    workers = [Worker("cconv", sys.executable, arguments.threads)]
    if arguments.peer_python:
        workers += [Worker(name, arguments.peer_python, arguments.threads) for name in PEERS]
    record = {
        "date": now.isoformat(timespec="seconds"), "commit": commit(), "processor": processor(),
        "threads": arguments.threads, "rounds": arguments.rounds, "networks": [],
    }  # fmt: skip
    out = arguments.out or ROOT / "out" / f"networks-{now:%Y%m%dT%H%M%SZ}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for network in chosen:
        record["networks"].append(measured(network, workers, arguments))
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(line(record["networks"][-1]), flush=True)
    for worker in workers:
        worker.close()
    print(f"written: {out}")
    if arguments.markdown:
        text = arguments.markdown.read_text() if arguments.markdown.exists() else ""
        if BEGIN not in text:
            text += f"\n{BEGIN}\n{END}\n"
        before, rest = text.split(BEGIN, 1)
        arguments.markdown.write_text(f"{before}{BEGIN}\n\n{table(record)}\n{END}{rest.split(END, 1)[1]}")
        print(f"written: {arguments.markdown}")


if __name__ == "__main__":
    main()
