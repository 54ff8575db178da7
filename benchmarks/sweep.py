"""Sweep: one constant of planning/algorithm.py over several values, on real layers, measured in turns.

In: the constant's name and values.  Out: a table of GFLOP/s (flops = 2 * macs), medians, on one thread unless told.

    python benchmarks/sweep.py CHAIN 48 96 144 192 576 [--threads 1] [--layers 256]
"""

import argparse
import statistics
import time

from workloads import LAYERS

import cconv
from cconv.planning import algorithm, plan

ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("constant")
    parser.add_argument("values", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", default="", help="only layers whose name holds this")
    arguments = parser.parse_args()
    getattr(algorithm, arguments.constant)  # a wrong name is an error before anything is measured
    cconv.set_num_threads(arguments.threads)
    for layer in (each for each in LAYERS if arguments.layers in each.name):
        x, weight, bias = layer.arrays()
        ready = {}
        for value in arguments.values:
            setattr(algorithm, arguments.constant, value)
            plan.single.cache_clear()
            plan._tiling.cache_clear()
            ready[value] = cconv.Conv2d(weight, bias, **layer.options)
            y = ready[value](x)
        seconds = {value: [] for value in ready}
        for _ in range(ROUNDS):
            for value, conv in ready.items():
                begin = time.perf_counter()
                conv(x, out=y)
                seconds[value].append(time.perf_counter() - begin)
        flops = ready[value].cost(x.shape).flops
        speeds = "  ".join(f"{v}: {flops / statistics.median(s) / 1e9:.0f}" for v, s in seconds.items())
        print(f"{layer.name:38s} {speeds}", flush=True)


if __name__ == "__main__":
    main()
