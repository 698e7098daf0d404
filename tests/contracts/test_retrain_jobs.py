"""Retrain jobs over SQLite and a real PostgreSQL: one healer has a job, and a dead one loses it."""

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest
from databases import empty
from sample_events import AT_MS

from phoenix_ml.application.ports import JobQuery
from phoenix_ml.domain.errors import InvalidField, JobConflict, JobUnknown
from phoenix_ml.domain.healing import JobStatus, RetrainJob, request_id
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.healing import SqlRetrainJobs


@pytest.fixture
def jobs(url: str) -> Iterator[SqlRetrainJobs]:
    with closing(Database(url)) as database:
        empty(database)
        yield SqlRetrainJobs(database)


def job(job_id: str = "a", **facts: Any) -> RetrainJob:
    made = RetrainJob(
        id=job_id,
        model_id="risk",
        model_version="1.0.0",
        reason="outcomes",
        evidence={"drifted": ["income"]},
        status=JobStatus.REQUESTED,
        requested_at_ms=AT_MS,
        updated_at_ms=AT_MS,
    )
    return msgspec.structs.replace(made, **facts)


def test_a_request_that_is_made_twice_is_one_job(jobs: SqlRetrainJobs) -> None:
    """Its id is made of what was seen, so that two monitors ask once."""
    assert [jobs.add(job()), jobs.add(job(reason="drift"))] == [True, False]
    assert jobs.get("a") == job()
    assert jobs.page(JobQuery("risk")) == ([job()], None)
    assert jobs.page(JobQuery("other")) == ([], None)


def test_a_job_that_nobody_knows_is_said_so(jobs: SqlRetrainJobs) -> None:
    """A typing error must not look like a job without news."""
    with pytest.raises(JobUnknown, match="no retrain job b"):
        jobs.get("b")


def test_a_leased_job_is_nobody_elses_until_the_lease_is_over(jobs: SqlRetrainJobs) -> None:
    """A killed healer's job is taken up again, never two at once."""
    jobs.add(job())

    first = jobs.lease("one", AT_MS, AT_MS + 1000)
    meanwhile = jobs.lease("two", AT_MS + 999, AT_MS + 2000)
    after = jobs.lease("two", AT_MS + 1000, AT_MS + 2000)

    assert first == job(owner="one", owned_until_ms=AT_MS + 1000)
    assert meanwhile is None
    assert after is not None
    assert after.owner == "two"
    assert jobs.renew(first, AT_MS + 9000) is False
    assert jobs.move(first, JobStatus.TRAINING, AT_MS) is None


def test_a_lease_that_is_renewed_lasts(jobs: SqlRetrainJobs) -> None:
    """Training takes longer than a lease."""
    jobs.add(job())
    leased = jobs.lease("one", AT_MS, AT_MS + 1000)
    assert leased is not None

    assert jobs.renew(leased, AT_MS + 5000) is True
    assert jobs.lease("two", AT_MS + 2000, AT_MS + 3000) is None
    assert jobs.renew(leased, AT_MS + 5000, result={"checks": 1}) is True
    assert jobs.get("a").result == {"checks": 1}


def test_what_is_under_way_is_listed_without_what_has_ended(jobs: SqlRetrainJobs) -> None:
    """By this it is seen that a champion has a job already."""
    for i, status in enumerate(JobStatus):
        jobs.add(job(f"job-{i}", status=status, requested_at_ms=AT_MS - i))

    listed, _ = jobs.page(JobQuery("risk", under_way=True))

    assert [one.status for one in listed] == [JobStatus.REQUESTED, JobStatus.TRAINING, JobStatus.CHECKING]


def test_jobs_come_in_pages(jobs: SqlRetrainJobs) -> None:
    """All of them, each once, the latest requested first, ties of time included."""
    made = [job(request_id("risk", "1.0.0", "", [n]), requested_at_ms=AT_MS + n // 3) for n in range(7)]
    for one in (*made, job("other", model_id="price")):
        jobs.add(one)

    pages: list[list[RetrainJob]] = []
    cursor = None
    while not pages or cursor is not None:
        page, cursor = jobs.page(JobQuery("risk", limit=2, cursor=cursor))
        pages.append(page)

    expected = sorted(made, key=lambda one: (one.requested_at_ms, one.id), reverse=True)
    assert pages == [expected[:2], expected[2:4], expected[4:6], expected[6:]]
    with pytest.raises(InvalidField, match="cursor"):
        jobs.page(JobQuery(cursor="nowhere"))


def test_the_oldest_that_may_be_tried_comes_first(jobs: SqlRetrainJobs) -> None:
    """One that failed waits for its time, and does not hold up the others."""
    jobs.add(job("later", requested_at_ms=AT_MS + 2))
    jobs.add(job("waits", requested_at_ms=AT_MS, not_before_ms=AT_MS + 5000))
    jobs.add(job("first", requested_at_ms=AT_MS + 1))
    jobs.add(job("over", status=JobStatus.REJECTED))

    taken = [jobs.lease("one", AT_MS + 10, AT_MS + 9000) for _ in range(3)]

    assert [one.id if one else None for one in taken] == ["first", "later", None]


def test_a_step_is_stored_with_its_facts_and_an_end_frees_the_job(jobs: SqlRetrainJobs) -> None:
    """Whoever asks sees how far it is, and why it ended."""
    jobs.add(job())
    leased = jobs.lease("one", AT_MS, AT_MS + 1000)
    assert leased is not None

    training = jobs.move(leased, JobStatus.TRAINING, AT_MS + 1, attempts=1, new_version="1.1.0")
    assert training is not None
    ended = jobs.move(training, JobStatus.FAILED, AT_MS + 2, error="exit code 1", log_tail="Traceback …")

    assert (training.status, training.attempts, training.owner) == (JobStatus.TRAINING, 1, "one")
    assert ended == job(
        status=JobStatus.FAILED,
        updated_at_ms=AT_MS + 2,
        attempts=1,
        new_version="1.1.0",
        error="exit code 1",
        log_tail="Traceback …",
    )
    assert jobs.get("a") == ended
    assert jobs.count_by_status() == {"failed": 1}


def test_a_step_that_a_job_cannot_take_is_refused(jobs: SqlRetrainJobs) -> None:
    """A job that has ended stays as it ended."""
    jobs.add(job(status=JobStatus.REGISTERED))
    with pytest.raises(JobConflict, match="registered cannot become training"):
        jobs.move(jobs.get("a"), JobStatus.TRAINING, AT_MS)


def test_healers_that_come_at_once_get_different_jobs(jobs: SqlRetrainJobs) -> None:
    """Each job is trained once, however many healers there are."""
    for i in range(20):
        jobs.add(job(f"job-{i:02}", requested_at_ms=AT_MS + i))
    taken: list[str] = []

    def take(owner: str) -> None:
        misses = 0
        while misses < 20:  # another was faster, or none is left
            found = jobs.lease(owner, AT_MS + 100, AT_MS + 10_000)
            misses = 0 if found else misses + 1
            if found:
                taken.append(found.id)

    threads = [threading.Thread(target=take, args=(f"healer-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(taken) == [f"job-{i:02}" for i in range(20)]
