"""Tables: numbers and shapes as text that a person reads.

In: rows of values.  Out: lines.
"""

from collections.abc import Iterable

SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    for unit, size, digits in (("d", 86400, 2), ("h", 3600, 2), ("min", 60, 1), ("s", 1, 2), ("ms", 1e-3, 2)):
        if seconds >= size * (2 if unit == "d" else 1):
            return f"{seconds / size:,.{digits}f} {unit}"
    return f"{seconds * 1e6:,.2f} us"


def scaled(value: float) -> str:
    """12e12 as "12 T", 0.15e12 as "0.15 T"."""
    suffix, scale = next(((s, v) for s, v in reversed(SUFFIXES.items()) if value >= v / 10), ("", 1.0))
    return f"{value / scale:.4g} {suffix}".rstrip()


def dimensions(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def table(header: tuple[str, ...], rows: list[tuple], total: tuple | None = None) -> str:
    """Columns of text; ints get thousands separators and stand to the right."""
    body = [*rows, total] if total else rows
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in body]
    numeric = [any(isinstance(row[i], int) for row in body) for i in range(len(header))]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    places = [f"{{:{'>' if right else '<'}{width}}}" for right, width in zip(numeric, widths, strict=True)]
    lines = ["  ".join(places).format(*row).rstrip() for row in [header, *cells]]
    rule = "-" * max(map(len, lines))
    lines.insert(1, rule)
    if total:
        lines.insert(-1, rule)
    return "\n".join(lines)
