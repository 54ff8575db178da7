"""Pipeline: the one door to all computing: cost -> admit -> run -> record -> answer. The same integers at every step.

In: names, arrays and encoded images from the routes.  Out: an Outcome and its answer, billed; or an error, and no bill.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import numpy as np

from . import engine, npy
from .account import ANONYMOUS, Account
from .admission import Admission, Permit
from .config import Settings
from .engine import Cost, Engine, Quote, Served, Task, pool_idle_bytes
from .errors import INTERNAL, DeadlineExceeded, InvalidRequest, NotFound, Overloaded, ServiceError, TooLarge
from .ledger import Bill, Book
from .metrics import Metrics
from .repository import Entry, State, unknown
from .scheduler import Result, Scheduler
from .wire import JSON_BYTES_PER_NUMBER, bytes_of

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)
#: Longest that a self-test may wait behind other work: a probe gives up soon after.
SELF_TEST_S = 2.0
#: How long closing waits for the model that is being loaded.
CLOSE_S = 5.0
NOT_DECODED = "the deadline passed before the images were decoded; nothing was billed"


@dataclass(frozen=True)
class Outcome:
    """A request that has run: what came out, and the bill."""

    tasks: Sequence[Task]
    results: list[Result]
    cost: Cost
    #: Whether this has been billed under its idempotency key before.
    replay: bool = False
    #: From its arrival until it was queued.
    input_s: float = 0.0

    @property
    def maps(self) -> list[dict[str, np.ndarray]]:
        return [result.maps for result in self.results]

    def parameters(self) -> dict[str, int | str | bool]:
        """The bill and how it came about, as flat scalars: what every answer carries."""
        return {
            **bill(self.cost),
            "device": self.tasks[0].device,
            "algorithm": self.tasks[0].algorithm,
            "batch_size": sum(task.count for task in self.tasks),
            **self.times(),
            **({"replay": True} if self.replay else {}),
        }

    def times(self) -> dict[str, int]:
        return {
            "queue_us": round(1e6 * max(result.queue_s for result in self.results)),
            "compute_us": round(1e6 * max(result.compute_s for result in self.results)),
        }

    def headers(self) -> dict[str, str]:
        said = self.parameters()
        replay = said.pop("replay", False)
        found = {f"X-Cconv-{name.replace('_', '-').title()}": str(value) for name, value in said.items()}
        found["Server-Timing"] = ", ".join(
            f"{name};dur={1e3 * seconds:.3f}"
            for name, seconds in (
                ("input", self.input_s),
                ("queue", said["queue_us"] / 1e6),
                ("compute", said["compute_us"] / 1e6),
            )
        )
        return {**found, "Idempotent-Replay": "true"} if replay else found


def bill(cost: Cost) -> dict[str, int]:
    """What is charged: of these a batch costs just as many times one image's as it has images."""
    return {"macs": cost.macs, "flops": cost.flops, "flops_other": cost.flops_other}


def _fingerprint(permit: Permit, tasks: Sequence[Task]) -> str:
    """A digest of all that makes a request what it is, however its body is written."""
    digest = hashlib.blake2b(permit.asked.encode(), digest_size=32)
    for task in tasks:
        digest.update(repr((task.label, task.version, task.shapes, task.options)).encode())
        for array in (task.images, *task.more):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _time_left(permit: Permit) -> float:
    """Seconds until a request's deadline; DeadlineExceeded if there are none."""
    left = permit.deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(NOT_DECODED)
    return left


class Pipeline:
    """Every route computes through this."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        admission: Admission,
        scheduler: Scheduler,
        metrics: Metrics,
        book: Book,
    ):
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.book = book
        self._admission = admission
        self._scheduler = scheduler
        engine.on_lost = scheduler.lose
        self._loader: threading.Thread | None = None
        self._changing = threading.Lock()
        # One at a time: a decoder holds several times what it returns, and nobody has counted that.
        self._decoding = threading.Lock()
        metrics.pool_idle.set_function(pool_idle_bytes)

    def enter(self, body_bytes: int | None, account: Account = ANONYMOUS) -> Permit:
        """A place in the house; the route gives it back when the answer has left."""
        return self._admission.enter(body_bytes, account)

    def close(self) -> None:
        """Stop all that computes; what waits is refused."""
        self._scheduler.close()
        if self._loader is not None:
            self._loader.join(CLOSE_S)
        self.book.close()

    def when_lost(self, act: Callable[[], None]) -> None:
        """`act` once this process can compute nothing any more, because its GPU failed."""
        self._scheduler.on_lost = act

    def refusal(self) -> str:
        """Why no work can be taken any more; "" while it can."""
        return self._scheduler.refusal()

    def self_test(self) -> None:
        """Run a small convolution; an error if that fails or gives a wrong answer."""
        x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
        task = self.engine.conv2d_task(x, np.ones((1, 1, 3, 3), np.float32), None, {})
        permit = self.enter(x.nbytes)
        permit.shorten(SELF_TEST_S)
        try:
            result = self._scheduler.run([task], permit.deadline)[0]
        finally:
            permit.release()
        if result.maps["y"].item() != 36.0:
            raise RuntimeError("the self-test's convolution gave a wrong answer")

    def start_loading(self) -> None:
        """Load the repository's models in a thread of its own, so that health answers meanwhile."""
        if self.engine.repository.pending:
            self._loader = threading.Thread(target=self._load, name="cconv-loader", daemon=True)
            self._loader.start()

    def loading(self) -> int:
        """How many models are not loaded yet."""
        return len(self.engine.repository.pending)

    def _load(self) -> None:
        """One model after the other; what is wrong with one is its own."""
        for entry in self.engine.repository.pending:
            if self.refusal():
                return
            self._load_one(entry)

    def _load_one(self, entry: Entry) -> None:
        began = time.monotonic()
        try:
            served = self.engine.open(entry)
            warm = self._warm_up(served)
        except ServiceError as error:
            entry.fail(str(error))
        except Exception:
            log.exception("model %s version %s", entry.name, entry.version)
            entry.fail(INTERNAL)
        else:
            entry.succeed(served)
            seconds = time.monotonic() - began
            log.info("model %s version %s is ready after %.1f s, %s", entry.name, entry.version, seconds, warm)

    def load(self, name: str) -> None:
        """Look at a model's folder again and serve what is there; what was served stays until that is ready.

        InvalidRequest says why, if no version can be loaded: then everything stays as it was, but for a new model.
        """
        with self._one_change():
            entries = self.engine.look(name)
            for entry in entries:
                if entry.state is State.LOADING:
                    self._load_one(entry)
            ready = any(entry.state is State.READY for entry in entries)
            if ready or name not in self.engine.repository.names:
                self.engine.repository.put(entries)
            if not ready:
                raise InvalidRequest(f"failed to load '{name}': {entries[0].reason}")

    def unload(self, name: str) -> None:
        """No version of a model of the repository is served any more; requests under way finish."""
        if name not in self.engine.names:
            raise NotFound(unknown(name))
        if name not in self.engine.repository.names:
            raise InvalidRequest(f"failed to unload '{name}': expected a model of the repository, got a built-in one")
        with self._one_change():
            for version in self.engine.repository.versions(name):
                self.engine.repository.find(name, version).unload()

    @contextmanager
    def _one_change(self) -> Iterator[None]:
        if self.loading() or not self._changing.acquire(blocking=False):
            raise Overloaded("another model is being loaded; try again")
        try:
            yield
        finally:
            self._changing.release()

    def _warm_up(self, served: Served) -> str:
        """Run a model once on what it is made for, so that its weights are packed; billed to nobody.

        What no request could do either within the limits is left undone: the model is ready, and its first run slow.
        """
        if not self.settings.warm_up_s:
            return "not warmed up"
        permit = self.enter(0)
        permit.deadline = time.monotonic() + self.settings.warm_up_s
        try:
            self._admission.sizes("shape", served.x_shape)
            permit.take(nbytes=engine.FLOAT32_BYTES * prod(served.x_shape))
            task = self.engine.task(served, np.zeros(served.x_shape, np.float32))
            self._admit(permit, [task])
            self._scheduler.run([task], permit.deadline)
        except (TooLarge, Overloaded, DeadlineExceeded) as error:
            return f"not warmed up: {error}"
        finally:
            permit.release()
        return "warmed up"

    def quote(self, served: Served, x_shape: tuple[int, ...], layers: tuple[str, ...] | None) -> Quote:
        """What a model's run will cost; computes nothing."""
        self._admission.sizes("shape", x_shape)
        return self.engine.quote(served, x_shape, layers)

    def quote_conv2d(self, x_shape: tuple[int, ...], w_shape: tuple[int, ...], options: dict) -> Quote:
        """What one conv2d will cost; computes nothing."""
        self._check_conv2d(x_shape, w_shape, options)
        return self.engine.quote_conv2d(x_shape, w_shape, **options)

    def task(
        self, served: Served, images: np.ndarray, layers: tuple[str, ...] | None, device: str = engine.AUTO
    ) -> Task:
        """A model on images (N, C, H, W) float32, or on what else it takes, counted and not yet run."""
        self._admission.sizes("shape", images.shape)
        return self.engine.task(served, images, layers, device)

    def image_tasks(
        self, served: Served, images: Sequence[np.ndarray], layers: tuple[str, ...] | None, device: str = engine.AUTO
    ) -> list[Task]:
        """A model on each array of photographs, for answers that show every image's maps."""
        tasks = [self.task(served, array, layers, device) for array in images]
        if odd := next((task for task in tasks if not task.per_image), None):
            shapes = ", ".join(f"{layer} {list(shape)}" for layer, shape in odd.quote.outputs.items())
            raise InvalidRequest(
                f"layers: expected ones that give every image maps of its own, got {shapes} for {odd.count} images; "
                f"POST /v2/models/{served.name}/infer gives any"
            )
        return tasks

    def conv2d_task(
        self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, options: dict, device: str = engine.AUTO
    ) -> Task:
        """One conv2d, counted and not yet run."""
        self._check_conv2d(x.shape, weight.shape, options)
        return self.engine.conv2d_task(x, weight, bias, options, device)

    def _check_conv2d(self, x_shape, w_shape, options: dict) -> None:
        self._admission.sizes("x", x_shape)
        self._admission.sizes("weight", w_shape)
        for name, value in options.items():
            self._admission.sizes(name, value if isinstance(value, tuple) else (value,))

    def body(self, nbytes: int) -> None:
        """Check the size of a body that has been read: one that was not announced has been checked by nobody."""
        self._admission.body(nbytes)

    def json(self, permit: Permit, nbytes: int, memory: int) -> None:
        """Make room for JSON of this size, which takes `memory` bytes once it is parsed."""
        self._admission.json(nbytes)
        permit.take(nbytes=memory)

    def images(
        self, permit: Permit, files: Sequence[tuple[str, bytes]], served: Served | None = None
    ) -> list[np.ndarray]:
        """Named JPEG, PNG and .npy files as float32 (N, C, H, W) each; uint8 of a .npy is divided by 255.

        JPEG and PNG are prepared as the model that is served declares; a .npy is a tensor and taken as it is.
        """
        if not files:
            raise InvalidRequest("body: expected a JPEG, PNG or .npy file or a multipart form of them, got nothing")
        self._admission.images(len(files))
        pixels = most = self.settings.max_pixels
        arrays = []
        for name, data in files:
            _time_left(permit)
            if data[: len(npy.MAGIC)] == npy.MAGIC:
                array = self._npy_images(permit, data, name)
            else:
                if not pixels:
                    raise InvalidRequest(f"{name}: expected at most {most} pixels in all images, got more")
                array, count = self._decode(permit, data, name, pixels, served)
                pixels -= count
            arrays.append(array)
        self._admission.images(sum(map(len, arrays)))
        return arrays

    def _decode(
        self, permit: Permit, data: bytes, name: str, pixels: int, served: Served | None
    ) -> tuple[np.ndarray, int]:
        """A picture as a batch of one, and how many pixels it came with."""
        if not self._decoding.acquire(timeout=_time_left(permit)):
            raise DeadlineExceeded(NOT_DECODED)
        try:
            picture = self.engine.decode(data, name, pixels)
            count = prod(picture.shape[1:])
            if served is not None:
                picture = self.engine.prepare(served, picture, name, self.settings.max_pixels)
            permit.take(nbytes=picture.nbytes)
            return picture[None], count
        finally:
            self._decoding.release()

    def _npy_images(self, permit: Permit, data: bytes, name: str) -> np.ndarray:
        array = npy.read(data, name)
        if array.ndim not in (3, 4):
            raise InvalidRequest(f"{name}: expected (N, C, H, W) or (C, H, W), got shape {list(array.shape)}")
        array = self.as_float32(permit, array)
        if array.dtype != np.float32:
            raise InvalidRequest(f"{name}: expected float32, or uint8 (divided by 255), got {array.dtype}")
        return array if array.ndim == 4 else array[None]

    def as_float32(self, permit: Permit, array: np.ndarray) -> np.ndarray:
        """float16 as it is, uint8 divided by 255; anything else stays what it was."""
        if array.dtype not in (np.uint8, np.float16):
            return array
        permit.take(nbytes=array.size * engine.FLOAT32_BYTES)
        return np.divide(array, 255 if array.dtype == np.uint8 else 1, dtype=np.float32)

    def run(
        self,
        permit: Permit,
        tasks: Sequence[Task],
        encode: Callable[[Outcome], Answer],
        *,
        json_numbers: int = 0,
        encoding_bytes: int = 0,
    ) -> tuple[Outcome, Answer]:
        """Admit, run and encode the tasks, and bill them when all of that went well and the record is durable.

        `json_numbers` of the outputs will be written as JSON, which takes more room; `encode` takes `encoding_bytes`
        beside them.
        """
        cost = sum((task.quote.cost for task in tasks), Cost())
        self._admission.images(sum(task.count for task in tasks))
        permit.take(nbytes=encoding_bytes)
        self._admit(permit, tasks, json_numbers * JSON_BYTES_PER_NUMBER)
        flops = cost.flops + cost.flops_other
        self._admission.spending.hold_minute(permit, flops)
        entry = self._open(permit, tasks, cost)
        submitted = time.monotonic()
        first, images = tasks[0], sum(task.count for task in tasks)
        try:
            if not entry.replay:  # which is free
                self._admission.spending.hold_month(permit, flops)
            results = self._scheduler.run(tasks, permit.deadline)
            self._admission.spending.spend_minute(permit)
            outcome = Outcome(tasks, results, cost, entry.replay, submitted - permit.began)
            try:
                computed = time.monotonic()
                answer = encode(outcome)
                output_s = time.monotonic() - computed
                billed = entry.settle(permit.deadline, bytes_out=bytes_of(answer), **outcome.times())
            except Exception:
                for task in tasks:
                    self.metrics.discarded(task.label, task.device, task.quote.flops)
                raise
        except BaseException as error:
            if isinstance(error, DeadlineExceeded) and error.computed:
                self._admission.spending.spend_minute(permit)
            entry.drop()
            self.metrics.statistics.failed(first.label, first.version, time.monotonic() - permit.began)
            raise
        self._admission.spending.spend_month(permit)
        if billed:
            self.metrics.billed(first.label, first.device, cost, images)
        self.metrics.statistics.answered(
            first.label,
            first.version,
            images,
            cost if billed else Cost(),
            success=time.monotonic() - permit.began,
            queue=max(result.queue_s for result in results),
            compute_input=outcome.input_s,
            compute_infer=max(result.compute_s for result in results),
            compute_output=output_s,
        )
        if not billed:  # a replay, or another server was quicker with the same request
            outcome = replace(outcome, replay=True)
        return outcome, answer

    def _open(self, permit: Permit, tasks: Sequence[Task], cost: Cost) -> Bill:
        """The request's entry in the ledger, before anything is computed."""
        first = tasks[0]
        return self.book.open(
            bill(cost),
            permit.key,
            lambda: _fingerprint(permit, tasks),
            account=permit.account.id,
            model=first.label,
            version=first.version,
            device=first.device,
            algorithm=first.algorithm,
            images=sum(task.count for task in tasks),
            shapes=[task.shapes for task in tasks],
            request_id=permit.request_id,
            bytes_in=permit.came(),
        )

    def _admit(self, permit: Permit, tasks: Sequence[Task], more_bytes: int = 0) -> None:
        """Room for the tasks' work, their outputs and what lies in between; `more_bytes` are the answer's."""
        flops = sum(task.quote.flops for task in tasks)
        output_bytes = sum(task.quote.output_numbers * task.images.itemsize for task in tasks) + more_bytes
        self._admission.work(flops, output_bytes)
        permit.take(nbytes=output_bytes + max(task.working_bytes() for task in tasks), flops=flops)
