"""Probe: one question for all, never an old answer, never a hang. On the virtual clock."""

import pytest
import trio
import trio.testing

from trioserver.gateway.probe import Probe


class Oracle:
    """Counts its answers; takes ``seconds`` for each, and raises if it is told to."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.error: Exception | None = None
        self.asked = 0

    async def __call__(self) -> int:
        """Answer with the number of the question."""
        self.asked += 1
        answer = self.asked
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return answer


def probe(oracle: Oracle) -> Probe[int]:
    """Return a probe whose answers are good for 0.1 s, and may take 1 s."""
    return Probe(oracle, unknown=-1, fresh_seconds=0.1, timeout_seconds=1.0)


async def test_all_who_ask_at_once_share_one_answer(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A hundred callers, also those that come while it is being asked, cost one question."""
    oracle = Oracle(0.5)
    shared = probe(oracle)
    nursery.start_soon(shared.run)
    answers: list[int] = []

    async def call(delay: float) -> None:
        await trio.sleep(delay)
        answers.append(await shared.get())

    async with trio.open_nursery() as callers:
        for number in range(100):
            callers.start_soon(call, number / 1000)

    assert [1] * 100 == answers
    assert 1 == oracle.asked
    nursery.cancel_scope.cancel()


async def test_an_answer_is_given_again_only_while_it_is_fresh(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Within 0.1 s the same answer, after that a new one, and none is asked for in advance."""
    oracle = Oracle()
    shared = probe(oracle)
    nursery.start_soon(shared.run)

    first = [await shared.get(), await shared.get()]
    await trio.sleep(0.2)
    assert 1 == oracle.asked
    second = await shared.get()

    assert ([1, 1], 2) == (first, second)
    nursery.cancel_scope.cancel()


async def test_a_question_that_hangs_is_cut_off(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """After the timeout the answer is "unknown", and the next question is a new one."""
    oracle = Oracle(1e9)
    shared = probe(oracle)
    nursery.start_soon(shared.run)

    began = trio.current_time()
    hung = await shared.get()
    took = trio.current_time() - began
    oracle.seconds = 0.0
    await trio.sleep(0.2)

    assert (-1, 2) == (hung, await shared.get())
    assert took == pytest.approx(1.0)
    nursery.cancel_scope.cancel()


async def test_what_goes_wrong_means_unknown(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A question that raises is "unknown", and the probe lives."""
    oracle = Oracle()
    oracle.error = RuntimeError("no oracle today")
    shared = probe(oracle)
    nursery.start_soon(shared.run)

    first = await shared.get()
    oracle.error = None
    await trio.sleep(0.2)

    assert (-1, 2) == (first, await shared.get())
    nursery.cancel_scope.cancel()


async def test_a_caller_that_goes_away_takes_nothing_with_it(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """When the one who asked first is cancelled, the others get the answer all the same."""
    oracle = Oracle(0.5)
    shared = probe(oracle)
    nursery.start_soon(shared.run)
    answers: list[int] = []

    async def call() -> None:
        answers.append(await shared.get())

    async with trio.open_nursery() as callers:
        with trio.move_on_after(0.1):
            await shared.get()
        callers.start_soon(call)

    assert ([1], 1) == (answers, oracle.asked)
    nursery.cancel_scope.cancel()


async def test_without_its_task_it_still_answers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Nobody hangs because `run` is not running."""
    assert -1 == await probe(Oracle()).get()
