"""Compare: cconv against its peers on real layers, each in a process of its own, measured in turns.

In: workloads.py, and Pythons that have the libraries.  Out: text while it runs, a JSON file with everything measured,
and the tables as Markdown.

    python benchmarks/compare.py --peer-python .venv-bench/bin/python [--layers vgg,14x14] [--peers ncnn] [--quick]
    python benchmarks/compare.py --regret            the planner's choice against everything it could have chosen
    python benchmarks/compare.py --isa avx2          direct layers on one instruction set, as shares of its own peak

The driver asks one worker after the other, round after round, so that a slow phase of the machine meets all of them; a
worker answers when its threads have stopped spinning. A figure is the median over the rounds of each turn's median.
Every output is checked against float64.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import report
from machine import described
from peers import PEERS
from workloads import AVX2_SHARE, LAYERS, Layer

ROOT = Path(__file__).resolve().parents[1]
#: L2 error over the result's norm beyond which an answer is wrong. Float32's leaves room for large Winograd tiles.
LARGEST_ERROR = {"float32": 1e-4, "float64": 1e-13}
LARGEST_ERROR_HIGH = 1e-3
#: Peers' results come from recycled memory too: glibc keeps what it would map anew for every call.
RECYCLING = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
TICK = os.sysconf("SC_CLK_TCK")
#: A turn during which others took more of the processor than this is repeated, while patience lasts.
DISTURBED = 0.1
TRIES = 4


def environment(name: str, threads: int, isa: str | None, recycling: bool) -> dict[str, str]:
    """A worker's: what the caller's own says of malloc is not passed on."""
    found = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    found |= {"OMP_NUM_THREADS": str(threads), "CCONV_NUM_THREADS": str(threads)}
    if recycling and name in PEERS:
        found |= RECYCLING
    if isa:
        found["CCONV_ISA"] = isa
    return found


class Worker:
    """A library's process."""

    def __init__(self, name: str, python: str, threads: int, isa: str | None = None, recycling: bool = True):
        self.name, self._made = name, (name, python, threads, isa)
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("worker.py")), name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(name, threads, isa, recycling),
        )
        self.hello = self._answer()

    def _answer(self):
        text = self._process.stdout.readline()
        if not text:
            raise SystemExit(f"compare: the worker for {self.name} ended; see its message above")
        return json.loads(text)

    def ask(self, **question) -> dict:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def ask_another(self, **question) -> dict:
        """The answer of a new process of the same library, as the system starts it, which then ends."""
        another = Worker(*self._made, recycling=False)
        answer = another.ask(**question)
        another.close()
        return answer

    def ticks(self) -> int:
        """Processor time so far, in the system's ticks."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Foreign:
    """How much of the processor went to others than the workers and this driver: where much, figures mean little."""

    def __init__(self, workers: list[Worker]):
        self._workers = workers
        self._begin = self._now()

    def _now(self) -> tuple[float, float]:
        busy = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
        user, nice, system, _, _, irq, soft, steal, *_ = busy
        mine = sum(worker.ticks() for worker in self._workers) + time.process_time() * TICK
        return user + nice + system + irq + soft + steal - mine, time.perf_counter()

    def share(self) -> float:
        """Since the beginning, of all processors."""
        ticks, now = self._now()
        seconds = (ticks - self._begin[0]) / TICK
        return max(0.0, seconds / (now - self._begin[1]) / (os.cpu_count() or 1))


class Team:
    """The workers of a run, by what they are for."""

    def __init__(self, arguments):
        self._patience = arguments.patience

        def start(name: str, python: str = sys.executable, isa: str | None = None) -> Worker:
            return Worker(name, python, arguments.threads, isa)

        self.machine, self.reference = start("machine"), start("reference")
        self.ours = start("direct" if arguments.isa else "cconv", isa=arguments.isa)
        self.peers = [start(name, arguments.peer_python) for name in arguments.peers]
        self.timed = [self.ours, *self.peers]
        self.all = [self.machine, self.reference, *self.timed]

    def turn(self, form: dict, seconds: float) -> tuple[float, float]:
        """The median of a turn, and what others took of the processor meanwhile; much is a reason to try again."""
        worker = next(worker for worker in self.timed if worker.name == form["library"])
        tries = []
        while not tries or (min(tries)[0] > DISTURBED and len(tries) < TRIES and self._patience > 0):
            begin, foreign = time.perf_counter(), Foreign(self.all)
            median = worker.ask(time=form["number"], seconds=seconds)["seconds"]
            if tries:
                self._patience -= time.perf_counter() - begin
            tries.append((foreign.share(), median))
        share, median = min(tries)
        return median, share

    def close(self) -> None:
        for worker in self.all:
            worker.close()


def prepared(layer: Layer, team: Team) -> tuple[list[dict], dict[str, str]]:
    """Every form of the layer, checked; and why a library has none."""
    index, forms, unsupported = LAYERS.index(layer), [], {}
    with tempfile.TemporaryDirectory() as folder:
        truth = np.load(team.reference.ask(prepare=index, folder=folder)["forms"][0]["output"])
        for worker in team.timed:
            answer = worker.ask(prepare=index, folder=folder)
            if "unsupported" in answer:
                unsupported[worker.name] = answer["unsupported"]
            for number, form in enumerate(answer["forms"]):
                result = np.load(form.pop("output"))
                if result.shape != truth.shape or result.dtype != layer.dtype:
                    raise SystemExit(f"compare: {form['name']} gave {result.dtype} {result.shape} on {layer.name}")
                error = float(np.linalg.norm(result - truth) / np.linalg.norm(truth))
                most = LARGEST_ERROR_HIGH if form["name"] == "cconv high" else LARGEST_ERROR[layer.dtype]
                if not error < most:
                    raise SystemExit(f"compare: {form['name']} is wrong on {layer.name}: L2 error {error:.1e}")
                forms.append(form | {"library": worker.name, "number": number, "l2_error": error, "times_s": []})
    return forms, unsupported


def measured(layer: Layer, team: Team, arguments) -> dict:
    """One layer on every worker, in turns."""
    from cconv import conv2d_cost

    cost = conv2d_cost(layer.x, layer.weight, bias=True, **layer.options)
    forms, unsupported = prepared(layer, team)
    row = {
        "layer": layer.name, "bar": layer.bar, "macs": cost.macs, "flops": cost.flops, "unsupported": unsupported,
        "peak_flops_per_s": {isa: team.machine.ask(peak=isa)["flops_per_s"] for isa in team.machine.hello},
    }  # fmt: skip
    shares = []
    for _ in range(arguments.rounds):
        for form in forms:
            median, share = team.turn(form, arguments.seconds)
            form["times_s"].append(median)
            shares.append(share)
    row["foreign_share"] = statistics.mean(shares)
    for form in forms:
        low, middle, high = statistics.quantiles(form["times_s"], n=4, method="inclusive")
        form |= {"median_s": middle, "quartiles_s": [low, high]}
    return row | {"forms": forms}


def processor() -> str:
    """The processor's model, and its family where the model says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return "unknown"
    fields = {key.strip(): value.strip() for key, _, value in (text.partition(":") for text in lines)}
    return f"{fields.get('model name', 'unknown')} (family {fields.get('cpu family')}, model {fields.get('model')})"


def commit() -> str:
    """The commit, marked where the tree differs from it."""
    run = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def chosen_layers(arguments) -> list[Layer]:
    texts = [text for text in arguments.layers.split(",") if text]
    layers = [layer for layer in LAYERS if not texts or any(text in layer.name for text in texts)]
    if arguments.isa:
        layers = [layer for layer in layers if layer.big]
    if arguments.quick:
        layers = list({layer.bar: layer for layer in reversed(layers)}.values())[::-1]
    if not layers:
        raise SystemExit(f"compare: no layer's name holds any of {texts}; the names: {[each.name for each in LAYERS]}")
    return layers


def direct_line(record: dict, row: dict, isa: str) -> str:
    """--isa: the issued work of the direct kernels as a share of that instruction set's peak."""
    (form,) = row["forms"]
    share = report.executed_share(record, row, form, isa)
    speed = form["executed_flops"] / form["median_s"] / 1e9
    check = report.Check(f"of the peak of {isa}", share, AVX2_SHARE)
    return f"{row['layer']}: executed {speed:.0f} GFLOP/s, nominal {report.nominal(row, form):.0f}; {check}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cconv against its peers on real layers.")
    parser.add_argument("--peer-python", help="a Python that has the peers; without it cconv is measured alone")
    parser.add_argument("--peers", default=",".join(PEERS), help="only these, with commas")
    parser.add_argument("--layers", default="", help="only layers whose name holds one of these texts, with commas")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--seconds", type=float, default=0.08, help="of one turn")
    parser.add_argument("--patience", type=float, default=180, help="seconds, in all, for turns repeated in quiet")
    parser.add_argument("--quick", action="store_true", help="one layer of each class, 3 rounds of short turns")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--regret", action="store_true", help="only the planner's choice against its candidates")
    parser.add_argument("--isa", choices=("avx2", "avx512"), help="only direct layers, cconv forced to this one")
    parser.add_argument("--out", type=Path, help="the JSON file; default out/compare-DATE.json")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, between its marks")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 3, 0.03
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    if unknown := set(arguments.peers) - set(PEERS):
        parser.error(f"--peers: expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    if arguments.regret or arguments.isa or not arguments.peer_python:
        arguments.peers = []
    if arguments.rounds < 2:
        parser.error("--rounds: expected at least 2, for quartiles")
    return arguments


def run(arguments, record: dict, team: Team, out: Path) -> None:
    """Every layer into the record; it is shown and the record written when a layer is done."""
    for layer in chosen_layers(arguments):
        row = measured(layer, team, arguments)
        if not arguments.isa:
            row["regret"] = team.ours.ask(
                regret=LAYERS.index(layer), rounds=max(2, arguments.rounds // 2), seconds=arguments.seconds / 2
            )
        record["layers"].append(row)
        record["foreign_share"] = statistics.mean(each["foreign_share"] for each in record["layers"])
        record["peak_flops_per_s"] = {
            isa: max(peaks[str(arguments.threads)], *(each["peak_flops_per_s"][isa] for each in record["layers"]))
            for isa, peaks in record["machine"]["peak_flops_per_s"].items()
        }
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(direct_line(record, row, arguments.isa) if arguments.isa else report.line(record, row), flush=True)


def main() -> None:
    arguments = parsed()
    now = datetime.datetime.now(datetime.UTC)
    team = Team(arguments)
    record = {
        "date": now.isoformat(timespec="seconds"), "commit": commit(), "processor": processor(),
        "threads": arguments.threads, "rounds": arguments.rounds, "seconds": arguments.seconds,
        "versions": {worker.name: worker.hello for worker in team.timed}, "load": os.getloadavg(),
        "machine": team.machine.ask(machine=arguments.threads), "layers": [],
    }  # fmt: skip
    print(f"{record['date']}, commit {record['commit']}, {record['processor']}, {arguments.threads} threads")
    print(described(record["machine"]), flush=True)
    out = arguments.out or ROOT / "out" / f"compare-{now:%Y%m%dT%H%M%SZ}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    run(arguments, record, team, out)
    team.close()
    if not arguments.isa:
        print(report.closing(record))
    print(f"written: {out}")
    if arguments.markdown:
        report.write_markdown(record, arguments.markdown)
        print(f"written: {arguments.markdown}")


if __name__ == "__main__":
    main()
