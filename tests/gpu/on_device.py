"""On device: everything that needs a real GPU: correctness, sanitizers, speed against torch, then the page.

    python tests/gpu/on_device.py [tests] [sanitizers] [bench] [--seconds 540] [--only vgg] [--commit TEXT]
    python tests/gpu/on_device.py page --markdown docs/benchmarks.md
    python tests/gpu/on_device.py compile [--arch sm_90] [--only float32]    ahead, on any machine, into CCONV_CACHE_DIR

In: a GPU, cconv with its `gpu` extra, pytest; a CUDA build of torch for the peers; compute-sanitizer if there is one.
Out: a JSON file, which grows: a part may have a command of its own, and each result is written when it is there. What
fails is recorded, and the rest goes on; `--seconds` ends a command in time. `page` puts the figures between that page's
marks <!-- gpu: begin --> and end: only figures of one device and commit, and none if a test failed or none ran.

Times are by the device's clock (events), layer by layer, everybody in turns; a figure is the median over the rounds.
All have a bias and a ReLU. torch runs in {NCHW, channels_last} x {ieee, tf32}, with cudnn.benchmark. Rates are nominal:
2 * macs over the time. Errors are relative L2 errors to torch's convolution in float64.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
#: name -> x, weight, options of conv2d. The lecture's batch fills 132 multiprocessors in whole rounds of blocks.
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
#: torch's form -> (channels_last, tf32).
FORMS = {
    "torch NCHW ieee": (False, False),
    "torch NHWC ieee": (True, False),
    "torch NCHW tf32": (False, True),
    "torch NHWC tf32": (True, True),
}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-m", "gpu", "-p", "no:cacheprovider"]
#: What of the tests has a command of its own: a failure or a hang of one says nothing of the others.
TESTS = {
    "pytest -m gpu tests/gpu": [*PYTEST, "tests/gpu"],
    "pytest -m gpu tests/backends": [*PYTEST, "tests/backends"],
}
#: Those that compute-sanitizer runs, which slows kernels down a hundredfold: every kernel, on small arrays.
SMALL = [
    "tests/gpu/test_operators.py", "tests/gpu/test_device.py", "-k",
    "(whole_numbers and (lecture or cs231n or depthwise-stride-2 or groups-3-odd)) or pools_give or global_pools or "
    "several_steps or softmax or tensors_agree or (every_activation and relu6)",
]  # fmt: skip
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("tests", "sanitizers", "bench", "page", "compile")
#: Left of a command's time, nothing new is begun.
LEAST_SECONDS = 20


class Record:
    """The JSON file: what is known, written whenever something is added; and until when this command may go on."""

    def __init__(self, path: Path, seconds: float):
        self._path, self._end = path, time.monotonic() + seconds
        self.content = json.loads(path.read_text()) if path.exists() else {}

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def put(self, part: str, name: str, value) -> None:
        self.content.setdefault(part, {})[name] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".part")
        draft.write_text(json.dumps(self.content, indent=1))
        draft.replace(self._path)

    def command(self, part: str, name: str, words: list[str], **environment) -> None:
        """Run it for as long as there is time; its end, and the last lines that it wrote if that was bad."""
        if self.left < LEAST_SECONDS:
            return self.put(part, name, {"passed": False, "last": "not run: no time left"})
        print(f"{name} ...", flush=True)
        try:
            done = subprocess.run(
                words, cwd=ROOT, env={**os.environ, **environment}, text=True, timeout=self.left, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            lines, passed = done.stdout.strip().splitlines(), done.returncode == 0 and " passed" in done.stdout
        except subprocess.TimeoutExpired as error:
            came = (error.stdout or b"").decode(errors="replace")
            lines, passed = [*came.splitlines(), "stopped: no time left"], False
        found = {"passed": passed, "last": (lines or ["nothing"])[-1].strip("= ")}
        if not passed:
            found["output"] = lines[-80:]
            print("\n".join(lines[-40:]))
        print(f"{name}: {found['last']}", flush=True)
        return self.put(part, name, found)


def compile_ahead(given) -> None:
    """Every kernel that tests and figures may ask for, by NVRTC, without a GPU."""
    from cconv.gpu import compile

    spec = importlib.util.spec_from_file_location("test_compile", ROOT / "tests/gpu/test_compile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    jobs = [
        job for dtype in module.TYPES if (given.only or dtype) == dtype for job in module.variants(dtype, every=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(lambda job: len(compile.cubin(*job, given.arch)), jobs))
    print(f"{len(sizes)} cubins for {given.arch}, {sum(sizes)} bytes, in {compile.cache_folder()}")


def tests(record: Record, given) -> None:
    """The tests that need a GPU."""
    for name, words in TESTS.items():
        record.command("tests", name, words + (["-k", given.only] if given.only else []))


def sanitizers(record: Record, given) -> None:
    """A few of them by compute-sanitizer, with memory that CuPy's pool does not hide from it."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not sanitizer:
        return record.put("sanitizers", "compute-sanitizer", {"passed": False, "last": "not on this machine"})
    for tool in TOOLS:
        if not given.only or given.only in tool:
            words = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, *SMALL]
            record.command("sanitizers", tool, words, CCONV_TEST_NO_POOL="1")
    return None


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
                raise ArithmeticError(f"cconv's error is {errors['cconv']:.1e}, beyond the bound")
            times = self.turns(calls)
            kernels = self.kernels(calls["torch NCHW ieee"])
        cost = ours.cost(x_shape)
        return {
            "seconds": times, "errors": errors, "torch_ieee_kernels": kernels, "flops": cost.flops, "bytes": cost.bytes,
            "tflops": {name: cost.flops / t / 1e12 for name, t in times.items()},
            "terabytes": {name: cost.bytes / t / 1e12 for name, t in times.items()},
        }  # fmt: skip

    def kernels(self, call) -> list[str]:
        """The kernels that a call of torch's runs: whether cuDNN took an FFT or Winograd."""
        profiler = self.torch.profiler
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            call()
            self.torch.cuda.synchronize()
        return [event.key for event in profile.key_averages()]

    def job(self, samples: int = 1056, layers: int = 10) -> dict:
        """The lecture's job on a slice: images of the host through ten layers and back; and there and back alone."""
        import numpy as np

        device, rng = self.cconv.device("cuda"), np.random.default_rng(0)
        weight = (rng.standard_normal((100, 100, 5, 5)) / 50).astype(np.float32)
        layer = self.cconv.Conv2d(device.put(weight), padding=2, activation="relu")
        x = rng.standard_normal((samples, 100, 64, 64), np.float32)

        def through(images):
            for _ in range(layers):
                images = layer(images)
            return {"y": images}

        found = {"samples": samples}
        for name, function in (("seconds", through), ("transfer_seconds", lambda images: {"y": images})):
            times = []
            for _ in range(4):
                begin = time.perf_counter()
                device.run(function, x)
                times.append(time.perf_counter() - begin)
            found[name] = statistics.median(times[1:])
            found[f"million_{name}"] = found[name] * 1e6 / samples
        return found

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
        return {
            "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(), "cupy": cupy.__version__,
            "driver": cupy.cuda.runtime.driverGetVersion(),
        }  # fmt: skip


def bench(record: Record, given) -> None:
    """The layers, one after the other; what one raises is its own."""
    runner = Bench(given.rounds)
    about = {**runner.versions(), "commit": given.commit or _commit()}
    if record.content.get("layers") and record.content.get("about") != about:
        sys.exit(f"{given.json} has figures of {record.content.get('about')}, this is {about}: expected another --json")
    for name, value in about.items():
        record.put("about", name, value)
    for name, value in runner.ceilings().items():
        record.put("ceilings", name, value)
    if (given.only or "job") in "job" and record.left > LEAST_SECONDS:
        try:
            record.put("job", "lecture", runner.job())
        except Exception:
            traceback.print_exc()
    for name, layer in LAYERS.items():
        if (given.only or "") not in name:
            continue
        if record.left < LEAST_SECONDS:
            print(f"{name}: no time left")
            continue
        try:
            found = runner.layer(*layer)
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        record.put("layers", name, found)
        print(name, found.get("failed") or {k: round(v, 2) for k, v in found["tflops"].items()}, flush=True)
        runner.torch.cuda.empty_cache()
        runner.cupy.get_default_memory_pool().free_all_blocks()


def _commit() -> str:
    """Where there is no repository, as on a machine that got a copy of its files: --commit says it."""
    words = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return found or "unknown"


def refusal(result: dict) -> str:
    """Why nothing may be put on a page; empty if it may."""
    missing = [name for name in TESTS if not result.get("tests", {}).get(name, {}).get("passed")]
    failed = [name for name, layer in result.get("layers", {}).items() if "failed" in layer]
    if missing or failed:
        return f"expected these to have passed: {', '.join(missing + failed)}"
    return "" if result.get("layers") else "expected measured layers, found none"


def _job(found: dict | None) -> list[str]:
    if not found:
        return []
    return [
        f"The lecture's job, images from the host through ten layers and back: {found['seconds']:.2f} s for "
        f"{found['samples']}, so {found['million_seconds']:.0f} s for a million; without the layers "
        f"{found['million_transfer_seconds']:.0f} s."
    ]


def page(result: dict) -> str:
    """The measured figures as Markdown."""
    about, ceilings = result["about"], result["ceilings"]
    checks = {**result["tests"], **result.get("sanitizers", {})}
    lines = [
        f"{about['device']}, {about['date']}, commit {about['commit']}; torch {about['torch']}, "
        f"cuDNN {about['cudnn']}, CuPy {about['cupy']}, driver {about['driver']}.",
        f"A copy moves {ceilings['copy_terabytes']:.2f} TB/s (read and written), torch's float32 product of 8192x8192 "
        f"matrices does {ceilings['matmul_tflops']:.1f} TFLOP/s, a call of a tiny `Conv2d` takes "
        f"{ceilings['call_microseconds']:.1f} us.",
        *_job(result.get("job", {}).get("lecture")),
        "",
        *(f"* {name}: {found['last']}" for name, found in checks.items()),
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
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: the first three")
    parser.add_argument("--json", type=Path, default=ROOT / "out/gpu.json")
    parser.add_argument("--markdown", type=Path, help="the page whose marked part is replaced")
    parser.add_argument("--seconds", type=float, default=3600, help="after which nothing new is begun")
    parser.add_argument("--only", help="tests, tools or layers with these words in their names")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arch", default="sm_90", help="of `compile`")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    parts = given.parts or PARTS[:3]
    if "compile" in parts:
        compile_ahead(given)
        if len(parts) == 1:
            return 0
    record = Record(given.json, given.seconds)
    if "page" not in parts or len(parts) > 1:
        needed = ("cupy", "torch", "pytest") if "bench" in parts else ("cupy", "pytest")
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            sys.exit(f"expected {', '.join(missing)} in this environment")
    for part in ("tests", "sanitizers", "bench"):
        if part in parts:
            {"tests": tests, "sanitizers": sanitizers, "bench": bench}[part](record, given)
    if reason := refusal(record.content):
        print(f"no page: {reason}")
        return 1 if "page" in parts else 0
    print(page(record.content))
    if given.markdown:
        given.markdown.write_text(written(given.markdown.read_text(), page(record.content)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
