"""What the journal promises: nothing answered is lost, and nothing that was not answered is made up."""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from phoenix_ml.domain.errors import JournalFull
from phoenix_ml.domain.events import PredictionsMade
from phoenix_ml.domain.routing import Role, Strategy
from phoenix_ml.infrastructure.events.codec import expand_batch
from phoenix_ml.infrastructure.events.journal import JournalReader, JournalRecord, JournalWriter

DIGEST = bytes(range(16))
SCHEMA = b"income float, age int"

# Bytes that look like the beginning of a record are what a reader must not fall for.
payload_lists = st.lists(
    st.binary(max_size=40) | st.just(b"\xf5PJ1") | st.just(b"\xf5PJ1" + bytes(17)), min_size=1, max_size=6
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "api-0"


@contextmanager
def fresh_root() -> Iterator[Path]:
    """A journal for one example of a property, which a fixture would share between examples."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.segment"), key=lambda path: path.name)


def read_all(reader: JournalReader) -> list[JournalRecord]:
    records = []
    while more := reader.read(3):
        records += more
    return records


def events(records: list[JournalRecord]) -> list[bytes]:
    return [record.payload for record in records if not record.damage]


def damage(records: list[JournalRecord]) -> list[bytes]:
    return [record.payload for record in records if record.damage]


def batch(inputs: bytes, count: int) -> bytes:
    """A batch as it goes on record, of so many rows with these inputs."""
    made = PredictionsMade(
        first_id="01930000-0000-7000-8000-f0123456789a",
        model_id="m",
        model_version="1",
        sha256="",
        strategy=Strategy.SINGLE,
        role=Role.CHAMPION,
        probability=1.0,
        request_id="",
        routing_key="",
        inputs=[inputs] * count,
        sources="r",
        results=list(range(count)),
        confidences=None,
        probabilities=None,
        latency_ms=0.5,
        created_at_ms=1,
    )
    return msgspec.msgpack.encode(made)


def write_segment(root: Path, payloads: list[bytes]) -> Path:
    """One closed segment, in which events, batches of two and groups of two follow each other."""
    writer = JournalWriter(root / "api-0")
    for number, payload in enumerate(payloads):
        if number % 3 == 1:
            writer.append_batch(batch(payload, 2), 2)
        elif number % 3 == 2:
            writer.append_many([payload, b"twin of " + payload])
        else:
            writer.append(payload)
    writer.close()
    (segment,) = segments(root)
    return segment


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# Round trip


@given(
    batches=st.lists(st.lists(st.binary(max_size=200), min_size=1, max_size=4), max_size=12),
    segment_bytes=st.integers(1, 2000),
    digest_bytes=st.integers(8, 32),
    max_events=st.integers(1, 10),
)
@settings(max_examples=60, deadline=None)
def test_every_event_comes_back_in_order_with_its_schema(
    batches: list[list[bytes]], segment_bytes: int, digest_bytes: int, max_events: int
) -> None:
    """Whatever the sizes, what was answered is what is shipped."""
    schemas = {bytes([number + 1]) * digest_bytes: b"schema %d" % number for number in range(3)}
    with fresh_root() as root:
        writer = JournalWriter(root / "api-0", segment_bytes=segment_bytes)
        expected = []
        for number, payloads in enumerate(batches):
            digest, schema = [(b"", b""), *schemas.items()][number % 4]
            made = batch(payloads[0], 2)
            if len(payloads) == 1:
                writer.append(payloads[0], digest, schema)
            elif len(payloads) == 2:
                writer.append_batch(made, 2, digest, schema)
            else:
                writer.append_many(payloads, digest, schema)
            written = expand_batch(made) if len(payloads) == 2 else payloads
            expected += [(payload, schema or None, "") for payload in written]
        writer.close()

        reader = JournalReader(root)
        actual = []
        while records := reader.read(max_events):
            actual += [(record.payload, record.schema, record.damage) for record in records]

        assert expected == actual
        assert (reader.corrupt_regions, reader.torn_tails) == (0, 0)
        reader.commit()
        assert segments(root) == []


def test_each_segment_carries_the_schemas_of_its_events(root: Path, folder: Path) -> None:
    """A reader that starts at any segment, after the others were dropped, must understand its events."""
    writer = JournalWriter(folder, segment_bytes=200)
    for number in range(20):
        writer.append(b"event %d" % number, DIGEST, SCHEMA)
    writer.close()
    paths = segments(root)
    assert len(paths) > 2
    for path in paths[:-1]:
        path.unlink()

    actual = read_all(JournalReader(root))

    assert {(SCHEMA, "")} == {(record.schema, record.damage) for record in actual}
    assert actual[-1].payload == b"event 19"


def test_a_schema_is_written_once_a_segment(root: Path, folder: Path) -> None:
    """Schemas are larger than events; repeated with each, they would fill the disk."""
    writer = JournalWriter(folder)
    for _ in range(10):
        writer.append(b"event", DIGEST, SCHEMA)
    writer.append_many([b"event"] * 3, DIGEST, SCHEMA)
    writer.close()

    (segment,) = segments(root)

    assert segment.read_bytes().count(SCHEMA) == 1


def test_an_event_larger_than_a_segment_gets_one_of_its_own(root: Path, folder: Path) -> None:
    """The size of a segment is a wish; refusing an answer over it would be a failure."""
    writer = JournalWriter(folder, segment_bytes=100)
    expected = [b"small", bytes(1_000_000), b"small too"]
    for payload in expected:
        writer.append(payload)
    writer.close()

    assert expected == events(read_all(JournalReader(root)))
    assert len(segments(root)) == 3


def test_each_start_opens_a_new_segment(root: Path, folder: Path) -> None:
    """A dead writer's torn tail must never be followed by good records."""
    for _ in range(2):
        writer = JournalWriter(folder)
        writer.append(b"event")
        writer.close()

    assert len(segments(root)) == 2


def test_a_clock_set_back_does_not_disorder_segments(root: Path, folder: Path) -> None:
    """Segment names sort by time, and the wall clock of a server is corrected now and then."""
    folder.mkdir(parents=True)
    from_the_future = folder / "09000000000000000000-00000000.segment"
    from_the_future.touch()
    writer = JournalWriter(folder)
    writer.append(b"event")
    writer.close()

    assert from_the_future == segments(root)[0]


def test_segments_are_for_the_owner_alone(root: Path, folder: Path) -> None:
    """They hold the features of people."""
    JournalWriter(folder).append(b"event")

    (segment,) = segments(root)

    assert stat.S_IMODE(segment.stat().st_mode) == 0o600


def test_a_writer_without_events_leaves_nothing(folder: Path) -> None:
    """Idle workers that restart would otherwise litter the folder."""
    writer = JournalWriter(folder)
    writer.sync()
    writer.close()

    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("payload", "digest", "schema"),
    [
        (bytes(64 * 1024 * 1024 + 1), b"", b""),
        (b"event", b"short", SCHEMA),
        (b"event", b"l" * 33, SCHEMA),
        (b"event", bytes(16), SCHEMA),
        (b"event", b"f" * 16, b""),
        (b"event", DIGEST[:8] + b"another's", b"another schema"),
    ],
    ids=["huge", "short digest", "long digest", "zero digest", "no schema", "digests alike"],
)
def test_what_could_not_be_read_back_is_refused(
    root: Path, folder: Path, payload: bytes, digest: bytes, schema: bytes
) -> None:
    """A defect of the caller has to show at once, not as a damaged journal."""
    writer = JournalWriter(folder)
    writer.append(b"before", DIGEST, SCHEMA)

    with pytest.raises(ValueError):
        writer.append(payload, digest, schema)
    with pytest.raises(ValueError):
        writer.append_batch(payload, 1, digest, schema)

    writer.append(b"after", DIGEST, SCHEMA)
    assert events(read_all(JournalReader(root))) == [b"before", b"after"]


def test_a_closed_journal_takes_nothing(folder: Path) -> None:
    """An answer after the close would be on no record."""
    writer = JournalWriter(folder)
    writer.append(b"event")
    writer.close()

    with pytest.raises(ValueError):
        writer.append(b"event")
    with pytest.raises(ValueError):
        writer.append_batch(batch(b"", 2), 2)

    assert len(list(folder.iterdir())) == 1


# Damage


@given(payloads=payload_lists)
@settings(max_examples=8, deadline=None)
def test_whole_records_before_any_cut_come_back_and_the_rest_is_torn(payloads: list[bytes]) -> None:
    """A crash may leave any prefix of what was written."""
    with fresh_root() as root:
        segment = write_segment(root, payloads)
        content = segment.read_bytes()
        intact = read_all(JournalReader(root))
        boundaries = {record.position for record in intact} | {len(content)}
        for cut in range(len(content)):
            segment.write_bytes(content[:cut])
            last_boundary = max(boundary for boundary in boundaries if boundary <= cut)
            expected = [record for record in intact if record.position < last_boundary]
            reader = JournalReader(root)

            actual = read_all(reader)
            reader.close()

            assert expected == actual
            assert (0, cut not in boundaries) == (reader.corrupt_regions, reader.torn_tails)


@given(payloads=payload_lists)
@settings(max_examples=5, deadline=None)
def test_any_flipped_bit_costs_its_own_record_only(payloads: list[bytes]) -> None:
    """Disks rot; one bad bit must not cost the segment, and must never become a wrong record."""
    with fresh_root() as root:
        segment = write_segment(root, payloads)
        content = segment.read_bytes()
        intact = read_all(JournalReader(root))
        starts = sorted({record.position for record in intact})
        for bit in range(len(content) * 8):
            flip_bit(segment, bit)
            touched = max(start for start in starts if start <= bit // 8)
            end = min((start for start in starts if start > touched), default=len(content))
            flipped = segment.read_bytes()[touched:end]
            expected = [record for record in intact if record.position != touched]
            reader = JournalReader(root)

            actual = read_all(reader)
            reader.close()

            assert expected == [record for record in actual if not record.damage]
            # The length of the last record may have grown: then it can't be told from an unfinished one.
            assert reader.corrupt_regions + reader.torn_tails == 1
            assert [flipped] * reader.corrupt_regions == damage(actual)
            segment.write_bytes(content)


@pytest.mark.parametrize("bit", [8 * 9 + 4, 8 * 30], ids=["length", "payload"])
def test_batches_behind_damage_are_found(root: Path, folder: Path, bit: int) -> None:
    """A batch holds many answers, and at the end of a segment nothing else would tell that they are gone."""
    writer = JournalWriter(folder)
    writer.append(b"before")
    damaged_at = writer.stored_bytes
    writer.append(b"damaged, and long enough")
    writer.append_batch(batch(b"1", 2), 2)
    writer.append_batch(batch(b"2", 2), 2)
    writer.close()
    (segment,) = segments(root)
    flip_bit(segment, damaged_at * 8 + bit)
    reader = JournalReader(root)

    actual = read_all(reader)

    assert events(actual) == [b"before", *expand_batch(batch(b"1", 2)), *expand_batch(batch(b"2", 2))]
    assert (len(damage(actual)), reader.corrupt_regions, reader.torn_tails) == (1, 1, 0)


def test_a_record_inside_a_payload_is_never_mistaken_for_one(root: Path, folder: Path) -> None:
    """Payloads hold what callers sent: nobody may forge a prediction by way of a damaged disk."""
    writer = JournalWriter(folder)
    writer.append(b"genuine")
    (segment,) = segments(root)
    forged = segment.read_bytes()
    writer.close()
    segment.unlink()
    writer = JournalWriter(folder)
    writer.append(b"before")
    writer.append(forged)
    writer.append(b"after")
    writer.close()
    (segment,) = segments(root)
    flip_bit(segment, (segment.read_bytes().index(forged) - 1) * 8)

    actual = read_all(JournalReader(root))

    assert events(actual) == [b"before", b"after"]


def test_an_event_whose_schema_is_lost_comes_with_that_reason(root: Path, folder: Path) -> None:
    """It can't be decoded now, but a person with the schema still can."""
    writer = JournalWriter(folder)
    for payload in (b"first", b"second", b"third"):
        writer.append(payload, DIGEST, SCHEMA)
    writer.close()
    (segment,) = segments(root)
    flip_bit(segment, segment.read_bytes().index(SCHEMA) * 8)

    actual = read_all(JournalReader(root))[1:]

    assert damage(actual) == [b"second", b"third"]
    assert f"the event's schema {DIGEST[:8].hex()} was lost to damage" == actual[0].damage


def test_a_schema_lost_in_one_segment_is_taken_from_another(root: Path, folder: Path) -> None:
    """One bad bit in a schema would otherwise cost all events of its segment."""
    writer = JournalWriter(folder, segment_bytes=250)
    for number in range(8):
        writer.append(b"event %d" % number, DIGEST, SCHEMA)
    writer.close()
    segment = segments(root)[1]
    flip_bit(segment, segment.read_bytes().index(SCHEMA) * 8)

    actual = read_all(JournalReader(root))

    assert len(events(actual)) == 7
    assert len(damage(actual)) == 1


def test_torn_tail_of_a_dead_writer_is_cut_and_counted(root: Path, folder: Path) -> None:
    """It was never answered for, so it is neither an event nor a loss."""
    writer = JournalWriter(folder)
    writer.append(b"whole")
    writer.append(b"torn")
    writer.close()
    (segment,) = segments(root)
    os.truncate(segment, segment.stat().st_size - 1)
    reader = JournalReader(root)

    actual = read_all(reader)
    reader.commit()

    assert [record.payload for record in actual] == [b"whole"]
    assert (reader.torn_tails, reader.corrupt_regions) == (1, 0)
    assert segments(root) == []


def test_zeros_that_a_power_loss_leaves_are_a_torn_tail(root: Path, folder: Path) -> None:
    """File systems may keep the length of a file and lose its last blocks."""
    writer = JournalWriter(folder)
    writer.append(b"whole")
    writer.close()
    (segment,) = segments(root)
    os.truncate(segment, segment.stat().st_size + 5000)
    reader = JournalReader(root)

    actual = read_all(reader)

    assert [record.payload for record in actual] == [b"whole"]
    assert reader.torn_tails == 1


def test_damage_is_handed_out_whole_in_pieces(root: Path, folder: Path) -> None:
    """The dead-letter topic limits a message, and its reader may still rescue something."""
    writer = JournalWriter(folder)
    writer.append(os.urandom(1_200_000))
    writer.append(b"after")
    writer.close()
    (segment,) = segments(root)
    flip_bit(segment, 8 * 100)
    content = segment.read_bytes()
    reader = JournalReader(root)

    actual = read_all(reader)

    assert events(actual) == [b"after"]
    assert content[: actual[-1].position] == b"".join(damage(actual))
    assert max(len(piece) for piece in damage(actual)) == 512 * 1024
    assert reader.corrupt_regions == 1


@pytest.mark.parametrize("offset_bytes", range(-4, 3))
def test_the_record_after_damage_is_found_wherever_reads_divide_it(
    root: Path, folder: Path, offset_bytes: int
) -> None:
    """A reader looks for it in pieces of 256 KiB, and its marker may lie across two of them."""
    writer = JournalWriter(folder)
    # The first record is a group: besides its payload it takes a header of 21 bytes and two lengths.
    writer.append(bytes(256 * 1024 + offset_bytes - 29))
    writer.append(b"after")
    writer.close()
    (segment,) = segments(root)
    flip_bit(segment, 8 * 100)

    actual = read_all(JournalReader(root))

    assert actual[-1].position == 256 * 1024 + offset_bytes
    assert events(actual) == [b"after"]


def test_a_segment_that_the_disk_refuses_does_not_stop_the_others(root: Path, folder: Path) -> None:
    """One bad block must not end the shipping of everything."""
    unreadable = folder / "00000000000000000001-00000000.segment"
    unreadable.mkdir(parents=True)
    writer = JournalWriter(folder)
    writer.append(b"event")
    writer.close()
    reader = JournalReader(root)

    actual = read_all(reader)

    assert events(actual) == [b"event"]
    assert {unreadable} == set(reader.unreadable)


# A writer that lives


def test_an_unfinished_record_of_a_live_writer_is_waited_for(root: Path, folder: Path) -> None:
    """A reader sees a large write grow; to call it torn would lose an answer."""
    writer = JournalWriter(folder)
    writer.append(b"event")
    (segment,) = segments(root)
    record = segment.read_bytes()
    reader = JournalReader(root)
    read_all(reader)

    with segment.open("ab", buffering=0) as live:
        live.write(record[:-3])
        before = reader.read(10)
        live.write(record[-3:])
        after = reader.read(10)

    assert (before, events(after)) == ([], [b"event"])
    assert reader.torn_tails == 0


def test_half_a_record_that_a_live_writer_takes_back_leaves_no_trace(root: Path, folder: Path) -> None:
    """With a full disk that happens, and the reader may have looked in between."""
    writer = JournalWriter(folder)
    writer.append(b"first")
    (segment,) = segments(root)
    reader = JournalReader(root)
    read_all(reader)
    size = segment.stat().st_size
    with segment.open("ab", buffering=0) as live:
        live.write(segment.read_bytes()[:-1])
        assert reader.read(10) == []
        live.truncate(size)

    writer.append(b"second, and longer than the first")

    assert events(reader.read(10)) == [b"second, and longer than the first"]
    assert (reader.corrupt_regions, reader.torn_tails) == (0, 0)


@pytest.mark.parametrize("byte", [0, 5, 8, 10, 12, 14, 22], ids=lambda byte: f"byte {byte}")
def test_damage_in_a_live_segment_is_skipped_once_a_record_follows(
    root: Path, folder: Path, byte: int
) -> None:
    """Before that it may be an unfinished write; after that it can't, and the events behind it must flow."""
    writer = JournalWriter(folder)
    writer.append(b"damaged")
    (segment,) = segments(root)
    with segment.open("r+b", buffering=0) as live:
        live.seek(byte)
        live.write(b"\xff")
    reader = JournalReader(root)
    waiting = reader.read(10)

    writer.append(b"sound")

    assert waiting == []
    assert events(reader.read(10)) == [b"sound"]
    assert reader.corrupt_regions == 1


def test_a_live_segment_is_not_deleted(root: Path, folder: Path) -> None:
    """Its writer would go on appending to a file without a name."""
    writer = JournalWriter(folder)
    reader = JournalReader(root)
    writer.append(b"first")
    read_all(reader)
    reader.commit()

    writer.append(b"second")

    assert events(read_all(reader)) == [b"second"]
    assert len(segments(root)) == 1


def test_an_idle_segment_is_dropped_after_its_age(root: Path, folder: Path) -> None:
    """A worker without traffic would otherwise keep its last segment for days."""
    clock = Clock()
    writer = JournalWriter(folder, max_age_s=30.0, clock=clock)
    reader = JournalReader(root)
    writer.append(b"event")
    clock.now_s = 29.9
    writer.rotate_if_old()
    read_all(reader)
    reader.commit()
    young = len(segments(root))
    clock.now_s = 30.0
    writer.rotate_if_old()
    read_all(reader)
    reader.commit()

    assert (young, len(segments(root))) == (1, 0)
    writer.append(b"next")
    assert events(read_all(reader)) == [b"next"]


def test_only_what_was_read_before_the_commit_is_deleted(root: Path, folder: Path) -> None:
    """A segment read in part is all that holds the rest."""
    writer = JournalWriter(folder)
    for number in range(4):
        writer.append(b"%d" % number)
    writer.close()
    reader = JournalReader(root)
    reader.read(3)
    reader.commit()

    assert events(reader.read(3)) == [b"3"]
    assert len(segments(root)) == 1


def test_the_leftover_of_a_dead_writer_is_removed_and_that_of_a_live_one_is_not(
    root: Path, folder: Path
) -> None:
    """A writer killed between creating and locking leaves a file that nobody else would ever touch."""
    folder.mkdir(parents=True)
    dead, alive = folder / "1-1.opening", folder / "2-2.opening"
    dead.touch()
    with alive.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        JournalReader(root).read(1)

        assert [alive] == list(folder.iterdir())


def test_pending_counts_what_is_not_committed(root: Path, folder: Path) -> None:
    """A gauge that falls on reading would hide that nothing is stored."""
    writer = JournalWriter(folder)
    reader = JournalReader(root)
    nothing = (reader.pending_bytes, reader.oldest_pending_s)
    writer.append(b"event")
    read_all(reader)
    read_only = reader.pending_bytes
    assert 0.0 < reader.oldest_pending_s < 60.0
    reader.commit()

    assert nothing == (0, 0.0)
    assert writer.stored_bytes == read_only
    assert (reader.pending_bytes, reader.oldest_pending_s) == (0, 0.0)


def test_syncing_elsewhere_disturbs_no_rotation(root: Path, folder: Path) -> None:
    """A sync that met a closed, reused file number would sync a stranger, or fail."""
    writer = JournalWriter(folder, segment_bytes=200)
    stop = threading.Event()
    failures: list[OSError] = []

    def sync_on_and_on() -> None:
        try:
            while not stop.is_set():
                writer.sync()
        except OSError as exc:
            failures.append(exc)

    thread = threading.Thread(target=sync_on_and_on)
    thread.start()
    reader = JournalReader(root)
    expected = [b"event %d" % number for number in range(2000)]
    actual = []
    for payload in expected:
        writer.append(payload)
        actual += events(reader.read(10))
        reader.commit()
    stop.set()
    thread.join()
    writer.close()
    actual += events(read_all(reader))

    assert failures == []
    assert expected == actual


# Limits


def test_a_journal_at_its_limit_refuses_until_segments_are_dropped(root: Path, folder: Path) -> None:
    """A database that is down for days must not fill the disk, and must not need a restart afterwards."""
    clock = Clock()
    writer = JournalWriter(folder, segment_bytes=1000, limit_bytes=2000, clock=clock)
    appended = 0

    def append_on_and_on() -> None:
        nonlocal appended
        while appended < 1000:
            writer.append(b"event %d" % appended)
            appended += 1

    with pytest.raises(JournalFull):
        append_on_and_on()
    stored_when_full = writer.stored_bytes
    with pytest.raises(JournalFull):
        writer.append_many([b"more", b"and more"])
    reader = JournalReader(root)
    first = events(read_all(reader))
    reader.commit()
    clock.now_s += 1

    writer.append(b"last")

    assert [b"event %d" % number for number in range(appended)] == first
    assert 1900 < stored_when_full <= 2000
    assert events(read_all(reader)) == [b"last"]


def test_a_journal_at_its_limit_in_its_only_segment_can_be_drained(root: Path, folder: Path) -> None:
    """An open segment is not dropped, so a writer that kept it would stay full for ever."""
    clock = Clock()
    writer = JournalWriter(folder, limit_bytes=100, clock=clock)
    writer.append(bytes(60))
    with pytest.raises(JournalFull):
        writer.append(bytes(60))
    reader = JournalReader(root)
    read_all(reader)
    reader.commit()
    clock.now_s += 1

    writer.append(b"again")

    assert events(read_all(reader)) == [b"again"]


def test_a_journal_tells_that_it_refuses_until_it_would_take_the_same_again(root: Path, folder: Path) -> None:
    """Readiness is asked for by whoever sends the traffic: said too late, requests are lost, said for ever, a process."""
    clock = Clock()
    writer = JournalWriter(folder, limit_bytes=1000, clock=clock)
    writer.append(bytes(600))
    before = writer.refusal
    with pytest.raises(JournalFull):
        writer.append(bytes(600))
    while_full = writer.refusal
    stored_bytes = writer.stored_bytes
    clock.now_s += 1
    writer.append(b"a small one")
    after_success = writer.refusal
    with pytest.raises(JournalFull):
        writer.append_many([bytes(300), bytes(300)])
    refused_again = writer.refusal
    reader = JournalReader(root)
    read_all(reader)
    reader.commit()

    assert stored_bytes < 1000
    assert while_full == f"full: {stored_bytes} bytes wait to be logged"
    assert refused_again.startswith("full: ")
    assert (before, after_success, writer.refusal) == ("", "", "")


# Other processes


@contextmanager
def child(program: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real process with a writer; killed at the end if it is still there."""
    preamble = (
        "import os, sys; from pathlib import Path\n"
        "from phoenix_ml.domain.errors import JournalFull\n"
        "from phoenix_ml.infrastructure.events.journal import JournalWriter\n"
        f"folder = Path({str(folder)!r})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", preamble + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kill_after", [1, 300, 7000])
def test_each_event_answered_before_kill_9_is_read_back(root: Path, folder: Path, kill_after: int) -> None:
    """The promise of the journal: an append that returned is an answer that counts."""
    program = """
writer = JournalWriter(folder, segment_bytes=20_000)
number = 0
while True:
    writer.append(b"event %08d" % number, b"d" * 16, b"schema")
    os.write(1, b"%08d" % number)
    number += 1
"""
    with child(program, folder) as process:
        assert process.stdout is not None
        reported = process.stdout.read(8 * kill_after)
        process.send_signal(signal.SIGKILL)
        reported += process.stdout.read()
        # Only then are its locks gone, too: the pipe's end comes before.
        process.wait()
    answered = int(reported[len(reported) // 8 * 8 - 8 :][:8]) + 1
    reader = JournalReader(root)

    actual = read_all(reader)
    reader.commit()

    assert answered >= kill_after
    assert [b"event %08d" % number for number in range(len(actual))] == events(actual)
    assert len(actual) - answered in {0, 1}
    assert segments(root) == []


def test_a_writer_in_another_process_is_read_while_it_lives(root: Path, folder: Path) -> None:
    """This is how the background process works all day."""
    program = """
writer = JournalWriter(folder)
for line in sys.stdin.buffer:
    writer.append(line.strip())
    os.write(1, b"1")
"""
    with child(program, folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        reader = JournalReader(root)
        while_alive = []
        for line in (b"first", b"second"):
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            process.stdout.read(1)
            while_alive += events(reader.read(10))
            reader.commit()
        kept = len(segments(root))
        process.kill()
        process.wait()
    read_all(reader)
    reader.commit()

    assert while_alive == [b"first", b"second"]
    assert (kept, len(segments(root))) == (1, 0)


def test_nothing_is_lost_or_disordered_while_another_process_rotates(root: Path, folder: Path) -> None:
    """A segment's last bytes, its unlocking and the next segment come in an order that a reader must respect."""
    program = """
writer = JournalWriter(folder, segment_bytes=2000)
for number in range(20_000):
    writer.append(b"event %d" % number, b"d" * 16, b"schema")
writer.close()
"""
    reader = JournalReader(root)
    actual: list[bytes] = []
    with child(program, folder) as process:
        while process.poll() is None:
            actual += events(reader.read(50))
            reader.commit()
    actual += events(read_all(reader))
    reader.commit()

    assert process.returncode == 0
    assert actual == [b"event %d" % number for number in range(20_000)]
    assert segments(root) == []


def test_large_batches_are_read_whole_while_another_process_writes_them(root: Path, folder: Path) -> None:
    """A reader sees such a write grow, and by the time it looks twice the batch is whole and more follows."""
    program = """
made = sys.stdin.buffer.read()
writer = JournalWriter(folder)
for number in range(400):
    writer.append_batch(made, 2)
    writer.append(b"between")
writer.close()
"""
    reader = JournalReader(root)
    actual: list[bytes] = []
    with child(program, folder) as process:
        assert process.stdin is not None
        process.stdin.write(batch(bytes(300_000), 2))
        process.stdin.close()
        while process.poll() is None:
            actual += events(reader.read(50))
            reader.commit()
    actual += events(read_all(reader))

    assert process.returncode == 0
    assert (len(actual), reader.corrupt_regions) == (1200, 0)


def test_a_forked_process_does_not_keep_closed_segments_from_being_dropped(root: Path, folder: Path) -> None:
    """It inherits the lock with the file, knows nothing of it, and may live for long."""
    program = """
writer = JournalWriter(folder)
writer.append(b"event")
if os.fork():
    writer.close()
    os.write(1, b"1")
    os.wait()
else:
    os.read(0, 1)
"""
    with child(program, folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.read(1)
        reader = JournalReader(root)
        actual = events(read_all(reader))
        reader.commit()
        kept = segments(root)
        process.stdin.write(b"1")
        process.stdin.flush()
        process.wait()

    assert actual == [b"event"]
    assert kept == []


def test_a_full_disk_refuses_and_leaves_the_journal_whole(root: Path, folder: Path) -> None:
    """Half a record, or half a group, would be an answer that was refused and yet on record."""
    # A limit on the size of files makes write(2) fall short and then fail, as a full disk does.
    program = """
import resource
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def state():
    return writer.refusal.replace(" ", "_") or "ok"
def refused(*payloads):
    try:
        writer.append_many(payloads) if len(payloads) > 1 else writer.append(*payloads)
    except JournalFull:
        return True
    return False
writer = JournalWriter(folder)
limit(0)
print(refused(b"never"), state())
limit(1000)
print(state())
count = 0
while not refused(b"event %d" % count):
    count += 1
print(count)
print(refused(bytes(300)), refused(*[b"group"] * 5))
limit(1_000_000)
print(refused(b"again"), refused(*[b"group"] * 2), state())
"""
    with child(program, folder) as process:
        output, _ = process.communicate()
    nothing_fits, while_full, after, count, *rest = output.decode().split()
    reader = JournalReader(root)

    actual = read_all(reader)

    assert [nothing_fits, *rest] == ["True", "True", "True", "False", "False", "ok"]
    assert (while_full, after) == ("the_disk_takes_no_more:_File_too_large", "ok")
    assert int(count) > 20
    expected = [b"event %d" % number for number in range(int(count))]
    assert [*expected, b"again", b"group", b"group"] == [record.payload for record in actual]
    assert (reader.corrupt_regions, reader.torn_tails) == (0, 0)


# Everything in any order


class JournalMachine(RuleBasedStateMachine):
    """Two workers, one background process, restarts and crashes; the model is a list a worker."""

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.workers = ["api-0", "api-1"]
        self.appended: dict[str, list[bytes]] = {worker: [] for worker in self.workers}
        self.committed = dict.fromkeys(self.workers, 0)
        self.reached: dict[str, int | None] = dict.fromkeys(self.workers)
        self.writers = {worker: self.new_writer(worker) for worker in self.workers}
        self.reader = JournalReader(self.root)

    def new_writer(self, worker: str) -> JournalWriter:
        return JournalWriter(self.root / worker, segment_bytes=150, clock=self.clock)

    def next_payloads(self, worker: str, count: int) -> list[bytes]:
        start = len(self.appended[worker])
        payloads = [f"{worker} {number}".encode() for number in range(start, start + count)]
        self.appended[worker] += payloads
        return payloads

    @rule(worker=st.sampled_from(["api-0", "api-1"]), count=st.integers(1, 4), kind=st.integers(0, 2))
    def append(self, worker: str, count: int, kind: int) -> None:
        digest, schema = (b"", b"") if kind == 0 else (bytes([kind]) * 16, b"schema %d" % kind)
        for payload in self.next_payloads(worker, count):
            self.writers[worker].append(payload, digest, schema)

    @rule(worker=st.sampled_from(["api-0", "api-1"]), count=st.integers(0, 4))
    def append_many(self, worker: str, count: int) -> None:
        self.writers[worker].append_many(self.next_payloads(worker, count), DIGEST, SCHEMA)

    @rule(worker=st.sampled_from(["api-0", "api-1"]), count=st.integers(1, 4))
    def append_batch(self, worker: str, count: int) -> None:
        made = batch(f"{worker} {len(self.appended[worker])}".encode(), count)
        self.appended[worker] += expand_batch(made)
        self.writers[worker].append_batch(made, count, DIGEST, SCHEMA)

    @rule(worker=st.sampled_from(["api-0", "api-1"]))
    def grow_old(self, worker: str) -> None:
        self.clock.now_s += 30
        self.writers[worker].rotate_if_old()
        self.writers[worker].sync()

    @rule(worker=st.sampled_from(["api-0", "api-1"]))
    def restart_writer(self, worker: str) -> None:
        self.writers[worker].close()
        self.writers[worker] = self.new_writer(worker)

    @rule(worker=st.sampled_from(["api-0", "api-1"]), tail_bytes=st.integers(1, 25))
    def crash_writer(self, worker: str, tail_bytes: int) -> None:
        # So that its last segment is one that is still open, and not torn before.
        self.writers[worker].append_many(self.next_payloads(worker, 1))
        self.restart_writer(worker)
        with max((self.root / worker).glob("*.segment")).open("ab") as dead:
            dead.write((b"\xf5PJ1" + b"\x01" * 30)[:tail_bytes])

    @rule(max_events=st.integers(1, 12))
    def read_some(self, max_events: int) -> None:
        self.read(max_events)

    def read(self, max_events: int) -> int:
        records = self.reader.read(max_events)
        for record in records:
            assert not record.damage
            worker = record.segment.parent.name
            place = self.appended[worker].index(record.payload)
            reached = self.reached[worker]
            if reached is None:
                assert place <= self.committed[worker]
            else:
                assert reached == place
            self.reached[worker] = place + 1
        return len(records)

    @rule()
    def commit(self) -> None:
        self.reader.commit()
        for worker in self.workers:
            self.committed[worker] = max(self.committed[worker], self.reached[worker] or 0)

    @rule()
    def restart_reader(self) -> None:
        self.reader.close()
        self.reader = JournalReader(self.root)
        self.reached = dict.fromkeys(self.workers)

    def teardown(self) -> None:
        if not hasattr(self, "root"):
            return
        for worker in self.workers:
            self.writers[worker].close()
        self.restart_reader()
        while self.read(12):
            pass
        expected = {worker: len(self.appended[worker]) for worker in self.workers}
        for worker in self.workers:
            # Nothing left to read is right only where all had been committed.
            reached = self.reached[worker]
            assert expected[worker] == (self.committed[worker] if reached is None else reached)
        self.reader.commit()
        assert segments(self.root) == []
        self.reader.close()
        shutil.rmtree(self.root)


TestAnyOrder = JournalMachine.TestCase
TestAnyOrder.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
