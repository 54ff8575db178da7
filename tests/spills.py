"""Spills: the inner loops of the multiplications hold all their sums in registers, as the built kernels say themselves.

In: the compiled core, objdump and readelf (binutils); gcc for the planted spill.
Out: exit code 0 if no vector goes to or comes from the stack in an inner loop of multiply_channels or multiply_pixels;
else the kernels that do. `make test-all` runs this.

What is checked is one compiler's output: register allocation that fails costs speed, never a result. The kernels were
written for gcc 12.2; on another major version this says so and checks nothing.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WRITTEN_FOR = "12.2"
ROOT = Path(__file__).parents[1]
#: multiply.inc.c names its kernels by their register tile: channels_14x2_f32 has 14 x 2 sums.
KERNEL = re.compile(r"(channels|pixels)_(\d+)x(\d+)_(f32|f64)$")
#: Multiply-adds; without FMA, multiplications.
PRODUCT = re.compile(r"v?(fn?madd\d*|mul)p[sd]$")
VECTOR = re.compile(r"%[xyz]mm")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Kernel:
    """A function of one ISA's object file."""

    isa: str
    name: str
    code: tuple[Instruction, ...]

    @property
    def sums(self) -> int:
        _, rows, columns, _ = KERNEL.match(self.name).groups()
        return int(rows) * int(columns)

    def inner_loops(self) -> Iterator[tuple[Instruction, ...]]:
        """Loops of products that hold no other loop: from the target of a backward jump to the jump."""
        begin = self.code[0].address
        jumps = [(i, re.match(r"([0-9a-f]+)\b", i.operands)) for i in self.code if i.name.startswith("j")]
        loops = [(int(to[1], 16), i.address) for i, to in jumps if to and begin <= int(to[1], 16) <= i.address]
        for first, last in loops:
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops):
                body = tuple(i for i in self.code if first <= i.address <= last)
                if any(PRODUCT.match(i.name) for i in body):
                    yield body

    def stack_traffic(self) -> list[Instruction]:
        """Instructions of the inner loops that move a vector to or from the stack."""
        framed = any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in self.code)
        place = re.compile(r"\(%r(sp|bp)" if framed else r"\(%rsp")
        return [
            i for body in self.inner_loops() for i in body if VECTOR.search(i.operands) and place.search(i.operands)
        ]


def _output(*command) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def kernels(binary: Path) -> list[Kernel]:
    """Every multiplication in an object file or library, with its ISA: the file that its symbols follow."""
    places, isa = {}, ""
    for line in _output("readelf", "-sW", binary).splitlines():
        words = line.split()
        if len(words) >= 8 and words[3] == "FILE":
            isa = words[7].removeprefix("isa_").removesuffix(".c")
        elif len(words) >= 8 and words[3] == "FUNC" and KERNEL.match(words[7]):
            places[int(words[1], 16)] = isa, words[7]
    found, code = [], None
    for line in _output("objdump", "-d", "--no-show-raw-insn", "-j", ".text", binary).splitlines():
        if header := re.match(r"([0-9a-f]+) <", line):
            place = places.get(int(header[1], 16))
            code = []
            if place:
                found.append((*place, code))
        elif code is not None and (match := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line)):
            code.append(Instruction(int(match[1], 16), match[2], match[3].partition("#")[0].strip()))
    return [Kernel(isa, name, tuple(code)) for isa, name, code in found]


def complaints(found: list[Kernel]) -> list[str]:
    """What is wrong with kernels, as sentences; a loop that is not found where it must be is wrong too."""
    wrong = []
    for kernel in found:
        loops = list(kernel.inner_loops())
        products = [sum(bool(PRODUCT.match(i.name)) for i in body) for body in loops]
        if not any(n and n % kernel.sums == 0 for n in products):
            wrong.append(f"{kernel.isa} {kernel.name}: expected a loop of {kernel.sums} products, found {products}")
        for i in kernel.stack_traffic():
            wrong.append(f"{kernel.isa} {kernel.name}: {i.name} {i.operands} at {i.address:x}")
    return wrong


def compiler(binary: Path) -> str:
    """The version of the gcc that made a file."""
    match = re.search(r"GCC: \(.*?\) (\d+\.\d+)", _output("readelf", "-p", ".comment", binary))
    return match[1] if match else "unknown"


#: A register tile that does not fit: 28 x 2 sums in 32 registers.
PLANTED = """
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#define T float
#define LANES 16
#define NAME(x) x##_f32
#define MASKED(op) op##_ps
#define WIDE __m512
#define TILE_ROWS 1
#define EACH_ROWS(X) X(1)
#define EACH_PIXELS(X) X(28, 2)
#include "kernels.h"
#include "simd.h"
#include "step.inc.c"
#include "multiply.inc.c"
void *kernels[] = {multiply_channels_f32, multiply_pixels_f32, (void *)widest_f32};
"""


def planted() -> list[Instruction]:
    """Spills of a kernel whose sums cannot fit."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "isa_planted.c"), Path(folder, "planted.o")
        source.write_text(PLANTED)
        flags = [
            "-std=gnu11",
            "-O3",
            "-mavx512f",
            "-mfma",
            "-mprefer-vector-width=512",
            "-w",
            "-fno-tree-slp-vectorize",
        ]
        _output("gcc", *flags, "-I", ROOT / "cconv/cpu/kernels", "-c", source, "-o", built)
        return [i for kernel in kernels(built) if kernel.sums > 32 for i in kernel.stack_traffic()]


def main() -> int:
    import cconv.cpu as core

    binaries = sorted(Path(core.__file__).parent.glob("*.so"))
    found = [kernel for binary in binaries for kernel in kernels(binary)]
    if not found:
        print(f"spills: expected kernels in {', '.join(b.name for b in binaries)}, found none", file=sys.stderr)
        return 1
    versions = {compiler(binary) for binary in binaries}
    if {v.partition(".")[0] for v in versions} != {WRITTEN_FOR.partition(".")[0]}:
        print(f"spills: skipped, the kernels were written for gcc {WRITTEN_FOR}, these are by {', '.join(versions)}")
        return 0
    if not planted():
        print("spills: a planted spill was not found: this check is blind", file=sys.stderr)
        return 1
    wrong = complaints(found)
    for line in wrong:
        print(line, file=sys.stderr)
    isas = {kernel.isa: sum(k.isa == kernel.isa for k in found) for kernel in found}
    print(f"spills: {len(wrong)} in the inner loops of {', '.join(f'{n} kernels of {isa}' for isa, n in isas.items())}")
    return bool(wrong)


if __name__ == "__main__":
    if not (shutil.which("objdump") and shutil.which("readelf")):
        sys.exit("spills: expected objdump and readelf, of binutils")
    sys.exit(main())
