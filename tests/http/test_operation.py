"""Operation: what an operator sees of the service: traces and logs; and a compute thread that hangs.

In: requests with a traceparent, a server that logs JSON, a run that never ends.  Out: headers, lines, an end of the
process after which another one serves.
"""

import json
import os
import re
import threading
import time

import numpy as np
import pytest

from service import auth
from service.admission import Permit
from service.config import Settings
from service.engine import Engine
from service.errors import DeadlineExceeded
from service.metrics import Metrics
from service.scheduler import Scheduler
from service.trace import Trace

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SECRET = "hush"


class TestTrace:
    """traceparent"""

    def test_goes_on_in_the_answer_with_a_span_of_its_own(self, client):
        spans = set()
        for address, status in (("/livez", 200), ("/nowhere", 404), ("/v2/models/nonesuch", 404)):
            answer = client.get(address, headers={"traceparent": PARENT})
            assert answer.status_code == status
            version, trace, span, flags = answer.headers["traceparent"].split("-")
            assert (version, trace, flags) == ("00", PARENT[3:35], "01")
            spans.add(span)
        assert len(spans) == 3
        assert PARENT[36:52] not in spans

    @pytest.mark.parametrize(
        "parent",
        [
            "", "x", PARENT[:-1], PARENT + "0", PARENT + "-x", PARENT.upper(), "ff" + PARENT[2:],
            PARENT.replace("-", ""),
            f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-{PARENT[3:35]}-{'0' * 16}-01", "é" * 55, PARENT * 100,
        ],
    )  # fmt: skip
    def test_what_is_none_begins_a_new_one(self, parent):
        one, other = Trace.of(parent), Trace.of(parent)
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", one.header())
        assert one.trace_id not in (other.trace_id, PARENT[3:35])

    def test_later_versions_are_read_as_far_as_they_are_known(self):
        assert Trace.of("cc" + PARENT[2:] + "-more").trace_id == PARENT[3:35]


class TestLog:
    """CCONV_LOG_FORMAT=json"""

    def test_has_a_line_for_every_request_and_nothing_secret(self, start_server, tmp_path, infer_json):
        keys = tmp_path / "keys.json"
        key = auth.make(keys, "a", ("infer",))
        server = start_server(CCONV_LOG_FORMAT="json", CCONV_API_KEYS=str(keys), CCONV_MODELS="edges")
        x = np.zeros((1, 3, 8, 8), np.float32)
        headers = {"Authorization": f"Bearer {key}", "traceparent": PARENT, "X-Request-Id": "r-7"}
        body = infer_json(x, id=SECRET)
        status, answered, _ = server.ask(f"/v2/models/edges/infer?x={SECRET}", body, headers)
        assert (status, answered["X-Request-Id"]) == (200, "r-7")
        assert server.ask("/v1/conv2d", SECRET.encode(), headers)[0] == 400
        assert server.ask("/v1/conv2d", SECRET.encode(), {"X-API-Key": SECRET, "X-Request-Id": "no good"})[0] == 401
        assert server.ask(f"/{SECRET}")[0] == 404
        assert server.ask(f"/v2/models/{SECRET}", headers=headers)[0] == 404
        server.stop()
        text = server.log.read_text()
        assert SECRET not in text
        assert key.split("_", 2)[2] not in text
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        requests = [
            line for line in lines if line["logger"] == "service.requests" and line["route"] not in ("/readyz",)
        ]
        assert [line["status"] for line in requests] == [200, 400, 401, 404, 404]
        one = requests[0]
        assert one["trace_id"] == PARENT[3:35]
        assert one["account"] == key.split("_")[1]
        assert (one["request_id"], one["model"], one["method"]) == ("r-7", "edges", "POST")
        assert one["route"] == "/v2/models/<name>/infer"
        assert one["macs"] == answered["X-Cconv-Macs"]
        assert one["seconds"] > 0
        assert (requests[2]["account"], requests[2]["request_id"]) == ("anonymous", "")

    def test_is_text_unless_asked_for(self):
        with pytest.raises(ValueError, match="CCONV_LOG_FORMAT: expected text or json, got 'xml'"):
            Settings(log_format="xml")


class TestWatchdog:
    """A run that does not look at its cancel flag."""

    @pytest.fixture
    def task(self):
        x = np.ones((1, 1, 3, 3), np.float32)
        return Engine(("edges",)).conv2d_task(x, x, None, {})

    def _with(self, task, run):
        object.__setattr__(task, "run", run)
        return task

    def test_is_noticed_after_its_deadline_and_not_before(self, task):
        told, go_on = [], threading.Event()
        scheduler = Scheduler(
            Metrics(), 1, watchdog_s=0.2, on_stuck=lambda reason: told.append((time.monotonic(), reason))
        )
        deadline = time.monotonic() + 0.3
        with pytest.raises(DeadlineExceeded):
            scheduler.run([self._with(task, lambda images, cancel: go_on.wait(20) and {"y": images})], deadline)
        end = time.monotonic() + 10
        while not told and time.monotonic() < end:
            time.sleep(0.01)
        go_on.set()
        scheduler.close()
        ((when, reason),) = told
        assert when >= deadline + 0.2
        assert reason == "a run of conv2d has not ended 0.2 s after its deadline"

    def test_leaves_long_work_within_its_deadline_and_idleness_alone(self, task):
        told = []
        scheduler = Scheduler(Metrics(), 1, watchdog_s=0.05, on_stuck=told.append)
        slow = self._with(task, lambda images, cancel: time.sleep(0.4) or {"y": images})
        scheduler.run([slow], time.monotonic() + 20)
        time.sleep(0.3)
        scheduler.close()
        assert told == []

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_notices_a_compute_thread_that_has_ended(self, task):
        told = []
        scheduler = Scheduler(Metrics(), 1, watchdog_s=0.05, on_stuck=told.append)

        def end(images, cancel):
            raise SystemExit

        with pytest.raises(DeadlineExceeded):
            scheduler.run([self._with(task, end)], time.monotonic() + 0.5)
        scheduler.close()
        assert told == ["a compute thread has ended"]

    def test_ends_the_process_and_another_one_serves(self, start_server, tmp_path):
        """Under gunicorn, with a model whose run hangs."""
        hook = tmp_path / "sitecustomize.py"
        hook.write_text(
            "import threading, time\n"
            "def patch():\n"
            "    import service.slices as slices\n"
            "    slow = slices.conv2d\n"
            "    def hang(compute, x, *rest):\n"
            "        if x.shape[-1] == 13: time.sleep(60)\n"
            "        return slow(compute, x, *rest)\n"
            "    slices.conv2d = hang\n"
            "import importlib.abc, sys\n"
            "class Finder(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name == 'service.pipeline': patch()\n"
            "sys.meta_path.insert(0, Finder())\n"
        )
        path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", ""))))
        server = start_server(
            CCONV_WATCHDOG_SECONDS="1", CCONV_DEADLINE_SECONDS="1", CCONV_MODELS="edges", PYTHONPATH=path
        )
        content = {"x": np.zeros((1, 1, 13, 13)).tolist(), "weight": [[[[1.0]]]]}
        assert server.ask("/v1/conv2d", json.dumps(content).encode())[0] == 504
        end = time.monotonic() + 20
        while "this process ends itself" not in server.log.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        server.wait_until_ready()
        assert (
            "a run of conv2d has not ended 1 s after its deadline; this process ends itself" in server.log.read_text()
        )
        content["x"] = np.zeros((1, 1, 5, 5)).tolist()
        assert server.ask("/v1/conv2d", json.dumps(content).encode())[0] == 200


def test_a_permit_knows_when_it_began():
    began = time.monotonic()
    assert began <= Permit(None, 0.0, None).began <= time.monotonic()
