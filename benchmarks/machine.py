"""Machine: what this processor and its memory can do at most: FMA peak, bandwidth, and what a fresh page costs.

In: a C compiler ($CC, or cc), and how many threads.  Out: FLOP/s, bytes/s and seconds; as a command, lines of text.

    python benchmarks/machine.py [--threads 2]
"""

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: 12 sums, a multiplication and an addition each, per lane and step (machine.c).
FLOPS_PER_STEP = 24
STEPS = 2_000_000
#: Far beyond every cache of a core's share.
STREAM_BYTES = 128 << 20
FAULT_BYTES = 64 << 20
PAGE, HUGE_PAGE = 4 << 10, 2 << 20
VECTOR_BYTES = {"avx2": 32, "avx512": 64}


def _compiled() -> ctypes.CDLL:
    source = Path(__file__).with_name("machine.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "machine.so"
        compiler = os.environ.get("CC", "cc").split()
        # No -march: what a loop may use stands in its own target attribute; read_all gets vectors of the baseline.
        subprocess.run([*compiler, "-O2", "-shared", "-fPIC", "-Wno-psabi", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


class Machine:
    """The loops of machine.c, timed. ctypes lets go of the interpreter, so that Python threads run them at once."""

    def __init__(self):
        self._c = _compiled()
        self._c.fault_seconds.restype = ctypes.c_double
        self._c.fault_seconds.argtypes = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int
        self._c.read_all.argtypes = ctypes.c_void_p, ctypes.c_size_t
        self._c.copy_all.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
        widest = self._c.vector_bytes()
        self.isas = tuple(isa for isa, nbytes in VECTOR_BYTES.items() if nbytes <= widest)

    def _rate(self, threads: int, amount: float, loop: Callable[[int], None], rounds: int) -> float:
        """The best of some rounds: every thread's own rate, added. Peaks are bounds, so the best is the right one."""

        def one(index: int) -> float:
            begin = time.perf_counter()
            loop(index)
            return amount / (time.perf_counter() - begin)

        with ThreadPoolExecutor(threads) as pool:
            return max(sum(pool.map(one, range(threads))) for _ in range(rounds))

    def peak(self, isa: str, threads: int, rounds: int = 3) -> float:
        """float32 FLOP/s of fused multiply-adds in registers; float64 is half of it."""
        loop = getattr(self._c, f"fma_{isa}")
        flops = STEPS * FLOPS_PER_STEP * VECTOR_BYTES[isa] // 4
        return self._rate(threads, flops, lambda _: loop(ctypes.c_long(STEPS)), rounds)

    def bandwidth(self, threads: int, rounds: int = 3) -> dict[str, float]:
        """Bytes/s beyond the caches: read, and copied (each byte counted twice: read and written)."""
        memory = [[ctypes.create_string_buffer(STREAM_BYTES) for _ in range(2)] for _ in range(threads)]
        for source, target in memory:
            ctypes.memset(source, 1, STREAM_BYTES)
            ctypes.memset(target, 2, STREAM_BYTES)
        return {
            "read": self._rate(threads, STREAM_BYTES, lambda i: self._c.read_all(memory[i][0], STREAM_BYTES), rounds),
            "copy": self._rate(
                threads, 2 * STREAM_BYTES, lambda i: self._c.copy_all(memory[i][1], memory[i][0], STREAM_BYTES), rounds
            ),
        }

    def faults(self, rounds: int = 5) -> dict[str, float | None]:
        """Seconds of the first write to a fresh page; None where the system has no huge pages for us."""
        figures = {}
        for name, page, huge in (("page_4k", PAGE, 0), ("page_2m", HUGE_PAGE, 1)):
            seconds = min(self._c.fault_seconds(FAULT_BYTES, page, huge) for _ in range(rounds))
            figures[name] = seconds / (FAULT_BYTES // page) if seconds >= 0 else None
        return figures

    def figures(self, threads: int) -> dict:
        return {
            "peak_flops_per_s": {isa: {str(n): self.peak(isa, n) for n in {1, threads}} for isa in self.isas},
            "bytes_per_s": {str(n): self.bandwidth(n) for n in {1, threads}},
            "fault_s": self.faults(),
        }


def described(figures: dict) -> str:
    """The figures as lines."""
    lines = []
    for isa, peaks in figures["peak_flops_per_s"].items():
        lines += [f"FMA peak, {isa}, {n} threads: {peak / 1e9:.0f} GFLOP/s" for n, peak in sorted(peaks.items())]
    for n, rates in sorted(figures["bytes_per_s"].items()):
        lines.append(f"memory, {n} threads: read {rates['read'] / 1e9:.1f} GB/s, copy {rates['copy'] / 1e9:.1f} GB/s")
    small, large = figures["fault_s"]["page_4k"], figures["fault_s"]["page_2m"]
    lines.append(
        f"a fresh page of 4 KB: {small * 1e6:.2f} us ({small * 256e3:.2f} ms per MB); of 2 MB: "
        + ("none here" if large is None else f"{large * 1e6:.0f} us ({large * 500:.3f} ms per MB)")
    )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    print(described(Machine().figures(parser.parse_args().threads)))
