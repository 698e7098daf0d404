"""The Redis adapter with Redis failing in every way, and with what other systems write there."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
from proxy import FaultProxy
from servers import HOST, RedisServer, free_port

from phoenix_ml.domain.errors import FeatureInvalid, FeatureStoreUnavailable, Misconfigured
from phoenix_ml.domain.features import FeatureType, StoredFeatures
from phoenix_ml.domain.rows import Scalar
from phoenix_ml.infrastructure.features.redis import RedisFeatures

pytestmark = pytest.mark.anyio

PATIENT_MS = 10_000.0
SHORT_MS = 200.0
RECOVERY_DEADLINE_S = 30.0
INTEGER = {"n": FeatureType.INTEGER}
ALL_TYPES = {
    "f": FeatureType.FLOAT,
    "g": FeatureType.FLOAT,
    "i": FeatureType.INTEGER,
    "b": FeatureType.BOOLEAN,
    "s": FeatureType.STRING,
}

Opener = Callable[..., RedisFeatures]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Both loops: they disagree on what a write to a closed connection raises, and on timers before reads."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def open_store() -> AsyncIterator[Opener]:
    opened: list[RedisFeatures] = []

    def open_one(
        url: str, deadline_ms: float = PATIENT_MS, write_deadline_ms: float = PATIENT_MS
    ) -> RedisFeatures:
        opened.append(RedisFeatures(url, deadline_ms, write_deadline_ms))
        return opened[-1]

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
def store(open_store: Opener, redis_url: str) -> RedisFeatures:
    return open_store(redis_url)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """Another system that uses the same Redis."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as other:
        yield other


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    with FaultProxy.in_front_of(redis_url) as between:
        yield between


async def read(store: RedisFeatures, entity_id: str, types: dict[str, FeatureType]) -> StoredFeatures:
    stored = await store.read(entity_id, types)
    assert stored is not None
    return stored


async def recovered(store: RedisFeatures) -> StoredFeatures | None:
    """What the store reads of entity `e` once it answers again."""
    give_up_at = time.monotonic() + RECOVERY_DEADLINE_S
    while True:
        try:
            return await store.read("e", INTEGER)
        except FeatureStoreUnavailable:
            assert time.monotonic() < give_up_at, "the store did not recover"
            await asyncio.sleep(0.01)


# The layout


async def test_other_systems_find_plain_text_in_a_hash(store: RedisFeatures, client: "redis.Redis") -> None:
    """The layout is an interface: pipelines in other languages read it and write it."""
    features: dict[str, Scalar] = {
        "f": 0.1,
        "g": 3.0,
        "i": -7,
        "b": True,
        "s": "rent",
        "t": "12",
        "u": "true",
        "v": '"x"',
        "w": "1.50",
    }
    await store.write({"e": features}, 1_000)
    await store.write({"e": {"i": 8}}, 2_000)

    stored = client.hgetall("features:e")

    plain = {"f": "0.1", "g": "3.0", "i": "8", "b": "true", "s": "rent"}
    quoted = {"t": '"12"', "u": '"true"', "v": '"\\"x\\""', "w": '"1.50"'}
    assert stored == plain | quoted | {"_updated_at": "1000", "_at:i": "2000"}


async def test_raw_text_of_other_systems_reads_as_it_is(store: RedisFeatures, client: "redis.Redis") -> None:
    """`HSET features:e s 007` is what people type, and a postcode is not a number."""
    client.hset("features:e", mapping={"f": "3", "g": "-2.5e3", "i": "42", "b": "false", "s": "007"})

    stored = await read(store, "e", ALL_TYPES)

    assert stored.values == {"f": 3.0, "g": -2500.0, "i": 42, "b": False, "s": "007"}
    assert (stored.updated_at_ms, stored.at_ms) == (None, {})


@pytest.mark.parametrize("text", ["rent", "007", "", '"', '"open', 'a "b"', "true ", "{}", "ä", "1 000"])
async def test_a_string_of_another_system_needs_no_quotes(
    store: RedisFeatures, client: "redis.Redis", text: str
) -> None:
    """Only text that is a JSON string in quotes is ever unquoted."""
    client.hset("features:e", mapping={"s": text})

    assert (await read(store, "e", {"s": FeatureType.STRING})).values == {"s": text}
    assert (await store.read_all("e") or StoredFeatures({})).values == {"s": text}


@pytest.mark.parametrize("text", ["nan", "NaN", "-nan"])
async def test_nan_of_another_system_is_no_value(
    store: RedisFeatures, client: "redis.Redis", text: str
) -> None:
    """A data frame written as text says nan where it has nothing."""
    client.hset("features:e", mapping={"f": text, "g": "1.5"})

    stored = await read(store, "e", {"f": FeatureType.FLOAT, "g": FeatureType.FLOAT})

    assert stored.values == {"g": 1.5}


@pytest.mark.parametrize("text", ["inf", "-Infinity", "1e999", "1_000", "one", "", "true", "0x10"])
async def test_what_is_no_float_comes_back_as_text(
    store: RedisFeatures, client: "redis.Redis", text: str
) -> None:
    """The contract then names the feature and the text; a silent number would be worse than a 422."""
    client.hset("features:e", mapping={"f": text, "g": "1.5"})

    stored = await read(store, "e", {"f": FeatureType.FLOAT, "g": FeatureType.FLOAT})

    assert stored.values == {"f": text, "g": 1.5}


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (FeatureType.INTEGER, "1.0"),
        (FeatureType.INTEGER, "1_000"),
        (FeatureType.INTEGER, "9" * 5000),
        (FeatureType.BOOLEAN, "1"),
        (FeatureType.BOOLEAN, "True"),
    ],
)
async def test_what_is_not_of_its_type_comes_back_as_text(
    store: RedisFeatures, client: "redis.Redis", wanted: FeatureType, text: str
) -> None:
    """Guessing what another system meant is how training and serving drift apart."""
    client.hset("features:e", mapping={"x": text})

    assert (await read(store, "e", {"x": wanted})).values == {"x": text}


async def test_bytes_that_are_no_text_are_shown_as_such(store: RedisFeatures, client: "redis.Redis") -> None:
    """A value in another encoding must not fail the entity's other features."""
    client.hset("features:e", mapping={"s": b"\xff\xfe", "f": b"\xff", "g": b'"\xff"'})

    stored = await read(store, "e", dict.fromkeys("sfg", FeatureType.STRING) | {"f": FeatureType.FLOAT})

    assert stored.values == {"s": "\ufffd\ufffd", "f": "\ufffd", "g": '"\ufffd"'}


async def test_a_time_that_is_none_counts_as_not_recorded(
    store: RedisFeatures, client: "redis.Redis"
) -> None:
    """Garbage for a time must make a feature stale, not the request fail."""
    client.hset("features:e", mapping={"n": "1", "_updated_at": "yesterday", "_at:n": "soon"})

    stored = await read(store, "e", INTEGER)

    assert stored.written_at_ms("n") is None


async def test_an_entity_with_other_features_only_is_known(store: RedisFeatures) -> None:
    """Its features have defaults; an unknown entity is an error."""
    await store.write({"e": {"other": 1}}, 1_000)

    stored = await read(store, "e", INTEGER)

    assert (stored.values, stored.updated_at_ms) == ({}, 1_000)


async def test_an_expiry_set_by_another_system_is_kept(store: RedisFeatures, client: "redis.Redis") -> None:
    """Whoever limits how long personal data lives must be able to rely on it."""
    await store.write({"e": {"n": 1}}, 1_000)
    client.expire("features:e", 1_000)

    await store.write({"e": {"n": 2}}, 2_000)

    assert 0 < client.ttl("features:e") <= 1_000


async def test_a_key_of_another_kind_is_named(store: RedisFeatures, client: "redis.Redis") -> None:
    """That is bad data of one entity, not a store that is down."""
    client.set("features:bad", "text")
    await store.write({"e": {"n": 1}}, 1_000)

    for refused in (store.read("bad", INTEGER), store.read_all("bad"), store.write({"bad": {"n": 1}}, 1_000)):
        with pytest.raises(FeatureInvalid, match="features:bad"):
            await refused
    assert (await read(store, "e", INTEGER)).values == {"n": 1}
    assert client.get("features:bad") == "text"


async def test_a_bad_key_does_not_keep_the_others_from_being_written(
    store: RedisFeatures, client: "redis.Redis"
) -> None:
    """Entities are atomic each by itself; the error says which one is left out."""
    client.set("features:e1", "text")

    with pytest.raises(FeatureInvalid, match="features:e1"):
        await store.write({f"e{n}": {"n": n} for n in range(3)}, 1_000)

    assert [(await read(store, f"e{n}", INTEGER)).values["n"] for n in (0, 2)] == [0, 2]


async def test_writes_go_on_when_redis_forgets_its_scripts(
    store: RedisFeatures, client: "redis.Redis"
) -> None:
    """SCRIPT FLUSH, a restart and a failover all lose them."""
    await store.write({"e": {"n": 1}}, 1_000)
    client.script_flush()

    await store.write({"e": {"n": 2}}, 2_000)

    assert (await read(store, "e", INTEGER)).values == {"n": 2}


# Failures


async def test_a_killed_redis_is_an_error_at_once_and_recovery_needs_nobody(
    open_store: Opener, redis_url: str, redis_server: RedisServer
) -> None:
    """The request falls back on its own features, and nobody restarts the service afterwards."""
    store = open_store(redis_server.url)
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check()
    await asyncio.to_thread(redis_server.kill)

    with pytest.raises(FeatureStoreUnavailable) as error:
        await store.read("e", INTEGER)
    await asyncio.to_thread(redis_server.start)
    await recovered(store)
    await store.write({"e": {"n": 2}}, 2_000)

    assert "redis" in error.value.message
    assert f"{HOST}:{redis_server.port}" in error.value.message
    assert error.value.details == {"store": "redis", "address": f"{HOST}:{redis_server.port}"}
    assert (await read(store, "e", INTEGER)).values == {"n": 2}


async def test_a_restart_while_nobody_asks_goes_unnoticed(
    open_store: Opener, redis_url: str, redis_server: RedisServer
) -> None:
    """Redis also closes connections that idle; the next caller must not pay for that with a 503."""
    store = open_store(redis_server.url)
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check()
    await asyncio.to_thread(redis_server.restart)

    assert await store.read("e", INTEGER) is None
    await store.write({"e": {"n": 2}}, 2_000)
    assert (await read(store, "e", INTEGER)).values == {"n": 2}


async def test_callers_do_not_touch_the_network_while_redis_is_down(open_store: Opener) -> None:
    """A crowd of reconnecting callers is what keeps a Redis that comes back from coming up."""
    connections = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    port = free_port()
    async with await asyncio.start_server(hang_up, HOST, port):
        store = open_store(f"redis://{HOST}:{port}")
        with pytest.raises(FeatureStoreUnavailable):
            await store.read("e", INTEGER)
        first = connections
        started = time.monotonic()
        for _ in range(2_000):
            with pytest.raises(FeatureStoreUnavailable):
                await store.read("e", INTEGER)
            await asyncio.sleep(0)
        took_s = time.monotonic() - started

    # The background task's pauses start at 25 ms and grow.
    assert first == 1
    assert connections - first <= 1 + took_s / 0.025


async def test_a_redis_that_hangs_costs_no_more_than_the_deadline(
    open_store: Opener, redis_url: str, proxy: FaultProxy
) -> None:
    """Without an answer in time a prediction goes on without the store."""
    store = open_store(proxy.redirect(redis_url), SHORT_MS)
    await store.write({"e": {"n": 1}}, 1_000)
    await recovered(store)
    await asyncio.to_thread(proxy.hang)
    started = time.monotonic()

    reads = await asyncio.gather(*(store.read("e", INTEGER) for _ in range(20)), return_exceptions=True)

    assert {type(outcome) for outcome in reads} == {FeatureStoreUnavailable}
    assert "200 ms" in str(reads[0])
    assert time.monotonic() - started < 20 * SHORT_MS / 1000, "each waited in turn"


async def test_checks_of_a_redis_that_hangs_hold_no_read_beyond_its_deadline(
    open_store: Opener, redis_url: str, redis_server: RedisServer
) -> None:
    """An orchestrator asks for readiness all the time, and predictions share the connection with that."""
    store = open_store(redis_server.url, SHORT_MS)
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check(patience_s=1.0)
    # A first failure would have the rest refused at once: each round is a Redis that has just begun to hang.
    for _ in range(3):
        await recovered(store)
        await asyncio.to_thread(redis_server.freeze)
        started = time.monotonic()

        calls: list[asyncio.Task[Any]] = [asyncio.create_task(store.check())]
        await asyncio.sleep(0)  # the check is on its way, so the reads wait behind it
        calls += [asyncio.create_task(store.read("e", INTEGER)) for _ in range(20)]
        calls += [asyncio.create_task(store.check()) for _ in range(5)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        took_s = time.monotonic() - started
        await asyncio.to_thread(redis_server.thaw)

        assert {type(outcome) for outcome in outcomes} == {FeatureStoreUnavailable}
        assert took_s < 4 * SHORT_MS / 1000, "the check had more patience than a read"
    stored = await recovered(store)
    assert stored is not None
    assert stored.values == {"n": 1}
    await store.check()


async def test_an_answer_that_comes_late_reaches_nobody(
    open_store: Opener, redis_url: str, proxy: FaultProxy
) -> None:
    """It belongs to an entity that the next caller has not asked for."""
    store = open_store(proxy.redirect(redis_url), SHORT_MS)
    await store.write({"e": {"n": 1}, "late": {"n": 666}}, 1_000)
    await recovered(store)
    await asyncio.to_thread(proxy.hang)
    with pytest.raises(FeatureStoreUnavailable):
        await store.read("late", INTEGER)

    # What was sent meanwhile, and its answer, now arrive.
    await asyncio.to_thread(proxy.up)

    for _ in range(50):
        stored = await recovered(store)
        assert stored is not None
        assert stored.values == {"n": 1}


async def test_a_cancelled_read_leaves_its_answer_to_nobody(
    open_store: Opener, redis_url: str, proxy: FaultProxy
) -> None:
    """A client that hangs up must not shift everybody's answers by one."""
    store = open_store(proxy.redirect(redis_url))
    await store.write({f"e{n}": {"n": n} for n in range(50)}, 1_000)
    await store.check()
    await asyncio.to_thread(proxy.hang)
    reads = [asyncio.create_task(store.read(f"e{n}", INTEGER)) for n in range(25)]
    await asyncio.sleep(0)
    reads += [asyncio.create_task(store.read(f"e{n}", INTEGER)) for n in range(25, 50)]
    await asyncio.sleep(0)
    for cancelled in reads[::2]:
        cancelled.cancel()

    await asyncio.to_thread(proxy.up)
    found = await asyncio.gather(*reads[1::2])

    assert [stored.values["n"] for stored in found if stored is not None] == list(range(1, 50, 2))


async def test_a_pause_of_this_process_is_not_taken_for_one_of_redis(
    open_store: Opener, redis_url: str
) -> None:
    """A long inference on the loop must not throw the store away whose answer already lies in the socket."""
    store = open_store(redis_url, 400.0)
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check()
    read = asyncio.create_task(store.read("e", INTEGER))
    await asyncio.sleep(0)

    time.sleep(0.6)  # the loop stands still: that is the case, not a wait for something

    stored = await read
    assert stored is not None
    assert stored.values == {"n": 1}


@pytest.mark.parametrize("warm", [True, False], ids=["connected", "not yet connected"])
@pytest.mark.parametrize("fault", ["down", "reset", "hang"])
@pytest.mark.parametrize("method", ["read", "read_all", "write", "check"])
async def test_every_failure_of_the_network_is_the_same_error_of_ours(
    open_store: Opener, redis_url: str, proxy: FaultProxy, method: str, fault: str, warm: bool
) -> None:
    """Foreign exceptions stop at the adapter: the layers above know one error and one answer to it."""
    store = open_store(proxy.redirect(redis_url), SHORT_MS, SHORT_MS)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: store.read("e", INTEGER),
        "read_all": lambda: store.read_all("e"),
        "write": lambda: store.write({"e": {"n": 2}}, 2_000),
        "check": store.check,
    }
    call = calls[method]
    if warm:
        await recovered(store)
        await call()
    await asyncio.to_thread(getattr(proxy, fault))

    with pytest.raises(FeatureStoreUnavailable, match=f"redis at {HOST}:{proxy.port}"):
        await call()
    with pytest.raises(FeatureStoreUnavailable, match=f"redis at {HOST}:{proxy.port}"):
        await call()

    await asyncio.to_thread(proxy.up)
    await recovered(store)
    await call()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00\xff\r\n",
        b"*3\r\n",
        b"-LOADING wait\r\n",
        b"-NOAUTH no\r\n",
    ],
)
async def test_a_server_that_talks_nonsense_or_refuses_is_unavailable(
    open_store: Opener, answer: bytes
) -> None:
    """The port may belong to something else, or Redis may still be reading its file."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            writer.write(answer)
        writer.close()

    port = free_port()
    async with await asyncio.start_server(talk, HOST, port):
        store = open_store(f"redis://{HOST}:{port}", SHORT_MS, SHORT_MS)
        for refused in (store.read("e", INTEGER), store.write({"e": {"n": 1}}, 1), store.check()):
            with pytest.raises(FeatureStoreUnavailable):
                await refused
        await store.close()


async def test_a_wrong_password_is_unavailable_and_stays_out_of_the_message(
    open_store: Opener, redis_url: str
) -> None:
    """Messages end in logs and in answers to clients."""
    store = open_store(redis_url.replace("redis://", "redis://nobody:s3cret@"))

    with pytest.raises(FeatureStoreUnavailable) as error:
        await store.read("e", INTEGER)

    assert "s3cret" not in error.value.message
    assert "s3cret" not in str(error.value.details)


async def test_closing_refuses_whoever_still_waits(
    open_store: Opener, redis_url: str, proxy: FaultProxy
) -> None:
    """A request in flight at shutdown gets an answer, not silence."""
    store = open_store(proxy.redirect(redis_url))
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check()
    await asyncio.to_thread(proxy.hang)
    reads = [asyncio.create_task(store.read("e", INTEGER)) for _ in range(3)]
    await asyncio.sleep(0)

    await store.close()

    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {FeatureStoreUnavailable}
    assert "closed" in str(outcomes[0])


async def test_closing_while_redis_is_down_ends_the_background_task(open_store: Opener) -> None:
    """A task left behind would keep a process from ending quietly."""
    store = open_store(f"redis://{HOST}:{free_port()}")
    with pytest.raises(FeatureStoreUnavailable):
        await store.read("e", INTEGER)

    await store.close()

    assert asyncio.all_tasks() <= {task for task in asyncio.all_tasks() if "_recover" not in repr(task)}


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost:port", "redis://localhost/0?db=x"])
async def test_a_url_that_names_no_redis_is_a_misconfiguration(open_store: Opener, url: str) -> None:
    """It is said at the start, not at the first prediction."""
    with pytest.raises(Misconfigured):
        open_store(url)
