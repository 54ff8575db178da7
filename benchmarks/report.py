"""Report: from the record of a run to ratios, verdicts and tables.

In: the record that compare.py makes, or its JSON file.  Out: text and Markdown; plain functions, no clock, no library.

    python benchmarks/report.py out/compare-....json [--markdown docs/benchmarks.md]
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

from workloads import (
    CLASSES,
    FUNCTION_MAP,
    FUNCTION_RATIO,
    FUNCTION_TIME,
    LAYERS,
    MEAN,
    REGRET,
    WORST,
    Layer,
)

OURS = ("cconv", "cconv high", "cconv conv2d")
#: Takes one image in the usual way of using it, so it has a bar of its own on small maps.
LOOPED = "ncnn"
#: Results in an order that no array has, only a library's next layer can use: shown, and not compared with.
UNCOUNTED = "blocked"
#: Where a Markdown file holds the tables.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


class Check(NamedTuple):
    """One figure and its bar."""

    what: str
    got: float
    bar: float
    #: The bar is a most, not a least.
    most: bool = False

    @property
    def met(self) -> bool:
        return self.got <= self.bar if self.most else self.got >= self.bar

    def __str__(self) -> str:
        return (
            f"{self.what} {self.got:.2f} ({'<=' if self.most else '>='} {self.bar:g}{'' if self.met else ', MISSED'})"
        )


def layer_of(row: dict) -> Layer:
    return next(layer for layer in LAYERS if layer.name == row["layer"])


def fastest(row: dict) -> dict[str, dict]:
    """Form -> its fastest variant."""
    found = {}
    for form in row["forms"]:
        if form["name"] not in found or form["median_s"] < found[form["name"]]["median_s"]:
            found[form["name"]] = form
    return found


def peers(row: dict) -> dict[str, dict]:
    """The forms that cconv is compared with."""
    return {
        name: form for name, form in fastest(row).items() if name not in OURS and form["layout"] != UNCOUNTED
    }  # fmt: skip


def best_peer(row: dict) -> dict | None:
    return min(peers(row).values(), key=lambda form: form["median_s"], default=None)


def ratio(row: dict, ours: str = "cconv", others: dict[str, dict] | None = None) -> float | None:
    """The fastest peer's time over ours: how many times its nominal GFLOP/s we reach."""
    form = fastest(row).get(ours)
    others = peers(row) if others is None else others
    if form is None or not others:
        return None
    return min(other["median_s"] for other in others.values()) / form["median_s"]


def checks(row: dict) -> list[Check]:
    """What the row has to reach, as far as it was measured."""
    layer, forms, others = layer_of(row), fastest(row), peers(row)
    bar = CLASSES[layer.bar]
    batching = {name: form for name, form in others.items() if bar.looped is None or name != LOOPED}
    looped = {name: form for name, form in others.items() if name == LOOPED}
    found = [
        ("highest", ratio(row, "cconv", batching), bar.highest),
        ("high", ratio(row, "cconv high", batching), bar.high),
        ("over looped ncnn", ratio(row, "cconv", looped), bar.looped),
        ("conv2d over torch's function", ratio(row, "cconv conv2d", _only(others, "torch functional")), FUNCTION_RATIO),
    ]
    result = [Check(what, got, least) for what, got, least in found if got is not None and least is not None]
    if "cconv" in forms and "cconv conv2d" in forms and min(layer.x[2:]) >= FUNCTION_MAP:
        times = forms["cconv conv2d"]["median_s"] / forms["cconv"]["median_s"]
        result.append(Check("conv2d's time over Conv2d's", times, FUNCTION_TIME, most=True))
    return result


def _only(forms: dict[str, dict], name: str) -> dict[str, dict]:
    return {name: forms[name]} if name in forms else {}


def summary(record: dict) -> list[Check]:
    """The bars over all rows."""
    ratios = [found for row in record["layers"] if (found := ratio(row)) is not None]
    losses = [row["regret"]["regret"] for row in record["layers"] if "regret" in row.get("regret", {})]
    found = []
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found += [Check("geometric mean of the ratios", mean, MEAN), Check("worst ratio", min(ratios), WORST)]
    if losses:
        found.append(Check("mean regret", sum(losses) / len(losses), REGRET, most=True))
    return found


def peak(record: dict, isa: str | None = None) -> float | None:
    """FLOP/s of the run's threads, the highest or one ISA's: the most of what was seen before any layer."""
    peaks = record["peak_flops_per_s"]
    return peaks.get(isa) if isa else max(peaks.values(), default=None)


def executed_share(record: dict, row: dict, form: dict, isa: str | None = None) -> float | None:
    """What the plan's kernels issue, over the peak."""
    most = peak(record, isa)
    if not most or not form.get("executed_flops"):
        return None
    return form["executed_flops"] / form["median_s"] / (most / 2 if layer_of(row).dtype == "float64" else most)


def spread(form: dict) -> float:
    """The farther quartile's distance from the median, over the median."""
    return max(abs(quartile - form["median_s"]) for quartile in form["quartiles_s"]) / form["median_s"]


def nominal(row: dict, form: dict) -> float:
    """GFLOP/s, counting what the convolution is, whatever the algorithm issues."""
    return row["flops"] / form["median_s"] / 1e9


def names(record: dict) -> list[str]:
    """The forms of a record, in the order in which they came."""
    return list(dict.fromkeys(form["name"] for row in record["layers"] for form in row["forms"]))


def line(record: dict, row: dict) -> str:
    """A row as text: the verdict, then every form's time, spread and nominal speed."""
    parts = [*map(str, checks(row))]
    ours = fastest(row).get("cconv")
    if ours and (share := executed_share(record, row, ours)) is not None:
        parts.append(f"executed {share:.0%} of peak by {ours['plan']}")
    if "regret" in row.get("regret", {}):
        loss = row["regret"]
        best = "" if loss["chosen"] == loss["best"] else f": {loss['best']} is faster than {loss['chosen']}"
        parts.append(f"regret {loss['regret']:.0%}{best}")
    if row["foreign_share"] > 0.05:
        parts.append(f"others took {row['foreign_share']:.0%} of the processor")
    forms = "  ".join(
        f"{name} {form['median_s'] * 1e3:.3f} ms ±{spread(form):.0%} {nominal(row, form):.0f}"
        for name, form in fastest(row).items()
    )
    return f"{row['layer']}: {'; '.join(parts)}\n    {forms}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _times(record: dict) -> str:
    columns, rows = names(record), []
    for row in record["layers"]:
        forms = fastest(row)
        cells = [f"{forms[c]['median_s'] * 1e3:.3f} ±{spread(forms[c]):.0%}" if c in forms else "–" for c in columns]
        rows.append([row["layer"], *cells])
    return _table(["milliseconds", *columns], rows)


def _verdicts(record: dict) -> str:
    rows = []
    for row in record["layers"]:
        forms, best, found = fastest(row), best_peer(row), {check.what: check for check in checks(row)}

        def speed(name: str, row=row, forms=forms) -> str:
            return f"{nominal(row, forms[name]):.0f}" if name in forms else "–"

        def judged(what: str, found=found) -> str:
            check = found.get(what)
            return f"{check.got:.2f} / {check.bar:g}{'' if check.met else ' ✗'}" if check else "–"

        share = executed_share(record, row, forms["cconv"]) if "cconv" in forms else None
        loss = row.get("regret", {}).get("regret")
        rows.append([
            row["layer"], forms["cconv"]["plan"] if "cconv" in forms else "–", speed("cconv"), speed("cconv high"),
            f"{nominal(row, best):.0f} {best['name']}" if best else "–",
            judged("highest"), judged("high"), judged("over looped ncnn"),
            "–" if share is None else f"{share:.0%}",
            judged("conv2d's time over Conv2d's"), judged("conv2d over torch's function"),
            "–" if loss is None else f"{loss:.0%}",
        ])  # fmt: skip
    head = [
        "nominal GFLOP/s and ratios", "plan", "cconv", "high", "best peer", "ratio / bar", "high / bar",
        "over looped ncnn / bar", "executed, of peak", "conv2d / Conv2d time, most",
        "conv2d over F.conv2d / bar", "regret",
    ]  # fmt: skip
    return _table(head, rows)


def markdown(record: dict) -> str:
    """Where and when, the machine's figures, the verdicts and the times."""
    from machine import described

    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items() if isinstance(found, str))
    lines = [
        f"{record['date'][:10]}, commit {record['commit']}, {record['processor']}, {record['threads']} threads, "
        f"{record['rounds']} rounds; {versions or 'no peers'}.",
        "",
        *(f"* {found}" for found in described(record["machine"]).splitlines()),
        f"* others took {record['foreign_share']:.0%} of the processor while something was timed",
        *(f"* {check}" for check in summary(record)),
        "", _verdicts(record), "", _times(record),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write_markdown(record: dict, path: Path) -> None:
    """Into the file, between its two marks if it has them."""
    text = markdown(record)
    if path.exists() and BEGIN in (old := path.read_text()):
        before, rest = old.split(BEGIN, 1)
        text = f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END, 1)[1]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def closing(record: dict) -> str:
    """The last lines of a run."""
    missed = [(row["layer"], check) for row in record["layers"] for check in checks(row) if not check.met]
    lines = [f"{layer}: {check}" for layer, check in missed]
    lines += [str(check) for check in summary(record)]
    lines += [
        f"{row['layer']}: {row['regret']['missing']}"
        for row in record["layers"][:1]
        if "missing" in row.get("regret", {})
    ]
    return "\n".join([*lines, f"{len(missed)} figures below the bar"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="a JSON file that compare.py wrote")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, between its marks")
    arguments = parser.parse_args()
    read = json.loads(arguments.record.read_text())
    for each in read["layers"]:
        print(line(read, each))
    print(closing(read))
    if arguments.markdown:
        write_markdown(read, arguments.markdown)
