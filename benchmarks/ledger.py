"""Ledger: durable events per second, and beside them what the disk itself can do, in one run.

    python benchmarks/ledger.py [--folder FOLDER] [--postgresql URL] [--seconds 3]

In: a folder on the disk in question, or an empty PostgreSQL database.  Out: a table. The strict mode acknowledges an
event when its commit is on the disk; threads that wait share a commit. Rounds of disk and ledger take turns.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from cconv import ledger
from cconv.ledger import Event, Ledger

THREADS = (1, 8, 32, 64)
ROUNDS = 3


def syncs_per_second(folder: Path, seconds: float) -> float:
    """A page written and fdatasync, as a commit does it at least once."""
    fd = os.open(folder / "sync.bin", os.O_RDWR | os.O_CREAT)
    page = bytes(4096)
    try:
        os.pwrite(fd, bytes(1 << 16), 0)
        os.fsync(fd)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            os.pwrite(fd, page, 0)
            os.fdatasync(fd)
            count += 1
        return count / (time.perf_counter() - began)
    finally:
        os.close(fd)


def event() -> Event:
    return Event(
        account="benchmark", model="vgg16", version="1", device="cpu", algorithm="winograd", images=8,
        shapes=[{"x": [8, 3, 224, 224], "layers": ["features.16"]}], macs=10**10, flops=2 * 10**10, flops_other=10**7,
        bytes_in=1_204_224, bytes_out=10**7, queue_us=10, compute_us=100_000, request_id="benchmark",
    )  # fmt: skip


def events_per_second(book: Ledger, threads: int, seconds: float) -> tuple[float, list[float], float]:
    """Events a second, the seconds that each took, and events of a commit."""
    latencies: list[list[float]] = [[] for _ in range(threads)]
    groups, tasks = book._writer.groups, book._writer.tasks
    end = time.perf_counter() + seconds

    def work(mine: list[float]) -> None:
        while (began := time.perf_counter()) < end:
            book.append(event())
            mine.append(time.perf_counter() - began)

    began = time.perf_counter()
    workers = [threading.Thread(target=work, args=[mine]) for mine in latencies]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    taken = [one for mine in latencies for one in mine]
    size = (book._writer.tasks - tasks) / max(1, book._writer.groups - groups)
    return len(taken) / (time.perf_counter() - began), taken, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk in question")
    parser.add_argument("--postgresql", default="", help="URL of a database to measure too")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        targets = {"strict, SQLite": (f"sqlite:///{folder}/usage.db", {})}
        targets["lenient, SQLite"] = (f"sqlite:///{folder}/lenient.db", {"spool": f"{folder}/spool"})
        if given.postgresql:
            targets["strict, PostgreSQL"] = (given.postgresql, {})
        syncs: list[float] = []
        rows: dict[tuple[str, int], list] = {}
        for _ in range(ROUNDS):
            for name, (url, options) in targets.items():
                ledger.migrate(url)
                with Ledger(url, **options) as book:
                    for threads in THREADS:
                        syncs.append(syncs_per_second(Path(folder), 0.3))
                        rows.setdefault((name, threads), []).append(events_per_second(book, threads, given.seconds))
                    book.close(timeout_s=60)
        print(f"SQLite {ledger.sqlite3.sqlite_version}, {os.cpu_count()} cores, medians of {ROUNDS} rounds\n")
        print(f"the disk: {statistics.median(syncs):,.0f} fdatasync/s ({min(syncs):,.0f} to {max(syncs):,.0f})\n")
        print("| mode | threads | events/s | spread | median ms | p99 ms | events of a commit |")
        print("|---|---|---|---|---|---|---|")
        for (name, threads), found in rows.items():
            rates = [rate for rate, _, _ in found]
            taken = sorted(1e3 * one for _, mine, _ in found for one in mine)
            size = "" if name.startswith("lenient") else f"{statistics.median(size for *_, size in found):.1f}"
            print(
                f"| {name} | {threads} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} "
                f"| {statistics.median(taken):.2f} | {taken[int(0.99 * len(taken))]:.2f} | {size} |"
            )


if __name__ == "__main__":
    main()
