"""Statistics: what has been asked of every model since the start, in the protocol's terms.

In: runs and answers.  Out: `model_stats`, as Triton's statistics extension has it, with the bill beside it.
"""

import threading
import time
from collections import Counter, defaultdict

_DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


class _Model:
    """One version of a model."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.ns: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.batches: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self.last_ms = 0

    def took(self, what: str, seconds: float) -> None:
        self.calls[what] += 1
        self.ns[what] += round(1e9 * seconds)

    def as_dict(self, name: str, version: str) -> dict:
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.counts["images"],
            "execution_count": self.counts["runs"],
            "inference_stats": {what: {"count": self.calls[what], "ns": self.ns[what]} for what in _DURATIONS},
            "batch_stats": [
                {"batch_size": size, "compute_infer": {"count": count, "ns": ns}}
                for size, (count, ns) in sorted(self.batches.items())
            ],
            **{f: self.counts[f] for f in ("macs", "flops", "flops_other")},
        }


class Statistics:
    """Of all models; none is forgotten while the process lives."""

    def __init__(self):
        self._lock = threading.Lock()
        self._models: dict[tuple[str, str], _Model] = defaultdict(_Model)

    def ran(self, model: str, version: str, images: int, seconds: float) -> None:
        """One run, of one request or several."""
        with self._lock:
            found = self._models[model, version]
            found.counts["runs"] += 1
            found.batches[images][0] += 1
            found.batches[images][1] += round(1e9 * seconds)

    def answered(self, model: str, version: str, images: int, cost, **seconds: float) -> None:
        """One request; `seconds` are of success, queue, compute_infer and so on."""
        with self._lock:
            found = self._models[model, version]
            found.last_ms = round(1000 * time.time())
            for what, count in (
                ("images", images), ("macs", cost.macs), ("flops", cost.flops), ("flops_other", cost.flops_other),
            ):  # fmt: skip
                found.counts[what] += count
            for what, took in seconds.items():
                found.took(what, took)

    def failed(self, model: str, version: str, seconds: float) -> None:
        """One request that was admitted, and came to nothing."""
        with self._lock:
            self._models[model, version].took("fail", seconds)

    def of(self, model: str, version: str) -> dict:
        with self._lock:
            found = self._models.get((model, version)) or _Model()
            return found.as_dict(model, version)
