"""The scheduler alone, on requests without a model: fair turns of clients, order inside a client, and that everything
ends. Steps and rows are counted, nothing is timed."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from quota.core.shares import Shares, fits
from quota.runtime.engine.pool import PagePool
from quota.runtime.engine.scheduler import Scheduler
from quota.runtime.engine.segments import Segments
from quota.runtime.engine.turns import Pace, Turns

PAGE, LAYERS = 4, 2


class Asked:
    """A request of `prompt` tokens that ends after `answer` more. image: visual tokens of its only image."""

    def __init__(self, order: int, client: str, prompt: int, answer: int, image: int = 0) -> None:
        self.order, self.client, self.prompt_tokens, self.wanted = order, client, prompt, answer
        self.tokens = list(range(prompt))
        self.images = [(b"%d" % order, image)] if image else []
        self.features: list[Any] = [None] * len(self.images)
        self.pages: list[list[Any]] = [[]]
        self.plan = SimpleNamespace(first_layer=None, dropped=(0,))
        self.names: list[Any] = []
        self.ahead: list[Any] = []
        self.chooses = self.paused = False
        self.prefix = 0
        self.computed = self.cached = self.preemptions = self.passed_by = self.admitted_tokens = 0

    @property
    def decoding(self) -> bool:
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt_tokens

    @property
    def gained(self) -> int:
        return len(self.tokens) - self.admitted_tokens

    @property
    def answered(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def slots(self, segment: int, tokens: int) -> int:
        return tokens

    def blocks(self, tokens: int, page_size: int) -> int:
        return -(-tokens // page_size) * LAYERS

    def hold(self, segment: int, page: Any) -> None:
        self.pages[segment].append(page)

    def release(self, pool: PagePool) -> None:
        for page in self.pages[0]:
            pool.release(page)
        self.pages, self.computed = [[]], 0

    def reusable(self, matched: list[int]) -> int:
        return 0


class Driven:
    """A scheduler whose chunks are computed by counting. given: client -> [rows decoded, rows prefilled, tokens
    encoded]."""

    def __init__(self, pages: int = 10_000, max_running: int = 64, rows: int = 32) -> None:
        self.pool = PagePool(pages * LAYERS, [LAYERS])
        storage: Any = SimpleNamespace(page_size=PAGE, copy=lambda *_: None)
        self.scheduler = Scheduler(self.pool, storage, Segments((0, LAYERS)), max_running)
        self.max_running, self.rows, self.steps, self.orders = max_running, rows, 0, 0
        self.given: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.ended: dict[int, int] = {}  # order of arrival -> step
        self.first: list[Asked] = []  # in order of their first tokens

    def ask(self, client: str, prompt: int, answer: int, image: int = 0) -> Asked:
        made: Any = Asked(self.orders, client, prompt, answer, image)
        self.orders += 1
        self.scheduler.queue(made)
        return made

    def step(self) -> None:
        scheduler, rows = self.scheduler, self.rows
        scheduler.admit(rows)
        chunks = scheduler.decodes(min(rows, self.max_running))
        assert len(chunks) <= min(rows, self.max_running)
        for asked, number in scheduler.images(rows):
            asked.features[number] = True
            self.given[asked.client][2] += asked.images[number][1]
        prefills = scheduler.prefills(rows)
        assert sum(chunk.end - chunk.begin for chunk in prefills) <= rows
        for kind, planned in enumerate((chunks, prefills)):
            for chunk in planned:
                asked = chunk.sequence
                assert asked in scheduler.running and chunk.begin == asked.computed
                self.given[asked.client][kind] += chunk.end - chunk.begin
                asked.computed = chunk.end
                if chunk.end == len(asked.tokens):
                    self._gain(asked)
        self.steps += 1
        if self.pool.blocks < 200:
            self.pool.check_integrity([page for asked in scheduler.running for page in asked.pages[0]])

    def _gain(self, asked: Any) -> None:
        if not asked.answered:
            self.first.append(asked)
        asked.tokens.append(0)
        if asked.answered == asked.wanted:
            self.scheduler.remove(asked)
            self.ended[asked.order] = self.steps

    def until(self, asked: Asked, most: int) -> int:
        """Steps until it has ended."""
        began = self.steps
        while asked.order not in self.ended and self.steps - began < most:
            self.step()
        assert asked.order in self.ended, f"not answered after {most} steps"
        return self.steps - began

    def to_the_end(self, most: int) -> None:
        while self.scheduler.busy and self.steps < most:
            self.step()
        assert not self.scheduler.busy, f"{len(self.scheduler.running)} run, {len(self.scheduler.waiting)} wait"
        assert self.pool.available == self.pool.blocks


@pytest.mark.parametrize("kind", ["answers", "prompts", "images"])
@pytest.mark.parametrize("pages", [10_000, 400])
def test_a_short_request_is_held_up_by_no_crowd(kind, pages):
    """50 requests of another client in full swing, in a roomy pool and in one they fill."""
    made = Driven(pages)
    prompt, answer, image = {"answers": (9, 400, 0), "prompts": (900, 50, 0), "images": (60, 50, 40)}[kind]
    for _ in range(50):
        made.ask("crowd", prompt, answer, image)
    for _ in range(60):
        made.step()
    short = made.ask("one", 10, 6, 8)
    assert made.until(short, 20) <= 6 + 3


def test_a_crowd_of_clients_shares():
    """Seven clients with one request each beside one with fifty: all have what a client may have."""
    made = Driven(rows=16, max_running=16)
    for _ in range(50):
        made.ask("crowd", 40, 300)
    for _ in range(30):
        made.step()
    for name in "abcdefg":
        made.ask(name, 40, 10_000)
    for _ in range(60):
        made.step()
    before = {client: given[0] for client, given in made.given.items()}
    for _ in range(100):
        made.step()
    gained = {client: given[0] - before[client] for client, given in made.given.items()}
    assert all(gained[name] == 100 for name in "abcdefg"), gained  # one row a step is all that they ask for
    assert gained["crowd"] == 100 * (16 - 7)  # and the crowd has the rest


@pytest.mark.parametrize("kind", ["decoded", "prefilled"])
@pytest.mark.parametrize("seed", range(3))
def test_clients_that_ask_on_get_equal_rows(kind, seed):
    """However their work is cut: always enough of it, and no client is two steps' rows behind another."""
    rng = random.Random(seed)
    made = Driven(rows=24)
    for name in "abcd":
        for _ in range(100):
            if kind == "decoded":
                made.ask(name, rng.randint(1, 3), rng.randint(80, 200))
            else:
                made.ask(name, rng.randint(1, 100 if name in "ab" else 7) + (60 if name == "a" else 0), 1)
    number, before = ("decoded", "prefilled").index(kind), Counter[str]()
    for step in range(30 if kind == "prefilled" else 60):
        made.step()
        if step == 15:
            before = Counter({name: made.given[name][number] for name in "abcd"})
    gained = [made.given[name][number] - before[name] for name in "abcd"]
    assert min(gained) > 0 and max(gained) - min(gained) <= 2 * 24, gained


def test_turns_are_not_saved_up():
    """A client that was away does not make up for it."""
    made = Driven(rows=8, max_running=8)
    for _ in range(20):
        made.ask("always", 100, 50)
    for _ in range(200):
        made.step()
    before = made.given["always"][1]
    for _ in range(20):
        made.ask("again", 100, 50)
    for _ in range(40):
        made.step()
    share = made.given["again"][1]
    assert abs(share - (made.given["always"][1] - before)) <= 2 * 8


def test_requests_of_a_client_go_in_order():
    for rows in (3, 17, 500):
        made = Driven(rows=rows, max_running=5)
        rng = random.Random(rows)
        for _ in range(40):
            made.ask(rng.choice("ab"), rng.randint(1, 60), rng.randint(1, 30))
        made.to_the_end(10_000)
        for name in "ab":
            orders = [asked.order for asked in made.first if asked.client == name]
            assert orders == sorted(orders)


@pytest.mark.parametrize("seed", range(12))
def test_everything_ends_in_a_small_pool(seed):
    """Clients, sizes and arrivals at random; the largest request takes nearly the whole pool."""
    rng = random.Random(seed)
    pages = rng.choice((12, 30, 60))
    made = Driven(pages, max_running=rng.choice((1, 3, 64)), rows=rng.choice((4, 16, 200)))
    clients = rng.choice(("a", "ab", "abcdef"))
    asked = []
    for _ in range(60):
        prompt = rng.randint(1, pages * PAGE - 1) if rng.random() < 0.2 else rng.randint(1, 20)
        answer = rng.randint(1, pages * PAGE - prompt)
        asked.append(made.ask(rng.choice(clients), prompt, answer))
        for _ in range(rng.choice((0, 1, 4))):
            made.step()
        if rng.random() < 0.1:
            paused = rng.choice(asked)
            if paused.order not in made.ended:
                made.scheduler.pause(paused)
                made.step()
                assert not paused.pages[0]
                paused.paused = False
    made.to_the_end(200_000)
    assert len(made.ended) == 60


def test_a_request_is_preempted_by_others_ever_more_rarely():
    """Each time it has gained twice as many tokens since; so what is computed again stays in proportion."""
    made = Driven(pages=40)
    large = made.ask("large", 100, 55)
    made.until(made.ask("x", 4, 1), 20)
    for number in range(400):
        if large.order in made.ended:
            break
        made.ask(f"small {number}", 20, 20)
        made.step()
    assert 0 < large.preemptions <= math.log2(55) + 1


@pytest.mark.parametrize("fresh", [True, False])
def test_what_needs_the_whole_pool_gets_it(fresh):
    """Beside an endless stream of small requests, of new clients or of one."""
    made = Driven(pages=30)
    for _ in range(8):
        made.ask("small 0", 12, 8)
        made.step()
    large = made.ask("large", 100, 20)
    for number in range(3000):
        if large.order in made.ended:
            break
        if len(made.scheduler.waiting) < 9:
            made.ask(f"small {number if fresh else 0}", 12, 8)
        made.step()
    assert large.order in made.ended


def test_endless_new_clients_starve_nobody():
    """Each asks for one prompt that fills a step, and eight wait at any time."""
    made = Driven(rows=10)
    long = made.ask("long", 400, 5)
    for _ in range(600):
        while len(made.scheduler.waiting) < 8:
            made.ask(f"new {made.orders}", 10, 1)
        made.step()
    assert long.order in made.ended and made.ended[long.order] < 10 * 45


def test_a_paused_request_has_no_turn_and_no_pages():
    made = Driven(pages=40)
    first, second = made.ask("a", 10, 50), made.ask("a", 10, 5)
    for _ in range(5):
        made.step()
    made.scheduler.pause(first)
    tokens = len(first.tokens)
    made.until(second, 20)
    assert len(first.tokens) == tokens and not first.pages[0] and not made.scheduler.busy
    first.paused = False
    made.until(first, 100)


def test_turns_are_deterministic():
    def orders() -> list[int]:
        made = Driven(pages=40, rows=12, max_running=6)
        rng = random.Random(3)
        for _ in range(40):
            made.ask(rng.choice("abc"), rng.randint(1, 40), rng.randint(1, 30))
        made.to_the_end(10_000)
        return list(made.ended)

    assert orders() == orders()


def test_virtual_time():
    """The client that was given least is next; ties go to the older request; who comes anew starts at the clock."""
    turns = Turns()
    requests = [SimpleNamespace(client=client, order=order) for order, client in enumerate("aabbc")]
    seen = []
    for request in turns.start(requests):
        seen.append(request.order)
        turns.charge(request.client, 5 if request.client == "a" else 1)
    assert seen == [0, 2, 4, 3, 1]
    new = [SimpleNamespace(client=client, order=order) for order, client in enumerate("abcd", 5)]
    assert [request.client for request in turns.start(new)] == ["b", "c", "d", "a"]


def test_shares_leave_room():
    """A client alone gets half, and whatever clients take, one that comes later finds room."""
    shares = Shares(100)
    assert shares.take("a", 50) and not shares.take("a", 1)
    assert shares.take("b", 25) and not shares.take("b", 1) and shares.take("c", 12)
    shares.give_back("a", 50)
    assert shares.total == 37 and shares.take("b", 6) and not shares.take("d", 40)
    held = Shares(1000)
    rng = random.Random(1)
    counts: Counter[str] = Counter()
    for _ in range(5000):
        client, amount = str(rng.randint(0, 9)), rng.randint(1, 60)
        if held.take(client, amount):
            counts[client] += amount
        assert held.total == counts.total() < 1000
    assert max(counts.values()) <= 500 and fits(1000, held.total, 0, (1000 - held.total) // 2)


def test_pace():
    """Rows follow the time a step took, between a few and the limit; small steps tell nothing, endless ones do."""
    pace = Pace(512, 0.25)
    first = pace.rows
    for _ in range(10):
        pace.observe(pace.rows, 0.01)
    assert first < pace.rows == 512
    pace.observe(512, 1.0)
    assert pace.rows == 128
    pace.observe(3, 0.001)
    assert pace.rows == 128
    pace.observe(100, 0.25)
    assert pace.rows == 128
    for _ in range(10):
        pace.observe(pace.rows, 60.0)
    assert 1 <= pace.rows <= 8
    assert Pace(512, math.inf).rows == 512 and Pace(7, 0.25).rows == 7


def test_a_prompt_whose_tokens_see_each_other_is_not_cut() -> None:
    scheduler = Driven().scheduler
    for order, prefix in enumerate((50, 0)):
        asked = Asked(order, "ab"[order], 50, 1)
        asked.prefix = prefix
        scheduler.queue(asked)
    scheduler.admit(100)
    for rows, whole in ((8, [50]), (20, [20])):
        assert [chunk.end - chunk.begin for chunk in scheduler.prefills(rows)] == whole
