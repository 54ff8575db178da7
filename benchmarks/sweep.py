"""Sweep: one constant of cconv's planning over several values, on real layers, measured in turns.

In: the constant's name and values.  Out: a table of nominal GFLOP/s, medians, on one thread unless told.

    python benchmarks/sweep.py CHAIN 48 96 144 192 576 [--threads 1] [--layers 256]
"""

import argparse
import statistics
import time
from types import ModuleType

import numpy as np
from workloads import LAYERS

import cconv
from cconv import backend, planning
from cconv.planning import algorithm, cost, plan, specs
from cconv.weights import Weights

ROUNDS = 15


def owner(constant: str) -> ModuleType:
    """The module of planning that has the constant: a wrong name is an error before anything is measured."""
    for module in vars(planning).values():
        if isinstance(module, ModuleType) and constant.isupper() and hasattr(module, constant):
            return module
    raise SystemExit(f"sweep: expected a constant of cconv.planning, got {constant}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("constant")
    parser.add_argument("values", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", default="", help="only layers whose name holds this")
    arguments = parser.parse_args()
    module = owner(arguments.constant)
    cconv.set_num_threads(arguments.threads)
    twin = backend.get("cpu")
    for layer in (each for each in LAYERS if arguments.layers in each.name):
        x, *arrays = layer.arrays()
        spec = specs.conv(layer.x[1:], layer.weight, bias=True, dtype=layer.dtype, **layer.options)
        ready, y = {}, np.empty(layer.output, layer.dtype)
        for value in arguments.values:
            setattr(module, arguments.constant, value)
            tiling = algorithm.choose(spec, twin.machine())
            ready[value] = twin.build(plan.single(spec, twin.machine(), tiling), Weights(lambda _, a=arrays: a))
            ready[value].run([x], [y])
        seconds = {value: [] for value in ready}
        for _ in range(ROUNDS):
            for value, program in ready.items():
                begin = time.perf_counter()
                program.run([x], [y])
                seconds[value].append(time.perf_counter() - begin)
        flops = cost.of(spec, len(x)).flops
        speeds = "  ".join(f"{v}: {flops / statistics.median(s) / 1e9:.0f}" for v, s in seconds.items())
        print(f"{layer.name:38s} {speeds}", flush=True)


if __name__ == "__main__":
    main()
