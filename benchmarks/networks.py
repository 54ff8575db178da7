"""Networks: whole models from ONNX files, on cconv and on peers that read them, measured in turns.

In: the files of network_files.py.  Out: text while it runs, a JSON file, and a table as Markdown.

    python benchmarks/networks.py --peer-python .venv-bench/bin/python [--networks vgg,lecture] [--rounds 7] [--tensors]

As in compare.py every library has a process of its own and takes turns; what loading takes, in time and memory, comes
from more processes, new ones. One image, float32, default precision unless the network's label says more; outputs are
compared with ONNX Runtime's, and with --tensors all that convolutions, activations and pools give, instead of times.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from network_files import NETWORKS, Network, give, tensors_of, write

#: L2 error over the norm beyond which two libraries' answers differ.
LARGEST_ERROR, LARGEST_ERROR_HIGH = 1e-4, 1e-3
#: Tensors that --tensors compares at a time: those that are asked for are not fused.
AT_A_TIME = 10
#: Of the ratios of networks at default precision, geometrically.
MEAN = 1.4
#: Of ONNX Runtime's resident memory, and of its time from the file to the first answer.
MOST_RESIDENT, MOST_READY = 1.5, 1.0
#: New processes that load each network; the median counts.
LOADS = 3
BEGIN, END = "<!-- networks: begin -->", "<!-- networks: end -->"


def image(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


# ------------------------------------------------------------------------------------------------------- libraries


def cconv(path: str, batch: int, threads: int, precision: str) -> Iterator:
    from peers import Form

    import cconv

    cconv.set_num_threads(threads)
    model = cconv.load(path, precision=precision)
    x = image((batch, *model.input_shape))
    name = model.outputs[0]
    yield Form("cconv", "Model.run", lambda: model.run(x)[name])


def onnxruntime(path: str, batch: int, threads: int, precision: str) -> Iterator:
    import onnxruntime
    from peers import Form

    for variant, spinning in (("spinning", "1"), ("not spinning", "0")):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        feed = {given.name: image((batch, *given.shape[1:]))}
        yield Form("onnxruntime", variant, lambda session=session, feed=feed: session.run(None, feed)[0])


def openvino(path: str, batch: int, threads: int, precision: str) -> Iterator:
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
    yield Form("openvino", "f32", run)


#: Library -> its forms of a file, made one by one: file, batch, threads, precision (peers have one). ncnn's package
#: reads no ONNX.
Library = Callable[[str, int, int, str], Iterator]
LIBRARIES: dict[str, Library] = {"cconv": cconv, "onnxruntime": onnxruntime, "openvino": openvino}
PEERS = ("onnxruntime", "openvino")


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def loaded(name: str, path: str, batch: int, threads: int, precision: str) -> dict:
    """From the file to the first answer, of a library that is imported already: seconds, and bytes that stay."""
    for module in (name, "onnx") if name == "cconv" else (name,):
        __import__(module)
    before, begin = resident(), time.perf_counter()
    form = next(LIBRARIES[name](path, batch, threads, precision))
    load = time.perf_counter() - begin
    form.run()
    return {"load_s": load, "ready_s": time.perf_counter() - begin, "resident_bytes": resident() - before}


def _every_cconv(path: str, batch: int, threads: int, precision: str) -> dict:
    import cconv

    cconv.set_num_threads(threads)
    model = cconv.load(path, precision=precision)
    return model.run(image((batch, *model.input_shape)))


def _every_onnxruntime(path: str, batch: int, threads: int, precision: str) -> dict:
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
    forms, answers, loads = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write(network, path)
        file = {"batch": network.batch, "precision": network.precision}
        for _ in range(LOADS):
            for worker in workers:
                loads.setdefault(worker.name, []).append(worker.ask_another(load=str(path), **file))
        for worker in workers:
            answer = worker.ask(network=str(path), folder=folder, **file)
            for number, form in enumerate(answer["forms"]):
                answers[worker.name] = np.load(form.pop("output"))
                forms.append(form | {"worker": worker, "number": number, "times_s": []})
    truth = answers["onnxruntime"].astype(np.float64) if "onnxruntime" in answers else None
    for name, answer in answers.items():
        if truth is not None:
            error = float(np.linalg.norm(answer.reshape(truth.shape) - truth) / np.linalg.norm(truth))
            if not error < (LARGEST_ERROR if network.precision == "highest" else LARGEST_ERROR_HIGH):
                raise SystemExit(f"networks: {name} and onnxruntime differ on {network.label}: L2 {error:.1e}")
    for _ in range(arguments.rounds):
        for form in forms:
            form["times_s"].append(form["worker"].ask(time=form["number"], seconds=arguments.seconds)["seconds"])
    best: dict[str, dict] = {}
    for form in forms:
        name = form.pop("worker").name
        form |= {"median_s": statistics.median(form["times_s"]), "least_s": min(form["times_s"])}
        if name not in best or form["median_s"] < best[name]["median_s"]:
            best[name] = form
    row = network._asdict() | {"network": network.label, "forms": forms, "fastest": best}
    return row | {"loads": {name: {key: statistics.median(one[key] for one in each) for key in each[0]}
                            for name, each in loads.items()}}  # fmt: skip


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
            saved = worker.ask(tensors=str(copy), batch=network.batch, precision=network.precision, folder=str(folder))[
                "file"
            ]
            with np.load(saved) as arrays:
                given[library] = {name: arrays[name].astype(np.float64) for name in some}
        for name in some:
            truth = given["onnxruntime"][name]
            error = np.linalg.norm(given["cconv"][name].reshape(truth.shape) - truth) / np.linalg.norm(truth)
            worst = max(worst, (float(error), name))
    if not worst[0] < LARGEST_ERROR:
        raise SystemExit(f"networks: cconv and onnxruntime differ on {network.label}, {worst[1]}: L2 {worst[0]:.1e}")
    return f"{network.label}: {len(names)} tensors as ONNX Runtime's, L2 of the worst, {worst[1]}, {worst[0]:.1e}"


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
    return math.exp(statistics.mean(math.log(ratio(row)) for row in rows if row["precision"] == "highest"))


def judged(got: float | None, bar: float, most: bool = False) -> str:
    """A ratio beside its bar, with a mark if it misses it."""
    if got is None:
        return "–"
    return f"{got:.2f} / {bar:g}{'' if (got <= bar if most else got >= bar) else ' ✗'}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def times_table(record: dict) -> str:
    names = list(dict.fromkeys(name for row in record["networks"] for name in row["fastest"]))
    rows = []
    for row in record["networks"]:
        times = [f"{row['fastest'][name]['median_s'] * 1e3:.2f}" for name in names]
        rows.append([row["network"], *times, judged(ratio(row), row["bar"])])
    total = f"\n\nGeometric mean of the ratios {mean(record['networks']):.2f} (>= {MEAN})." if len(names) > 1 else ""
    return markdown(["milliseconds", *names, "ratio / bar"], rows) + total


def loads_table(record: dict) -> str:
    """Seconds and MB from a file to its first answer; ratios of cconv's to ONNX Runtime's."""
    names = list(dict.fromkeys(name for row in record["networks"] for name in row["loads"]))
    rows = []
    for row in record["networks"]:
        if row["batch"] > 1:
            continue
        cells, loads = [row["network"]], row["loads"]
        for key, scale, digits, bar in (("ready_s", 1, 2, MOST_READY), ("resident_bytes", 1e-6, 0, MOST_RESIDENT)):
            cells += [f"{loads[name][key] * scale:.{digits}f}" for name in names]
            other = loads.get("onnxruntime")
            cells.append(judged(loads["cconv"][key] / other[key] if other else None, bar, most=True))
        rows.append(cells)
    head = ["", *(f"{name}, s" for name in names), "ratio / bar", *(f"{name}, MB" for name in names), "ratio / bar"]
    return markdown(head, rows)


def table(record: dict) -> str:
    place = f"{record['date'][:10]}, commit {record['commit']}, {record['processor']}, {record['threads']} threads, "
    return (
        f"{place}{record['rounds']} rounds, medians.\n\n{times_table(record)}\n\n"
        "From the file to the first answer, in a new process that has imported the library: seconds, and resident "
        f"memory that stays.\n\n{loads_table(record)}\n"
    )


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
    chosen = [network for network in NETWORKS if not texts or any(text in network.label for text in texts)]
    if not chosen:
        raise SystemExit(f"networks: expected some of {[network.label for network in NETWORKS]}, got {texts}")
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
