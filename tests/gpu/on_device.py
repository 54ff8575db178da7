"""On device: everything that needs a real GPU, in one run: correctness, then speed against torch, then the page.

    python tests/gpu/on_device.py [--markdown docs/benchmarks.md] [--json out/gpu.json] [--rounds 7] [--quick]

In: a GPU, cconv with its `gpu` extra, pytest; a CUDA build of torch for the peers; compute-sanitizer if there is one.
Out: exit code 0 and the JSON; with --markdown the figures between that page's marks <!-- gpu: begin --> and end.
Nothing is written that was not measured in this run, and nothing at all if a test fails.

Times are by the device's clock (events), layer by layer, everybody in turns; a figure is the median over the rounds.
All have a bias and a ReLU. torch runs in {NCHW, channels_last} x {ieee, tf32}, with cudnn.benchmark. Rates are nominal:
2 * macs over the time. Errors are relative L2 errors to torch's convolution in float64.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
#: name -> x, weight, options of conv2d. Batches fill 132 multiprocessors in whole rounds of blocks.
LAYERS = {
    "lecture 100->100 5x5 64, batch 264": ((264, 100, 64, 64), (100, 100, 5, 5), {"padding": 2}),
    "vgg 64->64 3x3 224, batch 32": ((32, 64, 224, 224), (64, 64, 3, 3), {"padding": 1}),
    "vgg 256->256 3x3 56, batch 64": ((64, 256, 56, 56), (256, 256, 3, 3), {"padding": 1}),
    "vgg 512->512 3x3 28, batch 64": ((64, 512, 28, 28), (512, 512, 3, 3), {"padding": 1}),
    "resnet 64->64 3x3 56, batch 128": ((128, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    "resnet 128->128 3x3 s2 56, batch 128": ((128, 128, 56, 56), (128, 128, 3, 3), {"padding": 1, "stride": 2}),
    "resnet 512->512 3x3 7, batch 128": ((128, 512, 7, 7), (512, 512, 3, 3), {"padding": 1}),
    "resnet stem 3->64 7x7 s2 224, batch 64": ((64, 3, 224, 224), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    "resnet 64->256 1x1 56, batch 128": ((128, 64, 56, 56), (256, 64, 1, 1), {}),
    "resnext 128->128 3x3 g32 56, batch 64": ((64, 128, 56, 56), (128, 4, 3, 3), {"padding": 1, "groups": 32}),
    "depthwise 64 3x3 512, batch 16": ((16, 64, 512, 512), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    "depthwise 128 3x3 256x512, batch 64": ((64, 128, 256, 512), (128, 1, 3, 3), {"padding": 1, "groups": 128}),
    "depthwise 144 3x3 56, batch 128": ((128, 144, 56, 56), (144, 1, 3, 3), {"padding": 1, "groups": 144}),
    "depthwise 240 5x5 28, batch 128": ((128, 240, 28, 28), (240, 1, 5, 5), {"padding": 2, "groups": 240}),
}
QUICK = 2
#: torch's form -> (channels_last, tf32).
FORMS = {
    "torch NCHW ieee": (False, False),
    "torch NHWC ieee": (True, False),
    "torch NCHW tf32": (False, True),
    "torch NHWC tf32": (True, True),
}
#: Tests that compute-sanitizer runs: it slows kernels down a hundredfold.
SMALL = "test_whole_numbers_give_exactly_the_definition and (lecture or cs231n or depthwise-stride-2 or groups-3-odd)"


def tests(log: list[str]) -> None:
    """The tests that need a GPU, and a few of them under compute-sanitizer; SystemExit if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    runs = {"pytest -m gpu": [*command, "tests/backends", "tests/gpu"]}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        runs[f"compute-sanitizer {tool}"] = [
            sanitizer, "--tool", tool, "--error-exitcode", "9", *command, "tests/backends", "-k", SMALL,
        ]  # fmt: skip
    for name, words in runs.items():
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        print(f"{name}: {last}", flush=True)
        if done.returncode or " passed" not in done.stdout:
            sys.exit(f"{done.stdout}\n{done.stderr}\n{name} failed: nothing is measured")
        log.append(f"{name}: {last.strip('= ')}")
    if not sanitizer:
        log.append("compute-sanitizer: not on this machine")


class Bench:
    """cconv and torch on one device, in one process and on one stream."""

    def __init__(self, rounds: int):
        import cupy
        import torch

        import cconv

        self.cupy, self.torch, self.cconv, self.rounds = cupy, torch, cconv, rounds
        if not torch.cuda.is_available():
            sys.exit("expected a CUDA build of torch for the peers, got one without a device")
        torch.backends.cudnn.benchmark = True

    def seconds(self, call, least: float = 0.02) -> float:
        """Of one call: as many as take `least` seconds, between two events."""
        torch = self.torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed(calls: int) -> float:
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        once = timed(1)
        calls = max(1, int(least / max(once, 1e-6)))
        return timed(calls) / calls

    def turns(self, calls: dict) -> dict[str, float]:
        """The median over rounds, everybody in turns, after one round that is not counted."""
        times = {name: [] for name in calls}
        for _ in range(self.rounds + 1):
            for name, call in calls.items():
                times[name].append(self.seconds(call))
        return {name: statistics.median(found[1:]) for name, found in times.items()}

    def torch_form(self, form: str, x, weight, bias, options):
        torch = self.torch
        last, tf32 = FORMS[form]
        if last:
            x, weight = (a.contiguous(memory_format=torch.channels_last) for a in (x, weight))

        def call():
            torch.backends.cudnn.allow_tf32 = tf32
            return torch.relu_(torch.nn.functional.conv2d(x, weight, bias, **options))

        return call

    def layer(self, x_shape, w_shape, options) -> dict:
        """Times, nominal rates and errors of one layer."""
        torch, cupy = self.torch, self.cupy
        torch.manual_seed(0)
        x = torch.randn(x_shape, device="cuda")
        weight = torch.randn(w_shape, device="cuda") / (w_shape[1] * w_shape[2] * w_shape[3]) ** 0.5
        bias = torch.randn(w_shape[0], device="cuda")
        ours = self.cconv.Conv2d(cupy.from_dlpack(weight), cupy.from_dlpack(bias), activation="relu", **options)
        image = cupy.from_dlpack(x)
        calls = {"cconv": lambda: ours(image)}
        calls |= {form: self.torch_form(form, x, weight, bias, options) for form in FORMS}
        few = slice(0, 2)
        with torch.no_grad():
            exact = torch.relu_(torch.nn.functional.conv2d(x[few].double(), weight.double(), bias.double(), **options))
            errors = {}
            for name, call in calls.items():
                got = torch.from_dlpack(call()) if name == "cconv" else call()
                errors[name] = float((got[few].double() - exact).norm() / exact.norm())
            if errors["cconv"] > 2e-6 * max(1, (w_shape[1] * w_shape[2] * w_shape[3] / 2304) ** 0.5):
                sys.exit(f"cconv's error is {errors['cconv']:.1e}: nothing is written")
            times = self.turns(calls)
        cost = ours.cost(x_shape)
        return {
            "seconds": times, "errors": errors, "flops": cost.flops, "bytes": cost.bytes,
            "tflops": {name: cost.flops / t / 1e12 for name, t in times.items()},
            "terabytes": {name: cost.bytes / t / 1e12 for name, t in times.items()},
        }  # fmt: skip

    def ceilings(self) -> dict:
        """What this device does at best in simple things."""
        torch, cupy = self.torch, self.cupy
        source = torch.empty(1 << 28, device="cuda")
        target = torch.empty_like(source)
        a = torch.randn(8192, 8192, device="cuda")
        small = cupy.zeros((1, 1, 4, 4), "float32")
        found = self.turns({"copy": lambda: target.copy_(source), "matmul": lambda: self.matmul(a)})
        layer = self.cconv.Conv2d(cupy.ones((1, 1, 1, 1), "float32"))
        layer(small)
        begin = time.perf_counter()
        for _ in range(1000):
            layer(small)
        call = (time.perf_counter() - begin) / 1000
        cupy.cuda.Device().synchronize()
        return {
            "copy_terabytes": 2 * source.numel() * 4 / found["copy"] / 1e12,
            "matmul_tflops": 2 * 8192**3 / found["matmul"] / 1e12,
            "call_microseconds": call * 1e6,
        }

    def matmul(self, a):
        self.torch.backends.cuda.matmul.allow_tf32 = False
        return a @ a

    def versions(self) -> dict:
        torch, cupy = self.torch, self.cupy
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return {
            "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
            "commit": commit.stdout.strip() or "unknown", "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(), "cupy": cupy.__version__,
            "driver": cupy.cuda.runtime.driverGetVersion(),
        }  # fmt: skip


def page(result: dict) -> str:
    """The measured figures as Markdown."""
    about, ceilings = result["about"], result["ceilings"]
    lines = [
        f"{about['device']}, {about['date']}, commit {about['commit']}; torch {about['torch']}, "
        f"cuDNN {about['cudnn']}, CuPy {about['cupy']}, driver {about['driver']}.",
        f"A copy moves {ceilings['copy_terabytes']:.2f} TB/s (read and written), torch's float32 product of 8192x8192 "
        f"matrices does {ceilings['matmul_tflops']:.1f} TFLOP/s, a call of a tiny `Conv2d` takes "
        f"{ceilings['call_microseconds']:.1f} us.",
        "",
        *(f"* {line}" for line in result["tests"]),
        "",
        f"| layer, TFLOP/s (TB/s) | cconv | {' | '.join(FORMS)} | over the best ieee | error: cconv | "
        "torch ieee, tf32 |",
        "|---|" + "---|" * (len(FORMS) + 4),
    ]
    for name, layer in result["layers"].items():
        rates, errors = layer["tflops"], layer["errors"]
        best = max(rates[form] for form, (_, tf32) in FORMS.items() if not tf32)
        cells = [f"{rates[form]:.1f} ({layer['terabytes'][form]:.2f})" for form in ("cconv", *FORMS)]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {rates['cconv'] / best:.2f} | {errors['cconv']:.1e} | "
            f"{errors['torch NCHW ieee']:.1e}, {errors['torch NCHW tf32']:.1e} |"
        )
    return "\n".join(lines)


def written(text: str, figures: str) -> str:
    """The page with the figures between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END} on the page")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--markdown", type=Path, help="the page whose marked part is replaced")
    parser.add_argument("--json", type=Path, default=ROOT / "out/gpu.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK} layers")
    given = parser.parse_args()
    if missing := [name for name in ("cupy", "torch", "pytest") if importlib.util.find_spec(name) is None]:
        sys.exit(f"expected {', '.join(missing)} in this environment")
    log: list[str] = []
    tests(log)
    bench = Bench(given.rounds)
    layers = dict(list(LAYERS.items())[: QUICK if given.quick else None])
    result = {"about": bench.versions(), "tests": log, "ceilings": bench.ceilings(), "layers": {}}
    for name, layer in layers.items():
        result["layers"][name] = bench.layer(*layer)
        print(name, {k: round(v, 2) for k, v in result["layers"][name]["tflops"].items()}, flush=True)
        bench.torch.cuda.empty_cache()
        bench.cupy.get_default_memory_pool().free_all_blocks()
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1))
    print(page(result))
    if given.markdown:
        given.markdown.write_text(written(given.markdown.read_text(), page(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
