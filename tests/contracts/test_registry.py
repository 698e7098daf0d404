"""The registry's contract, over SQLite and a real PostgreSQL."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from databases import empty
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from servers import PostgresServer

from phoenix_ml.application.catalogue import set_routing
from phoenix_ml.domain.baselines import Baseline, FeatureBaseline
from phoenix_ml.domain.errors import (
    DatabaseUnavailable,
    InvalidField,
    Misconfigured,
    ModelUnknown,
    RoutingConflict,
    RoutingInvalid,
    StageConflict,
    VersionConflict,
    VersionInactive,
    VersionUnknown,
)
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Signature, Stage, Task, TensorSpec
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.registry import SqlRegistry

SINGLE = Routing(Strategy.SINGLE, (Arm("1.0.0"),))
METADATA = Metadata(
    signature=Signature((TensorSpec("x", "float32", (None, 2)),), (TensorSpec("y", "float32", (None, 1)),)),
    features=("income", "age"),
    contract={
        "income": FeatureRule(FeatureType.FLOAT),
        "age": FeatureRule(FeatureType.INTEGER, default=40, max_age_s=60.0, description="in years"),
    },
    task=Task.REGRESSION,
    scores_output="y",
    sample=(1.5, 40),
    runtime="onnxruntime 1.0",
)


def a_version(number: str = "1.0.0", model_id: str = "risk", **facts: Any) -> ModelVersion:
    version = ModelVersion(
        model_id=model_id,
        version=number,
        framework=Framework.ONNX,
        uri="sha256/ab/" + "ab" * 32,
        sha256="ab" * 32,
        stage=Stage.DEV,
        is_active=False,
        created_at_ms=1_700_000_000_123,
        metadata=METADATA,
    )
    return msgspec.structs.replace(version, **facts)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database(url)) as database:
        empty(database)
        yield database


@pytest.fixture
def registry(database: Database) -> SqlRegistry:
    return SqlRegistry(database)


def run_at_once(*actions: Callable[[], object]) -> list[Exception | None]:
    """What each action raised; all start at the same moment, each in a thread of its own."""
    barrier = threading.Barrier(len(actions))
    raised: list[Exception | None] = [None] * len(actions)

    def run(position: int, action: Callable[[], object]) -> None:
        barrier.wait()
        try:
            action()
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            raised[position] = exc

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_a_version_comes_back_as_it_was_added(registry: SqlRegistry) -> None:
    """What serves later is what was registered."""
    version = a_version()
    registry.add(version, "ann")
    assert registry.get("risk", "1.0.0") == version
    assert registry.list_versions() == [version]


def test_a_contract_keeps_a_null_default_apart_from_none(registry: SqlRegistry) -> None:
    """Null allows a missing value, no default at all requires one: mixing them up changes answers."""
    defaults: list[Any] = [UNSET, None, 0.0, 1e22, -1.5, 7]
    for number, default in enumerate(defaults):
        contract = {"income": FeatureRule(FeatureType.FLOAT, default)}
        metadata = msgspec.structs.replace(METADATA, contract=contract)
        registry.add(a_version(f"1.0.{number}", metadata=metadata), "ann")
        kept = registry.get("risk", f"1.0.{number}").metadata.contract["income"].default
        assert kept == default
        assert (kept is UNSET, kept is None) == (default is UNSET, default is None)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
rules = st.one_of(
    st.builds(
        FeatureRule,
        st.just(FeatureType.FLOAT),
        st.just(UNSET) | st.none() | st.floats(-1e15, 1e15) | st.integers(-(2**53), 2**53),
        st.none() | st.floats(0.001, 1e9),
        texts,
    ),
    st.builds(FeatureRule, st.just(FeatureType.STRING), st.just(UNSET) | st.none() | texts),
    st.builds(FeatureRule, st.just(FeatureType.BOOLEAN), st.just(UNSET) | st.booleans()),
)
counts = st.integers(0, 2**40)
few_numbers = st.lists(st.floats(-1e15, 1e15), max_size=3).map(tuple)
feature_baselines = st.one_of(
    st.builds(
        FeatureBaseline,
        counts,
        cuts=few_numbers,
        counts=st.lists(counts, max_size=3).map(tuple),
        mean=st.none() | st.floats(-1e15, 1e15),
        design_effects=st.lists(st.none() | st.floats(1, 1e6), max_size=3).map(tuple),
    ),
    st.builds(FeatureBaseline, counts, levels=st.dictionaries(texts, counts, max_size=3), other=counts),
)
metadata_of_any_kind = st.builds(
    Metadata,
    signature=st.builds(
        Signature,
        st.lists(st.builds(TensorSpec, texts, st.just("float32"), st.just((None, 3)))).map(tuple),
        st.lists(st.builds(TensorSpec, texts, st.just("string"), st.just((None,)))).map(tuple),
    ),
    features=st.lists(texts, max_size=4).map(tuple),
    contract=st.dictionaries(texts, rules, max_size=4),
    task=st.sampled_from(Task),
    class_labels=st.lists(texts, max_size=3).map(tuple) | st.lists(st.integers(-9, 9), max_size=3).map(tuple),
    label_output=st.none() | texts,
    scores_output=st.none() | texts,
    sample=st.lists(st.none() | st.booleans() | st.floats(-1e15, 1e15) | texts, max_size=4).map(tuple),
    runtime=texts,
    baseline=st.none() | st.builds(Baseline, counts, st.dictionaries(texts, feature_baselines, max_size=3)),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=metadata_of_any_kind)
def test_metadata_of_any_kind_survives_the_database(registry: SqlRegistry, metadata: Metadata) -> None:
    """The metadata is all that a process knows of a model: a changed field would change its answers."""
    number = f"1.0.{registry.revision()}"
    registry.add(a_version(number, metadata=metadata), "ann")
    assert registry.get("risk", number).metadata == metadata


def test_versions_are_listed_by_model_and_then_precedence(registry: SqlRegistry) -> None:
    """Sorted as text, 1.10.0 would stand before 1.9.0 and a release before its candidates."""
    numbers = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-rc.2", "1.0.0-rc.11", "1.0.0"]
    numbers += ["1.9.0", "1.10.0", "2.0.0"]
    for number in (*reversed(numbers[::2]), *numbers[1::2]):
        registry.add(a_version(number), "ann")
    registry.add(a_version("0.1.0", "churn"), "ann")
    listed = [(v.model_id, v.version) for v in registry.list_versions()]
    assert listed == [("churn", "0.1.0"), *(("risk", number) for number in numbers)]
    assert [v.version for v in registry.list_versions("churn")] == ["0.1.0"]


def test_versions_of_equal_precedence_keep_one_order(registry: SqlRegistry) -> None:
    """The default routing takes the last of them; it must not change when a row moves in the table."""
    registry.add(a_version("1.0.0+b"), "ann")
    registry.add(a_version("1.0.0+a"), "ann")
    registry.set_stage("risk", "1.0.0+b", Stage.STAGING, "ann")
    registry.set_stage("risk", "1.0.0+a", Stage.STAGING, "ann")
    assert [v.version for v in registry.list_versions("risk")] == ["1.0.0+a", "1.0.0+b"]


def test_an_empty_registry_lists_nothing(registry: SqlRegistry) -> None:
    """A fresh installation starts without an error."""
    assert registry.list_versions() == []
    assert registry.routings() == {}
    assert registry.audit() == []


def test_what_is_not_registered_is_named_exactly(registry: SqlRegistry) -> None:
    """A wrong version of a known model is another mistake than an unknown model."""
    with pytest.raises(ModelUnknown, match="'risk'"):
        registry.get("risk", "1.0.0")
    with pytest.raises(ModelUnknown, match="'risk'"):
        registry.list_versions("risk")
    with pytest.raises(ModelUnknown, match="'risk'"):
        registry.check_model("risk")
    registry.add(a_version("1.10.0"), "ann")
    registry.check_model("risk")
    registry.add(a_version("1.9.0"), "ann")
    with pytest.raises(VersionUnknown, match=r"no version 2\.0\.0; it has 1\.9\.0, 1\.10\.0"):
        registry.get("risk", "2.0.0")
    with pytest.raises(VersionUnknown):
        registry.set_stage("risk", "2.0.0", Stage.STAGING, "ann")
    with pytest.raises(ModelUnknown):
        registry.set_active("churn", "1.0.0", True, "ann")


def test_an_existing_version_is_not_added_again(registry: SqlRegistry) -> None:
    """Versions are immutable: what was registered first stays."""
    registry.add(a_version(), "ann")
    before = registry.revision(), registry.audit()
    with pytest.raises(VersionConflict, match=r"1\.0\.0"):
        registry.add(a_version(sha256="cd" * 32), "bob")
    assert registry.get("risk", "1.0.0") == a_version()
    assert (registry.revision(), registry.audit()) == before


def test_stages_go_one_step_at_a_time(registry: SqlRegistry) -> None:
    """Nothing reaches production that was never staged."""
    registry.add(a_version(), "ann")
    for wanted in (Stage.STAGING, Stage.PROD, Stage.STAGING, Stage.DEV):
        assert registry.set_stage("risk", "1.0.0", wanted, "ann") == a_version(stage=wanted)
        assert registry.get("risk", "1.0.0").stage is wanted


def test_a_step_in_the_stages_is_not_skipped(registry: SqlRegistry) -> None:
    """The message says which step comes first."""
    for number, start, wanted in (("1.0.0", Stage.DEV, Stage.PROD), ("2.0.0", Stage.PROD, Stage.DEV)):
        registry.add(a_version(number, stage=start), "ann")
        with pytest.raises(StageConflict, match="to staging first"):
            registry.set_stage("risk", number, wanted, "ann")
        assert registry.get("risk", number).stage is start


def test_a_version_is_activated_and_deactivated(registry: SqlRegistry) -> None:
    """Being registered does not make a version answer; both ways are one call."""
    registry.add(a_version(), "ann")
    assert registry.set_active("risk", "1.0.0", True, "ann") == a_version(is_active=True)
    assert registry.get("risk", "1.0.0").is_active is True
    assert registry.set_active("risk", "1.0.0", False, "ann") == a_version()
    assert registry.get("risk", "1.0.0").is_active is False


def test_a_routed_version_is_not_deactivated(registry: SqlRegistry) -> None:
    """Otherwise requests would be sent to a version that does not answer."""
    for number in ("1.0.0", "2.0.0"):
        registry.add(a_version(number, is_active=True), "ann")
    routing = Routing(Strategy.SHADOW, (Arm("1.0.0"), Arm("2.0.0", Role.SHADOW)), salt="s")
    registry.set_routing("risk", routing, "ann")
    for number in ("1.0.0", "2.0.0"):
        with pytest.raises(RoutingConflict, match=number):
            registry.set_active("risk", number, False, "ann")
    registry.set_routing("risk", SINGLE, "ann")
    assert not registry.set_active("risk", "2.0.0", False, "ann").is_active


def test_a_routing_comes_back_as_it_was_set(registry: SqlRegistry) -> None:
    """Weights, roles and salt decide who answers which key."""
    for number in ("1.0.0", "2.0.0"):
        registry.add(a_version(number, is_active=True), "ann")
    arms = (Arm("1.0.0", Role.CHAMPION, 0.9), Arm("2.0.0", Role.CHALLENGER, 0.1))
    routing = Routing(Strategy.CANARY, arms, salt="autumn")
    registry.set_routing("risk", routing, "ann")
    assert registry.routings() == {"risk": routing}
    registry.set_routing("risk", SINGLE, "ann")
    assert registry.routings() == {"risk": SINGLE}
    registry.clear_routing("risk", "ann")
    assert registry.routings() == {}


def test_a_routing_names_only_versions_that_answer(registry: SqlRegistry) -> None:
    """A routing to nowhere would be found out by the callers."""
    with pytest.raises(ModelUnknown):
        registry.set_routing("risk", SINGLE, "ann")
    registry.add(a_version("2.0.0", is_active=True), "ann")
    with pytest.raises(VersionUnknown, match=r"1\.0\.0"):
        registry.set_routing("risk", SINGLE, "ann")
    registry.add(a_version(), "ann")
    with pytest.raises(VersionInactive, match="activate it"):
        registry.set_routing("risk", SINGLE, "ann")
    assert registry.routings() == {}


def test_a_routing_that_no_strategy_follows_never_reaches_the_database(registry: SqlRegistry) -> None:
    """The use case checks the arms before it asks the registry."""
    registry.add(a_version(is_active=True), "ann")
    with pytest.raises(RoutingInvalid, match="one arm with the role champion"):
        set_routing(registry, "risk", Routing(Strategy.CANARY, (Arm("1.0.0", Role.CHALLENGER),)), actor="ann")
    assert registry.routings() == {}


def test_the_revision_grows_with_every_change_and_with_nothing_else(registry: SqlRegistry) -> None:
    """A change that does not raise it is never served; a no-op that does makes all processes reload."""
    changes: list[Callable[[], object]] = [
        lambda: registry.add(a_version(), "ann"),
        lambda: registry.set_stage("risk", "1.0.0", Stage.STAGING, "ann"),
        lambda: registry.set_active("risk", "1.0.0", True, "ann"),
        lambda: registry.set_routing("risk", SINGLE, "ann"),
        lambda: registry.clear_routing("risk", "ann"),
        lambda: registry.set_active("risk", "1.0.0", False, "ann"),
    ]
    for number, change in enumerate(changes):
        before = registry.revision()
        change()
        after = registry.revision()
        assert after > before, number
        if number:
            change()
            assert registry.revision() == after, number
    assert len(registry.audit()) == len(changes)


def test_a_refused_change_leaves_no_trace(registry: SqlRegistry) -> None:
    """The audit log tells what happened, not what somebody tried."""
    registry.add(a_version(), "ann")
    before = registry.revision(), registry.audit()
    with pytest.raises(StageConflict):
        registry.set_stage("risk", "1.0.0", Stage.PROD, "bob")
    with pytest.raises(VersionInactive):
        registry.set_routing("risk", SINGLE, "bob")
    assert (registry.revision(), registry.audit()) == before


def test_the_audit_log_tells_who_did_what_newest_first(registry: SqlRegistry) -> None:
    """An operator reads it from the top."""
    registry.add(a_version(), "ann")
    registry.set_stage("risk", "1.0.0", Stage.STAGING, "bob")
    registry.set_active("risk", "1.0.0", True, "cleo")
    registry.set_routing("risk", SINGLE, "dan")
    registry.clear_routing("risk", "eve")
    registry.set_active("risk", "1.0.0", False, "fay")
    entries = registry.audit()
    told = [(e.actor, e.action, e.subject, e.details) for e in reversed(entries)]
    arm = {"version": "1.0.0", "role": "champion", "weight": 1.0}
    assert told == [
        ("ann", "register", "risk 1.0.0", {"sha256": "ab" * 32, "stage": "dev"}),
        ("bob", "stage", "risk 1.0.0", {"from": "dev", "to": "staging"}),
        ("cleo", "activate", "risk 1.0.0", {}),
        ("dan", "routing", "risk", {"strategy": "single", "arms": [arm], "salt": ""}),
        ("eve", "routing", "risk", {"strategy": None}),
        ("fay", "deactivate", "risk 1.0.0", {}),
    ]
    times = [entry.at_ms for entry in entries]
    assert times == sorted(times, reverse=True)
    assert registry.audit(limit=2) == entries[:2]


def test_of_two_who_register_one_version_exactly_one_wins(url: str, database: Database) -> None:
    """Two processes have two connections; the loser is told, and nobody's bytes are mixed."""
    with closing(Database(url)) as other:
        for number in range(8):
            rivals = [
                (SqlRegistry(database), a_version(f"1.0.{number}", sha256="aa" * 32)),
                (SqlRegistry(other), a_version(f"1.0.{number}", sha256="bb" * 32)),
            ]
            raised = run_at_once(*(partial(r.add, v, "ann") for r, v in rivals))
            assert sorted(type(exc).__name__ for exc in raised) == ["NoneType", "VersionConflict"]
            (winner,) = [v for (_, v), exc in zip(rivals, raised, strict=True) if exc is None]
            assert SqlRegistry(database).get("risk", f"1.0.{number}") == winner
    assert len(SqlRegistry(database).audit()) == 8


def test_of_two_routings_set_at_once_one_stays_and_nothing_foreign_is_raised(
    url: str, database: Database
) -> None:
    """The first routing of a model is an insert: two of them must not collide in the callers' faces."""
    with closing(Database(url)) as other:
        one, two = SqlRegistry(database), SqlRegistry(other)
        for number in ("1.0.0", "2.0.0"):
            one.add(a_version(number, is_active=True), "ann")
        double = Routing(Strategy.SINGLE, (Arm("2.0.0"),))
        for _ in range(8):
            before = one.revision()
            raised = run_at_once(
                lambda: one.set_routing("risk", SINGLE, "ann"), lambda: two.set_routing("risk", double, "bob")
            )
            assert raised == [None, None]
            assert one.revision() == before + 2
            assert one.routings()["risk"] in (SINGLE, double)
            one.clear_routing("risk", "ann")


def test_a_version_is_never_routed_and_deactivated_at_once(url: str, database: Database) -> None:
    """Each of the two changes is legal alone; together they would route requests to an inactive version."""
    with closing(Database(url)) as other:
        one, two = SqlRegistry(database), SqlRegistry(other)
        one.add(a_version(), "ann")
        for _ in range(8):
            one.set_active("risk", "1.0.0", True, "ann")
            raised = run_at_once(
                lambda: one.set_routing("risk", SINGLE, "ann"),
                lambda: two.set_active("risk", "1.0.0", False, "bob"),
            )
            kinds = [type(exc) for exc in raised]
            assert kinds in ([type(None), RoutingConflict], [VersionInactive, type(None)])
            assert ("risk" in one.routings()) == one.get("risk", "1.0.0").is_active
            one.clear_routing("risk", "ann")


def use_everything(registry: SqlRegistry) -> dict[str, Exception | None]:
    """What each method of the registry raises."""
    calls: dict[str, Callable[[], object]] = {
        "add": lambda: registry.add(a_version("9.0.0"), "ann"),
        "get": lambda: registry.get("risk", "1.0.0"),
        "list_versions": registry.list_versions,
        "set_stage": lambda: registry.set_stage("risk", "1.0.0", Stage.STAGING, "ann"),
        "set_active": lambda: registry.set_active("risk", "1.0.0", True, "ann"),
        "routings": registry.routings,
        "set_routing": lambda: registry.set_routing("risk", SINGLE, "ann"),
        "clear_routing": lambda: registry.clear_routing("risk", "ann"),
        "revision": registry.revision,
        "audit": registry.audit,
    }
    raised: dict[str, Exception | None] = {}
    for name, call in calls.items():
        try:
            call()
            raised[name] = None
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            raised[name] = exc
    return raised


def assert_all_unavailable(raised: dict[str, Exception | None], *, mentions: str) -> None:
    assert {name: type(exc) for name, exc in raised.items()} == dict.fromkeys(raised, DatabaseUnavailable)
    assert all(mentions in str(exc) for exc in raised.values())


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    """A server for this module alone: it is killed."""
    with PostgresServer() as server:
        yield server


def test_a_killed_postgresql_is_unavailable_and_then_answers_again(own_postgres: PostgresServer) -> None:
    """Connections in the pool die with the server; callers get our error, and later the same rows."""
    with closing(Database(own_postgres.create_database())) as database:
        database.upgrade()
        registry = SqlRegistry(database)
        registry.add(a_version(), "ann")
        own_postgres.kill()
        raised = use_everything(registry)
        with pytest.raises(DatabaseUnavailable):
            database.check()
        with pytest.raises(DatabaseUnavailable):
            database.upgrade()
        own_postgres.start()
        assert_all_unavailable(raised, mentions="postgresql")
        assert registry.list_versions() == [a_version()]


def test_postgresql_dying_inside_a_change_undoes_it(own_postgres: PostgresServer) -> None:
    """A change is one transaction: half of one is never seen."""
    own_postgres.start()
    with closing(Database(own_postgres.create_database())) as database:
        database.upgrade()
        registry = SqlRegistry(database)
        revision = registry.revision()

        def die_half_way() -> None:
            with database.write() as connection:
                connection.exec_driver_sql("UPDATE counters SET value = 99")
                own_postgres.kill()

        with pytest.raises(DatabaseUnavailable):
            die_half_way()
        own_postgres.start()
        assert registry.revision() == revision


def test_a_password_is_in_no_message() -> None:
    """Messages go to callers and logs."""
    with closing(Database("postgresql://ann:secret@127.0.0.1:1/phoenix")) as database:
        raised = use_everything(SqlRegistry(database))
    assert_all_unavailable(raised, mentions="ann:***@127.0.0.1")
    assert not any("secret" in str(exc) for exc in raised.values())


def test_a_folder_in_the_place_of_an_sqlite_file_is_unavailable(tmp_path: Path) -> None:
    """The message says which file could not be opened."""
    folder = tmp_path / "phoenix.db"
    folder.mkdir()
    with closing(Database(f"sqlite:///{folder}")) as database:
        assert_all_unavailable(use_everything(SqlRegistry(database)), mentions=str(folder))
        with pytest.raises(DatabaseUnavailable):
            database.upgrade_if_embedded()


def test_a_file_that_is_no_sqlite_database_is_unavailable(tmp_path: Path) -> None:
    """A corrupt file is an error of ours with a code, not the driver's."""
    path = tmp_path / "phoenix.db"
    path.write_bytes(b"this is not a database, it is a long text. " * 100)
    with closing(Database(f"sqlite:///{path}")) as database:
        assert_all_unavailable(use_everything(SqlRegistry(database)), mentions="not a database")
        with pytest.raises(DatabaseUnavailable):
            database.upgrade_if_embedded()


def test_a_page_damaged_later_is_unavailable(tmp_path: Path) -> None:
    """Damage inside a database is met in the middle of a query."""
    path = tmp_path / "phoenix.db"
    with closing(Database(f"sqlite:///{path}")) as database:
        database.upgrade()
        SqlRegistry(database).add(a_version(), "ann")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[page_bytes:] = b"\xff" * (len(content) - page_bytes)
    path.write_bytes(content)
    with closing(Database(f"sqlite:///{path}")) as database:
        assert_all_unavailable(use_everything(SqlRegistry(database)), mentions=str(path))


def test_a_database_without_tables_is_unavailable(tmp_path: Path, postgres_url: str) -> None:
    """A forgotten migration is no driver's exception either."""
    for url in (f"sqlite:///{tmp_path / 'phoenix.db'}", postgres_url):
        with closing(Database(url)) as database:
            raised = use_everything(SqlRegistry(database))
        assert {type(exc) for exc in raised.values()} == {DatabaseUnavailable}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no url at all", "no database URL"),
        ("mysql://localhost/x", "known are sqlite, postgresql"),
        ("sqlite:////proc/version/phoenix.db", "cannot be made"),
    ],
)
def test_a_url_that_names_no_database_is_a_misconfiguration(text: str, message: str) -> None:
    """The message names the setting and what it may be."""
    with pytest.raises(Misconfigured, match=message) as caught:
        Database(text)
    assert "PHOENIX_DATABASE" in caught.value.message


def test_odd_names_raise_only_errors_of_ours(registry: SqlRegistry) -> None:
    """Names come from URLs and command lines; what a database cannot hold is the asker's mistake."""
    registry.add(a_version(is_active=True), "ann")
    for odd in ("a\0b", "\ud800", "", "x" * 5000, "'; DROP TABLE models; --"):
        routing = Routing(Strategy.SINGLE, (Arm(odd),), salt=odd)
        calls: list[Callable[[], object]] = [
            partial(registry.get, odd, "1.0.0"),
            partial(registry.get, "risk", odd),
            partial(registry.list_versions, odd),
            partial(registry.check_model, odd),
            partial(registry.set_stage, odd, odd, Stage.STAGING, "ann"),
            partial(registry.set_active, "risk", odd, True, "ann"),
            partial(registry.set_routing, "risk", routing, "ann"),
        ]
        for call in calls:
            with pytest.raises((ModelUnknown, VersionUnknown, InvalidField)):
                call()
    assert registry.list_versions() == [a_version(is_active=True)]


def test_an_odd_salt_or_actor_is_kept_or_refused_by_an_error_of_ours(registry: SqlRegistry) -> None:
    """PostgreSQL refuses what SQLite takes; neither may end in the driver's exception."""
    registry.add(a_version(is_active=True), "ann")
    for number, odd in enumerate(("a\0b", "\ud800", "x" * 5000)):
        metadata = msgspec.structs.replace(METADATA, runtime=odd)
        calls: list[Callable[[], object]] = [
            partial(registry.set_routing, "risk", msgspec.structs.replace(SINGLE, salt=odd), "ann"),
            partial(registry.set_stage, "risk", "1.0.0", Stage.STAGING, odd),
            partial(registry.add, a_version(f"2.0.{number}", metadata=metadata), "ann"),
        ]
        for call in calls:
            with suppress(InvalidField):
                call()
