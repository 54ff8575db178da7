"""Limits: how much an account may have in a minute and in a month, and when it may come again.

In: keys with limits, requests of known cost, a clock of the test's own.  Out: 429 with a Retry-After that holds, and
nothing computed or counted for it.
"""

import io
import threading
import time
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import admission, auth
from service.account import ANONYMOUS, Account
from service.admission import Admission, Permit, Spending
from service.config import Settings
from service.errors import DeadlineExceeded, QuotaExceeded, RateLimited
from service.metrics import Metrics

#: 2 * 20 * 20 * 50 * 50 flops, and no others.
X, W = np.ones((1, 50, 20, 20), np.float32), np.ones((50, 50, 1, 1), np.float32)
FLOPS = 2_000_000
SCOPES = frozenset(("infer",))


class Clock:
    """time.time, which runs only when it is told to."""

    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    stopped = Clock(1_000_000_041.0)  # 21 seconds into a window
    monkeypatch.setattr(time, "time", stopped)
    return stopped


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def key(path):
    """f(**limits) -> the headers of a new key with these limits."""
    return lambda *scopes, **limits: {"X-API-Key": auth.make(path, "a", scopes or ("infer", "usage"), **limits)}


@pytest.fixture
def url(tmp_path):
    ledger = pytest.importorskip("cconv.ledger", reason="the ledger's packages are not installed")
    pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")
    url = f"sqlite:///{tmp_path}/usage.db"
    ledger.migrate(url)
    return url


@pytest.fixture
def make_client(make_app, path):
    return lambda **more: make_app(api_keys=str(path), auth="on", **more).test_client()


@pytest.fixture
def send(npy):
    """f(client, headers, times) -> a conv2d of FLOPS flops; of images of noughts that are not finite, if wanted."""

    def post(client, headers, *, images=1, query="", value=1.0, **more):
        form = {
            "x": (io.BytesIO(npy(np.full_like(X, value).repeat(images, 0))), "x"),
            "weight": (io.BytesIO(npy(W)), "w"),
        }
        return client.post(f"/v1/conv2d{query}", data=form, headers={**headers, **more})

    return post


def executions(client, metrics, admin) -> float:
    text = client.get("/metrics", headers=admin).get_data(as_text=True)
    return sum(value for name, value in metrics(text).items() if name.startswith("cconv_executions_total"))


def test_a_minute_that_is_used_up_is_429_until_its_retry_after(make_client, key, send, clock, metrics):
    mine, other, admin = key(mflop_per_minute=5), key(mflop_per_minute=5), key("admin")
    client = make_client()
    assert [send(client, mine).status_code for _ in range(2)] == [200, 200]
    answer = send(client, mine)
    assert answer.status_code == 429
    assert "expected at most 5 MFLOP in a minute, got 2 more" in answer.json["error"]
    assert "X-Cconv-Flops" not in answer.headers
    assert executions(client, metrics, admin) == 2
    assert send(client, other).status_code == 200
    wait = int(answer.headers["Retry-After"])
    assert 0 < wait <= 120
    clock.now += wait - 2
    assert send(client, mine).status_code == 429
    clock.now += 2
    assert send(client, mine).status_code == 200


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 90), st.booleans()), min_size=1, max_size=30),
)
def test_whoever_waits_as_long_as_told_is_let_in(clock, most, steps):
    spending, account = Spending(lambda *_: 0), Account("a", SCOPES, mflop_per_minute=most)
    for cost, pause, computed in steps:
        permit = Permit(None, 0.0, account)
        cost = min(cost, most)
        clock.now += pause
        try:
            spending.hold_minute(permit, cost * admission.MFLOP)
        except RateLimited as error:
            clock.now += error.retry_after_s
            spending.hold_minute(permit, cost * admission.MFLOP)
        spending.spend_minute(permit) if computed else spending.give_back(permit)
    assert not spending._held_mflop


def test_no_more_are_let_in_together_than_one_after_the_other(make_client, key, send):
    mine = key(mflop_per_minute=7)
    client = make_client()
    client.get("/livez")
    codes = []
    threads = [
        threading.Thread(target=lambda: codes.append(send(client.application.test_client(), mine).status_code))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] * 3 + [429] * 5


def test_what_is_refused_costs_nothing(make_client, key, send, clock):
    mine = key(mflop_per_minute=2, mflop_per_month=2)
    client = make_client(max_images=4)
    for _ in range(3):
        assert send(client, mine, query="?format=xml").status_code == 400
        assert send(client, mine, images=5).status_code == 413
    assert send(client, mine).status_code == 200
    assert send(client, mine).status_code == 429


def test_what_was_computed_in_vain_is_of_the_minute_and_not_of_the_month(make_client, key, send, clock):
    mine = key(mflop_per_minute=2, mflop_per_month=2)
    client = make_client()
    assert send(client, mine, query="?format=json", value=np.nan).status_code == 400  # cannot be said
    assert send(client, mine).status_code == 429
    clock.now += 120
    assert send(client, mine).status_code == 200


def test_a_month_that_is_counted_for_long_keeps_up_nobody_else():
    counting, go = threading.Event(), threading.Event()

    def used(account, since, timeout_s):
        if account == "slow":
            counting.set()
            assert go.wait(30)
        return 0

    spending = Spending(used)
    slow, other = (Account(name, SCOPES, mflop_per_month=9) for name in ("slow", "other"))
    soon = time.monotonic() + 60
    thread = threading.Thread(target=lambda: spending.hold_month(Permit(None, soon, slow), 1))
    thread.start()
    assert counting.wait(30)
    spending.hold_month(Permit(None, soon, other), 1)
    with pytest.raises(DeadlineExceeded):
        spending.hold_month(Permit(None, time.monotonic(), slow), 1)
    go.set()
    thread.join()


def test_a_request_beyond_the_whole_month_is_413(make_client, key, send):
    answer = send(make_client(), key(mflop_per_month=3), images=2)
    assert answer.status_code == 413
    assert "may have in a month" in answer.json["error"]


def test_a_request_beyond_the_whole_minute_is_413_as_waiting_would_not_help(make_client, key, send):
    answer = send(make_client(), key(mflop_per_minute=3), images=2)
    assert answer.status_code == 413
    assert "which account" in answer.json["error"]
    assert "Retry-After" not in answer.headers


def test_429_is_the_accounts_and_503_the_servers(make_client, key, send):
    mine, free = key(mflop_per_minute=2), key()
    client = make_client(queue_requests=1)
    pipeline = client.application.extensions["cconv"]
    assert send(client, mine).status_code == 200
    assert send(client, mine).status_code == 429
    permit = pipeline.enter(0)
    for headers in (mine, free):
        answer = send(client, headers)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    permit.release()
    assert (send(client, mine).status_code, send(client, free).status_code) == (429, 200)


def test_the_page_says_so_too(make_client, key, send, png):
    mine = key(mflop_per_minute=2)
    client = make_client()
    send(client, mine)
    form = {"choice": "texture:level1.relu", "photograph": (io.BytesIO(png(8, 8)), "a.png")}
    answer = client.post("/", data=form, headers=mine)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0
    assert b"in a minute" in answer.data


class TestMonth:
    """Quotas."""

    def test_is_exact_survives_a_restart_and_ends_with_the_month(self, make_client, key, send, url):
        mine, other = key(mflop_per_month=5), key(mflop_per_month=5)
        client = make_client(ledger=url)
        assert [send(client, mine).status_code for _ in range(2)] == [200, 200]
        for one in (client, make_client(ledger=url)):
            answer = send(one, mine)
            assert answer.status_code == 429
            assert "got 2000000 flops more after 4000000" in answer.json["error"]
            now = datetime.now(UTC)
            assert 0 < int(answer.headers["Retry-After"]) <= 31 * 86_400
            after = datetime.fromtimestamp(now.timestamp() + int(answer.headers["Retry-After"]), UTC)
            assert (after.day, after.hour) == (1, 0)
            assert send(one, other).status_code == 200
        usage = client.get("/v1/usage?by=account", headers=mine).json
        assert usage[0]["flops"] == "4000000"

    def test_a_replay_is_free_even_when_nothing_is_left(self, make_client, key, send, url):
        mine = key(mflop_per_month=2)
        client = make_client(ledger=url)
        first, again = (send(client, mine, **{"Idempotency-Key": "k"}) for _ in range(2))
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.headers["Idempotent-Replay"] == "true"
        for name in ("k2", "k2"):  # a refusal gives its key back
            assert send(client, mine, **{"Idempotency-Key": name}).status_code == 429

    def test_computing_again_counts_in_the_minute(self, make_client, key, send, url, clock):
        mine = key(mflop_per_minute=4)
        client = make_client(ledger=url)
        codes = [send(client, mine, **{"Idempotency-Key": "k"}).status_code for _ in range(3)]
        assert codes == [200, 200, 429]

    @pytest.mark.parametrize(
        ("now", "wait"),
        [
            (datetime(2026, 12, 31, 23, 59, 50, tzinfo=UTC), 10),
            (datetime(2028, 2, 28, 0, 0, 0, tzinfo=UTC), 2 * 86_400),
            (datetime(2026, 4, 1, 0, 0, 0, tzinfo=UTC), 30 * 86_400),
        ],
    )
    def test_ends_when_the_calendar_says(self, monkeypatch, now, wait):
        asked = []

        class Now(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.moment

        Now.moment = Now.fromtimestamp(now.timestamp(), UTC)
        monkeypatch.setattr(admission, "datetime", Now)
        spending = Spending(lambda account, since, _: asked.append((account, since)) or 0)
        account = Account("a", SCOPES, mflop_per_month=1)
        soon = time.monotonic() + 60
        permit = Permit(None, soon, account)
        spending.hold_month(permit, 600_000)
        with pytest.raises(QuotaExceeded) as refused:
            spending.hold_month(Permit(None, soon, account), 400_001)
        assert refused.value.retry_after_s == wait
        spending.spend_month(permit)
        Now.moment = Now.fromtimestamp(now.timestamp() + wait, UTC)
        for _ in range(2):
            permit = Permit(None, soon, account)
            spending.hold_month(permit, 500_000)
            spending.spend_month(permit)
        months = [datetime.fromtimestamp(since / 1e6, UTC) for _, since in asked]
        assert [(month.day, month.hour) for month in months] == [(1, 0), (1, 0)]
        assert months[0] < months[1]


@pytest.fixture(params=["sqlite", "postgresql"])
def shared(request, tmp_path):
    """A ledger's URL that several servers have."""
    ledger = pytest.importorskip("cconv.ledger", reason="the ledger's packages are not installed")
    url = f"sqlite:///{tmp_path}/shared.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").create()
    ledger.migrate(url)
    return url


class TestSeveralServers:
    """One ledger, one key, one month."""

    def test_share_a_month_as_soon_as_it_is_counted_again(self, make_client, key, send, shared, monkeypatch):
        monkeypatch.setattr(admission, "COUNT_S", 1.5)
        mine = key(mflop_per_month=7)
        one, other = make_client(ledger=shared), make_client(ledger=shared)
        for client in (one, other):  # both have counted, and each knows its own since
            assert send(client, mine).status_code == 200
        counted = time.monotonic()
        assert send(one, mine).status_code == 200
        time.sleep(max(0.0, counted + 1.6 - time.monotonic()))
        answer = send(other, mine)
        assert answer.status_code == 429
        assert "got 2000000 flops more after 6000000" in answer.json["error"]
        assert send(one, mine).status_code == 429

    def test_go_beyond_it_by_no_more_than_the_others_have_meanwhile(self, make_client, key, send, shared):
        mine = key(mflop_per_month=3)
        one, other = make_client(ledger=shared), make_client(ledger=shared)
        assert [send(client, mine).status_code for client in (one, other)] == [200, 429]

    def test_may_restart_and_go_on_where_the_others_are(self, make_client, key, send, shared):
        mine = key(mflop_per_month=5)
        assert send(make_client(ledger=shared), mine).status_code == 200
        assert send(make_client(ledger=shared), mine).status_code == 200
        assert send(make_client(ledger=shared), mine).status_code == 429


class TestCounting:
    """A month is counted again; what this process bills meanwhile is never lost."""

    @pytest.fixture
    def account(self):
        return Account("a", SCOPES, mflop_per_month=10)

    @staticmethod
    def permit(account, seconds=60.0):
        return Permit(None, time.monotonic() + seconds, account)

    def bill(self, spending, account, mflop):
        permit = self.permit(account)
        spending.hold_month(permit, mflop * admission.MFLOP)
        spending.spend_month(permit)

    def test_bills_that_come_while_it_counts_are_added(self, account, monkeypatch):
        monkeypatch.setattr(admission, "COUNT_S", 0.0)
        monkeypatch.setattr(admission, "COUNT_TIMES", 0)
        under_way, recorded = [], [0]

        def used(*_):
            found = recorded[0]  # the count's own moment: what is billed after it is not of the answer
            for permit in under_way:
                spending.spend_month(permit)
                recorded[0] += 3 * admission.MFLOP
            under_way.clear()
            return found

        spending = Spending(used)
        late = self.permit(account)
        spending.hold_month(late, 3 * admission.MFLOP)
        under_way.append(late)
        self.bill(spending, account, 5)
        recorded[0] += 5 * admission.MFLOP
        with pytest.raises(QuotaExceeded, match="after 8000000"):
            spending.hold_month(self.permit(account), 3 * admission.MFLOP)

    def test_before_a_refusal_it_is_counted_again(self, account, monkeypatch):
        """What was counted too high, for a bill that was just being recorded, keeps nobody out for a month."""
        monkeypatch.setattr(admission, "REFUSE_S", 0.0)
        monkeypatch.setattr(admission, "COUNT_TIMES", 0)
        found = [9 * admission.MFLOP]
        spending = Spending(lambda *_: found[0])
        self.bill(spending, account, 1)
        found[0] = 6 * admission.MFLOP
        self.bill(spending, account, 4)
        found[0] = 10 * admission.MFLOP
        with pytest.raises(QuotaExceeded):
            self.bill(spending, account, 1)

    def test_it_is_asked_no_more_often_than_it_must_be(self, account, monkeypatch):
        asked = []
        spending = Spending(lambda *_: asked.append(1) or time.sleep(0.05) or 0)
        for _ in range(5):
            self.bill(spending, account, 1)
        assert len(asked) == 1
        monkeypatch.setattr(admission, "COUNT_S", 0.0)
        for _ in range(4):
            self.bill(spending, account, 1)
        assert len(asked) == 1, "what took 50 ms is asked once a second"
        with pytest.raises(QuotaExceeded):
            self.bill(spending, account, 2)

    def test_a_spool_whose_bills_are_not_there_yet_lowers_nothing(self, account, monkeypatch):
        monkeypatch.setattr(admission, "COUNT_S", 0.0)
        monkeypatch.setattr(admission, "COUNT_TIMES", 0)
        spending = Spending(lambda *_: 0, delayed=True)
        for _ in range(2):
            self.bill(spending, account, 4)
        with pytest.raises(QuotaExceeded, match="after 8000000"):
            self.bill(spending, account, 4)

    def test_others_do_not_wait_for_one_that_counts_again(self, account, monkeypatch):
        monkeypatch.setattr(admission, "COUNT_S", 0.0)
        counting, go = threading.Event(), threading.Event()
        spending = Spending(lambda *_: 0)
        self.bill(spending, account, 1)

        def used(*_):
            counting.set()
            assert go.wait(30)
            return 1 * admission.MFLOP

        spending._used = used
        monkeypatch.setattr(admission, "COUNT_TIMES", 0)
        thread = threading.Thread(target=self.bill, args=(spending, account, 1))
        thread.start()
        assert counting.wait(30)
        self.bill(spending, account, 2)
        go.set()
        thread.join()
        monkeypatch.setattr(admission, "COUNT_S", 60.0)
        monkeypatch.setattr(admission, "REFUSE_S", 60.0)
        with pytest.raises(QuotaExceeded, match="after 4000000"):
            self.bill(spending, account, 7)


def test_who_has_no_limits_is_not_counted():
    house = Admission(Settings(), Metrics(), used=None)
    permit = house.enter(0)
    house.spending.hold_minute(permit, 10**30)
    house.spending.hold_month(permit, 10**30)
    house.spending.spend_minute(permit)
    house.spending.spend_month(permit)
    assert permit.account is ANONYMOUS
