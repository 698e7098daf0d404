"""The Redis adapter with Redis failing in every way, and with what other systems write there."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxy import FaultProxy
from redis.crc import key_slot
from servers import (
    HOST,
    RedisCluster,
    RedisSentinel,
    RedisServer,
    SecuredRedisServer,
    ask_redis,
    free_port,
)

from phoenix_ml.domain.errors import FeatureInvalid, FeatureStoreUnavailable, Misconfigured
from phoenix_ml.domain.features import (
    FeatureType,
    PackedFeatures,
    PackedSignature,
    StoredFeatures,
    packed_signature,
)
from phoenix_ml.domain.rows import Column, ElementType, Scalar
from phoenix_ml.infrastructure.features.redis import RedisFeatures
from phoenix_ml.infrastructure.features.redis_roads import slot_of

pytestmark = pytest.mark.anyio

PATIENT_MS = 10_000.0
SHORT_MS = 500.0
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
numbers = count()


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


# Packed rows

FIRST_ROW = {"a": 0.5, "b": 0.25}
ROW = packed_signature([Column(name, ElementType.FLOAT32) for name in FIRST_ROW]) or PackedSignature("", {})
texts_of_others = st.one_of(
    st.floats(allow_nan=False).map(repr),
    st.integers().map(str),
    st.from_regex(r"\s?[-+]?[0-9_]{0,30}\.?[0-9]{0,30}([eE][-+]?[0-9]{1,3})?\s?", fullmatch=True),
    st.sampled_from(
        ["nan", "inf", "-0", "-0.0", "0x10", "1,2", "[1]", "1e999", "1e-400", "007", "true", '"1"']
    ),
)


async def test_the_packed_row_is_a_field_that_others_can_read(store: RedisFeatures, redis_url: str) -> None:
    """The layout is an interface, and this is the form that the reference describes."""
    await store.write({"e": {"a": 0.1, "b": -2}}, 1_795_390_242_756, [ROW])

    packed = ask_redis(redis_url, "HGET", "features:e", f"_packed:{ROW.digest}")

    assert struct.pack("<q2f", 1_795_390_242_756, 0.1, -2.0) == packed


@pytest.mark.parametrize(
    "written", [{"a": "7", "_updated_at": "1001"}, {"a": "7", "_updated_at": "gone"}], ids=str
)
async def test_a_writer_that_dates_what_it_changes_is_believed(
    store: RedisFeatures, client: "redis.Redis", written: dict[Any, Any]
) -> None:
    """Other systems know nothing of packed rows; the date they write makes the row untrue."""
    await store.write({"e": FIRST_ROW}, 1_000, [ROW])
    client.hset("features:e", mapping=written)

    answer = await store.read_packed("e", ROW)

    assert isinstance(answer, PackedFeatures)
    assert answer.row == struct.pack("<2f", 7.0, 0.25)


async def test_a_row_of_another_length_is_not_used(store: RedisFeatures, client: "redis.Redis") -> None:
    """Whatever stands in that field, the engine gets as many values as it takes."""
    await store.write({"e": FIRST_ROW}, 1_000)
    client.hset("features:e", f"_packed:{ROW.digest}", struct.pack("<q3f", 1_000, 1, 2, 3))

    assert await store.read_packed("e", ROW) == PackedFeatures(struct.pack("<2f", 0.5, 0.25), 1_000)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.dictionaries(
                st.sampled_from("abc"), st.none() | st.floats(-1e30, 1e30) | st.integers(-99, 99)
            ),
            st.tuples(st.sampled_from("abc"), texts_of_others),
            st.sampled_from(["del", "hdel"]),
        ),
        max_size=10,
    )
)
async def test_whoever_writes_packed_and_single_reads_give_the_same_bits(
    store: RedisFeatures, client: "redis.Redis", steps: list[Any]
) -> None:
    """Merges of ours mix with pipelines that set fields and dates; no order of them may show in an answer."""
    entity_id = f"e{next(numbers)}"
    signature = PackedSignature(entity_id, ROW.types)
    for at_ms, step in enumerate(steps, 1_000):
        if isinstance(step, dict):
            await store.write({entity_id: step}, at_ms, [signature])
        elif step == "del":
            client.delete(f"features:{entity_id}")
        else:
            name, text = step if isinstance(step, tuple) else ("a", None)
            with client.pipeline() as pipe:
                pipe.hset(f"features:{entity_id}", "_updated_at", at_ms)
                pipe.hdel(f"features:{entity_id}", name)
                if text is not None:
                    pipe.hset(f"features:{entity_id}", name, text)
                pipe.execute()

        packed = await store.read_packed(entity_id, signature)
        single = await store.read(entity_id, ROW.types)

        if isinstance(packed, PackedFeatures):
            assert single is not None
            assert struct.pack("<2f", *(single.values[name] for name in ROW.types)) == packed.row
            assert single.updated_at_ms == packed.updated_at_ms
        else:
            assert (single is None) == (packed is None)
            if single is not None and packed is not None:
                assert repr(single.values) == repr(packed.values)
                assert single.updated_at_ms == packed.updated_at_ms


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(texts_of_others, min_size=1, max_size=5))
async def test_rows_of_numbers_read_as_each_number_by_itself(
    store: RedisFeatures, client: "redis.Redis", texts: list[str]
) -> None:
    """Rows are decoded as one list, which no text may shift, split or round in another way."""
    entity_id = f"e{next(numbers)}"
    client.hset(f"features:{entity_id}", mapping={f"f{n}": text for n, text in enumerate(texts)})
    types = {f"f{n}": FeatureType.FLOAT for n in range(len(texts))}

    together = await read(store, entity_id, types)

    alone = {
        name: value
        for name in types
        for value in (
            await read(store, entity_id, {name: FeatureType.FLOAT, "none": FeatureType.STRING})
        ).values.values()
    }
    assert {name: repr(value) for name, value in alone.items()} == {
        name: repr(value) for name, value in together.values.items()
    }
    for name, text in zip(types, texts, strict=True):
        if isinstance(alone.get(name), float):
            assert repr(float(text)) == repr(alone[name])


# The lane


async def test_a_read_needs_no_task_around_it(store: RedisFeatures) -> None:
    """The hot lane drives its coroutines by hand: between it and the store there is one plain future."""
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check()
    reading = store.read("e", INTEGER)
    loop = asyncio.get_running_loop()
    awaited: list[asyncio.Future[Any]] = []
    answer = loop.create_future()

    def drive() -> None:
        try:
            awaited.append(reading.send(None))
        except StopIteration as end:
            answer.set_result(end.value)
        else:
            awaited[-1].add_done_callback(lambda _: drive())

    loop.call_soon(drive)

    assert StoredFeatures({"n": 1}, 1_000) == await answer
    assert len(awaited) == 1


class Scripted:
    """A server that keeps what it was sent, chunk by chunk, and says what it is told to."""

    def __init__(self, *answers: bytes | None) -> None:
        self.chunks: list[bytes] = []
        self.connections = 0
        self._answers = list(answers)
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Its URL, for as long as it listens."""
        port = free_port()
        async with await asyncio.start_server(self._answer, HOST, port):
            yield f"redis://{HOST}:{port}"
            for writer in self._writers:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        while chunk := await reader.read(1_000_000):
            self.chunks.append(chunk)
            answer = self._answers.pop(0)
            if answer is None:
                break
            writer.write(answer)
        writer.close()


async def test_reads_of_one_tick_leave_in_one_write(open_store: Opener) -> None:
    """A write is a system call of several microseconds, more than all the rest of a read."""
    server = Scripted(b"+PONG\r\n", b"*3\r\n$1\r\n7\r\n$-1\r\n$-1\r\n" * 64)
    async with server.serve() as url:
        store = open_store(url)
        await store.check()

        found = await asyncio.gather(*(store.read(f"e{n}", INTEGER) for n in range(64)))

    assert [StoredFeatures({"n": 7})] * 64 == found
    assert server.chunks[1].count(b"HMGET") == 64


async def test_what_a_lost_connection_leaves_unanswered_is_asked_again(open_store: Opener) -> None:
    """Redis closes connections at will; callers in flight get their own answers over the next one."""
    server = Scripted(
        b"*3\r\n$1\r\n0\r\n$-1\r\n$-1\r\n",
        b"*3\r\n$1\r\n1\r\n$-1\r\n$-1\r\n*3\r\n$1",
        None,
        b"*3\r\n$1\r\n2\r\n$-1\r\n$-1\r\n*3\r\n$1\r\n3\r\n$-1\r\n$-1\r\n",
    )
    async with server.serve() as url:
        store = open_store(url)
        await store.read("e0", INTEGER)
        reads = [asyncio.create_task(store.read(f"e{n}", INTEGER)) for n in (1, 2)]
        first = await reads[0]

        reads.append(asyncio.create_task(store.read("e3", INTEGER)))
        found = [first, *await asyncio.gather(*reads[1:])]

    assert [StoredFeatures({"n": n}) for n in (1, 2, 3)] == found
    assert server.connections == 2
    assert (server.chunks[3].count(b"features:e2"), server.chunks[3].count(b"features:e3")) == (1, 1)


async def test_an_answer_that_nobody_asked_for_ends_the_connection(open_store: Opener) -> None:
    """From then on nobody could tell whose the answers are."""
    answer = b"*3\r\n$1\r\n7\r\n$-1\r\n$-1\r\n"
    server = Scripted(answer + b"*3\r\n$3\r\n666\r\n$-1\r\n$-1\r\n", b"+PONG\r\n", answer)
    async with server.serve() as url:
        store = open_store(url)
        found = [await recovered(store), await recovered(store)]

    assert [StoredFeatures({"n": 7})] * 2 == found
    assert server.connections == 2


async def test_the_url_logs_in_chooses_the_database_and_names_the_client(
    open_store: Opener, redis_server: RedisServer, redis_url: str
) -> None:
    """What redis-py's users put into a URL works here too."""
    ask_redis(redis_server.url, "ACL", "SETUSER", "ann", "on", ">p@ss", "~*", "+@all")
    login = f"redis://ann:p%40ss@{HOST}:{redis_server.port}/3?client_name=phoenix"
    store = open_store(login)

    await store.write({"e": {"n": 1}}, 1_000)

    clients = ask_redis(redis_server.url, "CLIENT", "LIST").decode().splitlines()
    ours = [line for line in clients if "name=phoenix" in line]
    assert ours
    assert all("user=ann" in line and " db=3 " in line for line in ours)
    assert ask_redis(f"redis://{HOST}:{redis_server.port}/3", "HGET", "features:e", "n") == b"1"
    ask_redis(f"redis://{HOST}:{redis_server.port}/3", "FLUSHDB")


async def test_redis_over_tls_and_over_a_socket_file(open_store: Opener, tmp_path: Path) -> None:
    """Both are what a URL can say; a certificate that nobody vouches for is refused."""
    with SecuredRedisServer(tmp_path) as server:
        tls = f"rediss://{HOST}:{server.tls_port}"
        stores = [
            open_store(f"{tls}?ssl_ca_certs={server.certificate}"),
            open_store(f"unix://{server.socket}"),
        ]
        await stores[0].write({"e": {"n": 1}}, 1_000)

        found = [await read(store, "e", INTEGER) for store in stores]
        with pytest.raises(FeatureStoreUnavailable, match=r"(?i)certificate"):
            await open_store(tls).check()
        for store in stores:
            await store.close()

    assert [stored.values for stored in found] == [{"n": 1}] * 2


# Sentinels and clusters


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_a_failover_needs_nobody(
    open_store: Opener, redis_sentinel_url: str, redis_sentinel: RedisSentinel, fault: str
) -> None:
    """The sentinels make the replica the master; reads and writes go there, without a restart of ours."""
    store = open_store(redis_sentinel_url, SHORT_MS)
    master = redis_sentinel.master()
    await store.write({"e": {"n": 1}}, 1_000)
    await asyncio.to_thread(ask_redis, master.url, "WAIT", 1, 10_000)
    await store.check()
    await asyncio.to_thread(getattr(master, fault))

    with pytest.raises(FeatureStoreUnavailable, match=redis_sentinel.SERVICE):
        await store.read("e", INTEGER)
    stored = await recovered(store)
    await store.write({"e": {"n": 2}}, 2_000)

    assert stored is not None
    assert stored.values == {"n": 1}
    assert (await read(store, "e", INTEGER)).values == {"n": 2}
    assert master is not redis_sentinel.master()


async def test_a_sentinel_that_is_behind_leads_to_no_replica(
    open_store: Opener, redis_sentinel_url: str, redis_sentinel: RedisSentinel
) -> None:
    """Writes to it would fail, and its data grow old unnoticed."""
    replica = next(server for server in redis_sentinel.servers if server is not redis_sentinel.master())
    behind = Scripted(*[b"*2\r\n$9\r\n%b\r\n$5\r\n%d\r\n" % (HOST.encode(), replica.port)] * 50)
    async with behind.serve() as url:
        store = open_store(url.replace("redis://", "redis+sentinel://") + "/features")
        with pytest.raises(FeatureStoreUnavailable, match="is a slave"):
            await store.read("e", INTEGER)
        await store.close()


async def test_sentinels_that_know_no_such_service_are_named(
    open_store: Opener, redis_sentinel_url: str
) -> None:
    """A typing error in the service's name must not look like a network that is down."""
    store = open_store(redis_sentinel_url.replace("/features", "/feature"))

    with pytest.raises(FeatureStoreUnavailable, match="knows no service 'feature'"):
        await store.read("e", INTEGER)


def node_of(cluster: RedisCluster, entity_id: str) -> int:
    """The position of the node that has the entity, as the first node tells it."""
    slot = ask_redis(cluster.nodes[0].url, "CLUSTER", "KEYSLOT", f"features:{entity_id}")
    ranges = ask_redis(cluster.nodes[0].url, "CLUSTER", "SLOTS")
    (port,) = [master[1] for first, last, master, *_ in ranges if first <= slot <= last]
    return [node.port for node in cluster.nodes].index(port)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_a_node_that_fails_costs_its_own_entities_alone(
    open_store: Opener, redis_cluster_url: str, redis_cluster: RedisCluster, fault: str
) -> None:
    """A third of the predictions fall back on their requests; the others notice nothing."""
    store = open_store(redis_cluster_url, SHORT_MS)
    one_each = {node_of(redis_cluster, f"e{n}"): f"e{n}" for n in range(50)}
    await store.write({entity_id: {"n": node} for node, entity_id in one_each.items()}, 1_000)
    await store.check(patience_s=10.0)
    await asyncio.to_thread(getattr(redis_cluster.nodes[2], fault))

    with pytest.raises(FeatureStoreUnavailable):
        await store.read(one_each[2], INTEGER)
    others = [(await read(store, one_each[node], INTEGER)).values for node in (0, 1)]
    with pytest.raises(FeatureStoreUnavailable):
        await store.check()
    await asyncio.to_thread(redis_cluster.start)
    give_up_at = time.monotonic() + RECOVERY_DEADLINE_S
    back = None
    while back is None and time.monotonic() < give_up_at:
        with suppress(FeatureStoreUnavailable):
            await store.write({one_each[2]: {"n": 5}}, 2_000)
            back = await store.read(one_each[2], INTEGER)
        await asyncio.sleep(0.01)

    assert others == [{"n": 0}, {"n": 1}]
    assert back is not None
    assert back.values == {"n": 5}


async def test_a_slot_that_moves_is_followed(
    open_store: Opener, redis_cluster_url: str, redis_cluster: RedisCluster
) -> None:
    """Clusters are resized while they serve: before, during and after the move the answer is the same."""
    store = open_store(redis_cluster_url)
    await store.write({"{x}e": {"n": 1}, "{x}stays": {"n": 2}}, 1_000)
    slot = ask_redis(redis_cluster.nodes[0].url, "CLUSTER", "KEYSLOT", "features:{x}e")
    source = redis_cluster.nodes[node_of(redis_cluster, "{x}e")]
    target = next(node for node in redis_cluster.nodes if node is not source)
    ids = {node.port: ask_redis(node.url, "CLUSTER", "MYID") for node in (source, target)}

    found = [await read(store, "{x}e", INTEGER)]
    ask_redis(target.url, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
    ask_redis(source.url, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
    ask_redis(source.url, "MIGRATE", HOST, target.port, "features:{x}e", 0, 5_000)
    found += [await read(store, "{x}e", INTEGER)]
    await store.write({"{x}e": {"n": 1}}, 2_000)
    stays = await read(store, "{x}stays", INTEGER)
    ask_redis(source.url, "MIGRATE", HOST, target.port, "features:{x}stays", 0, 5_000)
    for node in (target, source):
        ask_redis(node.url, "CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
    found += [await read(store, "{x}e", INTEGER) for _ in range(3)]
    await store.write({"{x}e": {"n": 3}}, 3_000)

    assert [stored.values for stored in found] == [{"n": 1}] * 5
    assert stays.values == {"n": 2}
    assert (await read(store, "{x}e", INTEGER)).values == {"n": 3}


@given(key=st.text(st.sampled_from("a{}é"), max_size=8))
def test_keys_are_looked_for_where_the_cluster_has_them(key: str) -> None:
    """The rule of the braces is the cluster's own; redis-py is the oracle."""
    encoded = f"features:{key}".encode()

    assert key_slot(encoded) == slot_of(encoded)


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
    assert f"{SHORT_MS:g} ms" in str(reads[0])
    assert time.monotonic() - started < 20 * SHORT_MS / 1000, "each waited in turn"


async def test_checks_of_a_redis_that_hangs_hold_no_read_beyond_its_deadline(
    open_store: Opener, redis_url: str, redis_server: RedisServer
) -> None:
    """An orchestrator asks for readiness all the time, and predictions share the connection with that."""
    store = open_store(redis_server.url, SHORT_MS)
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check(patience_s=10.0)
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
    store = open_store(redis_url, 1_000.0)
    await store.write({"e": {"n": 1}}, 1_000)
    await store.check()
    read = asyncio.create_task(store.read("e", INTEGER))
    await asyncio.sleep(0)

    time.sleep(1.5)  # the loop stands still: that is the case, not a wait for something

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


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "redis://localhost:port",
        "redis://localhost/0?db=x",
        "redis+sentinel://localhost",
        "redis+sentinel://localhost/s?sentinel_pasword=x",
        "redis+sentinel:///service",
        "redis+cluster://localhost/1",
        "redis+cluster://localhost,",
        "redis+magic://localhost",
    ],
)
async def test_a_url_that_names_no_redis_is_a_misconfiguration(open_store: Opener, url: str) -> None:
    """It is said at the start, not at the first prediction."""
    with pytest.raises(Misconfigured):
        open_store(url)
