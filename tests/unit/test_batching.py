"""Rows of several callers run together, and none of them can tell."""

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_models
import pytest
from inprocess import Server, one

from phoenix_ml.application.ports import Engine
from phoenix_ml.application.predict import Answer
from phoenix_ml.domain.errors import InferenceFailed, JournalFull, Overloaded, PhoenixError, RowCountWrong
from phoenix_ml.domain.predictions import BatchRequest, Instance
from phoenix_ml.domain.rows import Outputs, Rows
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsFullError

WIDTH = 3


def answered(found: Sequence[Answer | BaseException]) -> list[Answer]:
    for answer in found:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in found if isinstance(answer, Answer)]


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(**settings: Any) -> Server:
        made.append(Server(tmp_path / "data", **settings))
        return made[-1]

    (tmp_path / "data").mkdir()
    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


def rows(count: int) -> list[list[float]]:
    drawn: list[list[float]] = np.random.default_rng(count).normal(size=(count, WIDTH)).round(3).tolist()
    return drawn


def linear(row: Sequence[float]) -> float:
    return float(np.dot(np.array(row, "f4"), np.array(onnx_models.weights(WIDTH), "f4")) + 0.25)


def test_each_caller_gets_the_answer_to_its_own_row(server: Server) -> None:
    """An answer that went to a neighbour would be wrong, and nobody would notice."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)
    asked = rows(50)

    answers = answered(server.ask(asked))

    assert [a.event.result for a in answers] == pytest.approx([linear(row) for row in asked], rel=1e-5)
    packed = [np.array(row, "<f4").tobytes() for row in asked]
    assert [a.event.inputs for a in answers] == packed


def test_the_first_runs_alone_and_those_that_come_with_it_run_together(server: Server) -> None:
    """Nobody waits for others to come; who comes at the same time shares a run."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)

    answers = answered(server.ask(rows(21)))

    assert [(a.event.batch_size, a.event.batch_position) for a in answers] == [
        (1, 0),
        *((20, position) for position in range(20)),
    ]


def test_where_crowds_came_of_late_even_the_first_waits_for_the_end_of_the_turn(server: Server) -> None:
    """Where many callers ask all the time the first of a turn is not alone either."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)

    async def ask_twice() -> list[int]:
        for _ in range(2):
            answers = await asyncio.gather(*[one(server.predict, row) for row in rows(10)])
        return [a.event.batch_size for a in answers]

    assert asyncio.run(ask_twice()) == [10] * 10


def test_after_a_crowd_a_lonely_caller_soon_runs_at_once_again(server: Server) -> None:
    """A turn of the event loop more would be the price of a crowd that is long gone."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)

    async def ask() -> bool:
        await asyncio.gather(*[one(server.predict, row) for row in rows(10)])
        for row in rows(20):
            await one(server.predict, row)
            await asyncio.sleep(0)
        work = one(server.predict, rows(1)[0])
        try:
            work.send(None)
        except StopIteration:
            return True
        return False

    assert asyncio.run(ask())


def test_a_batch_is_no_larger_than_keeps_its_run_short(server: Server) -> None:
    """The event loop must not be held up by a crowd: a long run delays everybody else."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)
    served, _ = server.live.model("risk").pick(None, "key")
    served.batch_rows_limit = 8

    answers = answered(server.ask(rows(21)))

    assert Counter(a.event.batch_size for a in answers) == {1: 1, 8: 16, 4: 4}


def test_a_version_whose_rows_are_not_independent_never_shares_a_run(server: Server) -> None:
    """One caller's values would change another's answer."""
    server.serve(onnx_models.batch_mean_removed(2))

    answers = answered(server.ask([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))

    assert [a.event.batch_size for a in answers] == [1, 1, 1]


def test_a_row_that_the_runtime_refuses_fails_alone(server: Server) -> None:
    """A caller's mistake must not become its neighbours' error."""
    server.serve(onnx_models.gather_model(4), batches=True)

    first, *found = server.ask([[0], [1], [99], [2], [3]])

    assert isinstance(first, Answer)
    assert [type(answer) for answer in found] == [Answer, InferenceFailed, Answer, Answer]
    ran_alone = [(a.event.batch_size, a.event.batch_position) for a in found if isinstance(a, Answer)]
    assert ran_alone == [(1, 0)] * 3


def test_a_model_that_drops_rows_by_their_values_fails_the_caller_whose_row_it_dropped(
    server: Server,
) -> None:
    """Nobody may get a neighbour's answer, nor none at all, because one row is gone."""
    server.serve(onnx_models.rows_above(-1000), batches=True)

    first, *found = server.ask([[1.0], [2.0], [-3000.0], [4.0]])

    assert isinstance(first, Answer)
    assert [type(answer) for answer in found] == [Answer, RowCountWrong, Answer]
    assert [a.event.result for a in found if isinstance(a, Answer)] == [2.0, 4.0]


def test_answers_leave_even_where_no_new_metric_has_room(server: Server) -> None:
    """A disk that is full for metrics must not cost anybody an answer that is on record."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)

    def use_all_room() -> None:
        for number in count():
            server.metrics.counter(catalogue.MODEL_LOADS, model=f"m{number}", version="1", outcome="loaded")

    with pytest.raises(MetricsFullError):
        use_all_room()

    answers = answered(server.ask(rows(5)))

    assert {a.event.id for a in answers} == set(server.recorded())


def test_all_answers_of_a_run_are_on_record_before_they_leave(server: Server) -> None:
    """They share one write to the journal, which must hold each of them, as it was answered."""
    server.serve(onnx_models.binary_classifier(WIDTH), batches=True)

    answers = answered(server.ask(rows(30)))

    assert {a.event.id: a.event for a in answers} == server.recorded()


def test_a_full_journal_refuses_every_row_of_the_run(make_server: Callable[..., Server]) -> None:
    """An answer that is not on record is no answer, for none of those who shared the run."""
    server = make_server(journal_limit_bytes=64 * 1024)
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)
    while all(isinstance(answer, Answer) for answer in server.ask(rows(1))):
        pass
    before = server.recorded()

    found = server.ask(rows(10))

    assert {type(answer) for answer in found} == {JournalFull}
    assert len({id(answer) for answer in found}) == 10
    assert server.recorded() == before


def test_rows_of_a_slow_version_gather_while_it_runs(server: Server) -> None:
    """The thread is never idle while somebody waits, and those who wait share its next run."""
    server.serve(onnx_models.slow_model(2, loops=64), batches=True)
    served, _ = server.live.model("risk").pick(None, "key")
    assert not served.is_inline
    asked = np.random.default_rng(5).normal(size=(40, 2)).round(3).tolist()

    answers = answered(server.ask(asked))

    alone = [answered(server.ask([row]))[0].event.result for row in asked]
    assert [a.event.result for a in answers] == pytest.approx(alone, rel=1e-5)
    assert sorted(Counter(a.event.batch_size for a in answers)) == [40]


def batch_of(asked: Sequence[Sequence[float]]) -> BatchRequest:
    return BatchRequest(model_id="risk", instances=[Instance(features=list(row)) for row in asked])


def test_a_single_request_gets_in_between_the_runs_of_a_large_batch(server: Server) -> None:
    """Whoever sends a thousand rows at once must not keep a slow version from everybody else."""
    server.serve(onnx_models.slow_model(2, loops=64), batches=True)
    asked = np.random.default_rng(5).normal(size=(130, 2)).round(3).tolist()
    done: list[str] = []

    async def batch() -> list[Answer]:
        answers = await server.predict.batch(batch_of(asked), 0.0)
        done.append("batch")
        return answers

    async def single() -> None:
        await one(server.predict, [0.5, 0.5])
        done.append("single")

    async def ask() -> list[Answer]:
        answers, _ = await asyncio.gather(batch(), single())
        return answers

    answers = asyncio.run(ask())

    assert done == ["single", "batch"]
    assert [a.event.result for a in answers] == pytest.approx([sum(row) for row in asked], rel=1e-4, abs=1e-5)
    ran = [(a.event.batch_size, a.event.batch_position) for a in answers]
    assert ran == [(64, i) for i in range(64)] * 2 + [(2, 0), (2, 1)]


def test_a_large_batch_of_a_quick_version_is_one_run(server: Server) -> None:
    """Its thread holds up nobody: single requests run on the event loop meanwhile."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)

    answers = asyncio.run(server.predict.batch(batch_of(rows(130)), 0.0))

    assert {a.event.batch_size for a in answers} == {130}


class AloneOnly:
    """An engine that refuses rows which come together."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.placement = engine.placement

    def run(self, given: Rows) -> Outputs:
        if len(given) > 1:
            raise InferenceFailed("not together")
        return self._engine.run(given)


def test_a_batch_that_fails_though_each_row_of_it_would_not_is_answered_row_by_row(server: Server) -> None:
    """Requests that come at the same time get their answers in that case, so a batch of them does too."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)
    served, _ = server.live.model("risk").pick(None, "key")
    served.engine = cast("Engine", AloneOnly(served.engine))
    asked = rows(5)

    answers = asyncio.run(server.predict.batch(batch_of(asked), 0.0))

    assert [a.event.result for a in answers] == pytest.approx([linear(row) for row in asked], rel=1e-5)
    assert {a.event.id: a.event for a in answers} == server.recorded()
    assert {(a.event.batch_size, a.event.batch_position) for a in answers} == {(1, 0)}


def test_more_than_may_wait_are_refused_at_the_door(make_server: Callable[..., Server]) -> None:
    """A queue without end answers everybody too late; who is refused can go elsewhere at once."""
    server = make_server(queue_limit=10)
    server.serve(onnx_models.slow_model(2, loops=64), batches=False)

    found = server.ask([[0.5, 0.5]] * 30)

    errors = [answer for answer in found if isinstance(answer, PhoenixError)]
    assert (len(errors), {type(error) for error in errors}) == (20, {Overloaded})
    assert {error.details["retry_after_s"] for error in errors} == {1}


def test_who_waited_too_long_is_refused_and_those_behind_are_answered(
    make_server: Callable[..., Server],
) -> None:
    """Whoever has given up by now would only delay the others."""
    server = make_server(queue_deadline_ms=60_000)
    server.serve(onnx_models.slow_model(2, loops=64), batches=False)

    async def ask() -> list[Answer | BaseException]:
        now = asyncio.get_running_loop().time()
        begun = [now, now - 61, now - 3600, now - 1]
        asked = [one(server.predict, [0.5, 0.5], started) for started in begun]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(ask())

    assert [type(answer) for answer in found] == [Answer, Overloaded, Overloaded, Answer]


def test_a_caller_that_goes_away_takes_nobody_along(server: Server) -> None:
    """Its row may run, but its neighbours' answers must not stumble over it."""
    server.serve(onnx_models.linear_regressor(WIDTH), batches=True)
    asked = rows(10)

    async def ask() -> list[Answer | BaseException]:
        tasks = [asyncio.ensure_future(one(server.predict, row)) for row in asked]
        await asyncio.sleep(0)
        tasks[5].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())

    assert isinstance(found.pop(5), asyncio.CancelledError)
    expected = [linear(row) for number, row in enumerate(asked) if number != 5]
    assert [a.event.result for a in answered(found)] == pytest.approx(expected, rel=1e-5)


def test_a_version_is_freed_when_nobody_serves_it_any_more(server: Server) -> None:
    """Models are large; what batches them must not keep the old one."""
    server.serve(onnx_models.slow_model(2, loops=64), batches=True)
    answered(server.ask([[0.5, 0.5]] * 4))
    kept = weakref.ref(server.live.model("risk").served["1.0.0"])
    assert kept() is not None

    server.phoenix.registry.set_active("risk", "1.0.0", False, "test")
    server.live.refresh()

    assert kept() is None
