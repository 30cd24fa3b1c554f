"""The queue: whose turn it is, what outlives whom, and that no two jobs that waited are on a card together."""

import random
from pathlib import Path

import pytest
from filelock import FileLock

from studio.core.errors import BadInput, StudioError
from studio.runs.control import request, requested
from studio.runs.queue import CPU, Queue, Turn, place_key, wait_for_turn
from tests.fakes.runs import make_run

CARD, OTHER = "GPU-1", "GPU-2"


class Waiter:
    """A run that waits, and the lock by which its worker would be known to live."""

    def __init__(self, home: Path, queue: Queue, name: str, *places: str) -> None:
        self.paths = make_run(home, name)
        self.queue = queue
        self.lock = FileLock(self.paths.lock)
        self.hold: FileLock | None = None
        self.lock.acquire()
        request(self.paths, "queued")
        queue.add(self.paths, {key: {"CARD": key} for key in places or (CARD,)})

    def look(self) -> Turn:
        turn = self.queue.take_turn(self.paths)
        self.hold = turn.hold
        return turn

    def end(self) -> None:
        """End, in whatever way: the system frees both locks."""
        self.lock.release()
        if self.hold is not None:
            self.hold.release()
            self.hold = None


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


def _names(queue: Queue) -> list[str]:
    return [entry.run.name.split("-")[0] for entry in queue.waiting()]


def test_first_come_first_served_whoever_looks_first(queue: Queue, tmp_path: Path) -> None:
    one, two = Waiter(tmp_path, queue, "one"), Waiter(tmp_path, queue, "two")
    assert (two.look().hold, two.look().before) == (None, 1)
    assert one.look().environment == {"CARD": CARD}
    assert (_names(queue), requested(one.paths, "queued")) == (["two"], False)
    turn = two.look()
    assert (turn.hold, turn.before, turn.at_work) == (None, 0, (one.paths.name,))
    one.end()
    assert two.look().hold is not None
    assert _names(queue) == []


def test_a_job_that_did_not_wait_keeps_the_card_from_those_that_do(queue: Queue, tmp_path: Path) -> None:
    waiter, other = Waiter(tmp_path, queue, "one"), make_run(tmp_path, "other")
    beside = [queue.take(paths, CARD) for paths in (other, make_run(tmp_path, "another"))]  # two may share a card
    assert [paths.name.split("-")[0] for paths in queue.at_work(CARD)] == ["another", "other"]
    for lock in beside:
        assert waiter.look().hold is None
        assert lock is not None
        lock.release()
    assert queue.at_work(CARD) == []
    assert waiter.look().hold is not None


def test_the_card_that_is_free_is_taken_and_the_first_has_the_choice(queue: Queue, tmp_path: Path) -> None:
    busy = queue.take(make_run(tmp_path, "busy"), CARD)
    assert busy is not None
    either, only = Waiter(tmp_path, queue, "either", CARD, OTHER), Waiter(tmp_path, queue, "only", OTHER)
    assert only.look().hold is None  # the free card is the first one's, who has not looked yet
    assert either.look().environment == {"CARD": OTHER}
    either.end()
    assert only.look().environment == {"CARD": OTHER}


def test_runs_are_moved_and_cancelled_and_one_that_does_not_wait_is_refused(queue: Queue, tmp_path: Path) -> None:
    one, two, three = (Waiter(tmp_path, queue, name) for name in ("one", "two", "three"))
    queue.move(three.paths, 0)
    queue.move(one.paths, 99)
    assert _names(queue) == ["three", "two", "one"]
    queue.remove(two.paths)
    queue.remove(two.paths)
    assert (_names(queue), requested(two.paths, "queued")) == (["three", "one"], False)
    with pytest.raises(BadInput, match="does not wait in the queue"):
        queue.move(two.paths, 0)


def test_one_whose_worker_died_keeps_its_place_and_holds_nobody_up(queue: Queue, tmp_path: Path) -> None:
    one, two = Waiter(tmp_path, queue, "one"), Waiter(tmp_path, queue, "two")
    one.end()
    assert [entry.alive for entry in queue.waiting()] == [False, True]
    assert two.look().hold is not None
    assert _names(queue) == ["one"]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"schema": 9}', '{"schema": 1, "waiting": [{"run": 3}, {"run": "/x", "places": {}}]}']
)
def test_a_damaged_order_is_no_order_and_who_waits_is_served_still(queue: Queue, tmp_path: Path, damage: str) -> None:
    waiter = Waiter(tmp_path, queue, "one", CARD)
    (tmp_path / "queue" / "order.json").write_text(damage)
    assert queue.waiting() == []
    busy = queue.take(make_run(tmp_path, "busy"), CARD)
    assert busy is not None
    assert queue.take_turn(waiter.paths, CARD).hold is None  # it waits for the card that it was launched for
    busy.release()
    turn = queue.take_turn(waiter.paths, CARD)
    assert turn.hold is not None
    assert [paths.name for paths in queue.at_work(CARD)] == [waiter.paths.name]


def test_a_queue_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "queue").write_text("a file")
    run = make_run(tmp_path, "one")
    with pytest.raises(StudioError, match=r"the queue in .* cannot be written"):
        Queue(tmp_path).add(run, {CPU: {}})
    assert Queue(tmp_path).take(run, CPU) is None  # a job that need not wait goes on
    assert Queue(tmp_path).at_work(CPU) == []


def test_who_waits_is_told_what_changes_and_leaves_when_cancelled(queue: Queue, tmp_path: Path) -> None:
    one, two = Waiter(tmp_path, queue, "one"), Waiter(tmp_path, queue, "two")
    told: list[Turn] = []
    looks = iter([lambda: None, lambda: None, one.look, lambda: request(two.paths, "stop")])
    turn = wait_for_turn(
        two.paths,
        lambda: requested(two.paths, "stop"),
        told.append,
        lambda seconds: next(looks)() and None,
        queue=queue,
    )
    assert turn is None
    assert [(turn.before, turn.at_work) for turn in told] == [(1, ()), (0, (one.paths.name,))]
    assert _names(queue) == []


@pytest.mark.parametrize("seed", range(8))
def test_no_two_that_wait_share_a_card_and_none_is_lost(queue: Queue, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  the same order each time
    cards = [CARD, OTHER, "GPU-3"]
    waiters = [
        Waiter(tmp_path, queue, f"r{number}", *chance.sample(cards, chance.randint(1, 3))) for number in range(9)
    ]
    by_path = {waiter.paths: waiter for waiter in waiters}
    served: list[Waiter] = []
    cancelled: list[Waiter] = []
    working: dict[str, Waiter] = {}
    while queue.waiting() or working:
        entries = queue.waiting()
        act = chance.random()
        if working and (act < 0.3 or not entries):
            working.pop(chance.choice(sorted(working))).end()
        elif act < 0.4:
            queue.move(chance.choice(entries).run, chance.randint(0, 9))
        elif act < 0.45:
            cancelled.append(by_path[chance.choice(entries).run])
            queue.remove(cancelled[-1].paths)
            cancelled[-1].end()
        else:
            waiter = by_path[chance.choice(entries).run]
            turn = waiter.look()
            if turn.hold is not None:
                card = turn.environment["CARD"]
                assert card not in working
                working[card] = waiter
                served.append(waiter)
                # Whoever is before it and could have taken this card has another free one to take first.
                before = entries[: [entry.run for entry in entries].index(waiter.paths)]
                rivals = [entry for entry in before if card in entry.places]
                free = set(cards) - working.keys()
                assert all(free & entry.places.keys() for entry in rivals)
    assert sorted(waiter.paths.name for waiter in (*served, *cancelled)) == sorted(w.paths.name for w in waiters)


def test_a_card_without_a_name_is_the_cpu() -> None:
    assert (place_key(""), place_key("GPU-1")) == ("cpu", "GPU-1")
