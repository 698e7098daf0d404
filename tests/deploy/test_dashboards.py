"""The dashboards as Grafana would take them, and their SQL on a real PostgreSQL, as the user that they read with."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import msgspec
import psycopg
import pytest
import servers
import yaml
from dashboards import DASHBOARDS, as_sent_to_postgresql, sql_queries
from deploy_servers import DEPLOY, ROOT, program
from psycopg.rows import dict_row
from sample_events import COLUMNS, outcome, prediction
from servers import PostgresServer
from sqlalchemy import insert

from phoenix_ml.application.ports import RecordedEvent
from phoenix_ml.domain.drift import DriftReport, FeatureDrift, Verdict
from phoenix_ml.domain.events import OutcomeReported, PredictionMade
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.models import Framework, Metadata, ModelVersion, Signature, Stage, Task, TensorSpec
from phoenix_ml.domain.routing import Role
from phoenix_ml.domain.rows import RowFormat
from phoenix_ml.infrastructure.sql.database import Database
from phoenix_ml.infrastructure.sql.predictions import SqlPredictionLog
from phoenix_ml.infrastructure.sql.registry import SqlRegistry
from phoenix_ml.infrastructure.sql.schema import drift_reports, incidents, retrain_jobs

GRAFANA = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["grafana"]
SCHEMA = json.loads((Path(__file__).parent / "grafana-12.1.1.schema.json").read_text())
DATA_SOURCES = {
    source["uid"]: source
    for file in (DEPLOY / "grafana" / "provisioning" / "datasources").glob("*.yml")
    for source in yaml.safe_load(file.read_text())["datasources"]
}
PANEL_TYPES = {"stat": "Stat", "timeseries": "TimeSeries", "table": "Table"}
TARGET_TYPES = {"prometheus": "PrometheusTarget", "grafana-postgresql-datasource": "PostgresTarget"}
QUERIES = sql_queries()
AT_MS = 1_790_000_000_000


def check(kind: str, document: Any) -> None:
    """Raises ValidationError unless the document is of that kind, in the schema's words."""
    jsonschema.Draft7Validator({**SCHEMA, "$ref": f"#/definitions/{kind}"}).validate(document)


@pytest.mark.parametrize("file", DASHBOARDS)
def test_the_dashboard_fits_grafanas_types(file: str) -> None:
    """An option that is misspelt is ignored by Grafana without a word."""
    dashboard = DASHBOARDS[file]

    check("Dashboard", dashboard)
    for panel in dashboard["panels"]:
        kind = PANEL_TYPES[panel["type"]]
        check(f"{kind}Options", panel["options"])
        if kind != "Stat":
            check(f"{kind}Field", panel["fieldConfig"]["defaults"]["custom"])
        for target in panel["targets"]:
            check(TARGET_TYPES[target["datasource"]["type"]], target)


@pytest.mark.parametrize("file", DASHBOARDS)
def test_the_dashboard_is_laid_out(file: str) -> None:
    """Each panel has an id, a title and a place of its own."""
    panels = DASHBOARDS[file]["panels"]

    cells: list[tuple[int, int]] = []
    for panel in panels:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells += [(x, y) for x in columns for y in rows]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len(panels) == len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels})


@pytest.mark.parametrize("file", DASHBOARDS)
def test_every_data_source_is_provisioned(file: str) -> None:
    """A panel whose source is unknown shows an error in place of its graph."""
    named = set(re.findall(r'"datasource": ({[^}]*})', json.dumps(DASHBOARDS[file])))

    sources = [json.loads(source) for source in named]
    assert {source["uid"]: source["type"] for source in sources}.items() <= {
        uid: source["type"] for uid, source in DATA_SOURCES.items()
    }.items()


def test_the_dashboards_have_addresses_of_their_own_and_one_is_home() -> None:
    """Links go by the uid, and Grafana opens with the one that compose.yaml names."""
    home = Path(GRAFANA["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])

    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)
    assert len({dashboard["title"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)
    assert f"./deploy/grafana/dashboards:{home.parent}:ro" in GRAFANA["volumes"]
    assert home.stem in DASHBOARDS


def test_grafana_is_given_what_its_provisioning_names() -> None:
    """A variable that is not there would become an empty password."""
    text = "".join(file.read_text() for file in (DEPLOY / "grafana" / "provisioning").rglob("*.yml"))

    named = set(re.findall(r"\$([A-Z]\w+)", text))
    assert named == {"GRAFANA_DATABASE_PASSWORD"}
    assert named <= set(GRAFANA["environment"])


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest, _given_postgres_url: str | None) -> Iterator[psycopg.Connection]:
    """The connection of Grafana's user to a database with a classifier and a regressor, watched and healed."""
    server_url = _given_postgres_url
    if server_url is None:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        server.start()
        server_url = server.url
    url = servers.create_database(server_url)
    with closing(Database(url)) as database:
        database.upgrade()
        fill(database)
    for _ in range(2):  # it runs after each migration
        subprocess.run(
            [
                program("psql", "postgresql-client"),
                "--quiet",
                "--file",
                DEPLOY / "postgres" / "reader.sql",
                url,
            ],
            env={"PATH": "/usr/bin:/bin", "READER_PASSWORD": "secret"},
            check=True,
        )
    user = DATA_SOURCES["postgres"]["user"]
    with psycopg.connect(url, user=user, password="secret", autocommit=True) as connection:
        yield connection
    servers.drop_database(server_url, url)
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("DROP ROLE {}").format(psycopg.sql.Identifier(user)))


def fill(database: Database) -> None:
    """Predictions of each role with outcomes, an incident, and a job for each model."""
    log = SqlPredictionLog(database)
    for model_id, task, answer in (("risk", Task.CLASSIFICATION, 1), ("price", Task.REGRESSION, 10.5)):
        metadata = Metadata(
            Signature((TensorSpec("income", "float32", (None, 1)),), ()),
            ("income",),
            {"income": FeatureRule(FeatureType.FLOAT)},
            task,
        )
        for version in ("1.0.0", "2.0.0"):
            registered = ModelVersion(
                model_id, version, Framework.ONNX, "uri", "ab" * 32, Stage.DEV, True, AT_MS, metadata
            )
            SqlRegistry(database).add(registered, "ann")
        facts: dict[str, Any] = {"model_id": model_id, "created_at_ms": AT_MS, "result": answer}
        champion = prediction(role=Role.CHAMPION, **facts)
        challenger = prediction(role=Role.CHALLENGER, model_version="2.0.0", **facts)
        shadow = prediction(role=Role.SHADOW, model_version="2.0.0", shadow_of=champion.id, **facts)
        events: list[PredictionMade | OutcomeReported] = [
            champion,
            challenger,
            shadow,
            outcome(champion.id, answer),
            outcome(challenger.id, answer),
        ]
        log.write([RecordedEvent(e, msgspec.msgpack.encode(e), RowFormat(COLUMNS)) for e in events])
    blamed = {"model_id": "risk", "model_version": "1.0.0", "evidence": {}}
    incident = blamed | {
        "id": new_id(),
        "kind": "drift",
        "cause": "drift:income",
        "severity": "warning",
        "summary": "income has moved",
        "status": "resolved",
        "opened_at": AT_MS,
        "updated_at": AT_MS,
        "acknowledged_at": AT_MS,
        "acknowledged_by": "ann",
        "resolved_at": AT_MS + 60_000,
        "resolution": "promotion",
    }
    job = blamed | {
        "id": "j",
        "reason": "drift that hurts",
        "status": "failed",
        "requested_at": AT_MS,
        "updated_at": AT_MS + 1,
        "attempts": 1,
        "not_before": AT_MS,
        "owned_until": AT_MS,
        "new_version": "1.1.0",
        "error": "none",
        "log_tail": "",
    }
    moved = FeatureDrift(
        "income",
        "numeric",
        Verdict.DRIFT,
        990,
        0.01,
        0.0,
        (),
        (),
        (),
        distance=0.5,
        p=0.0,
        p_adjusted=0.0,
        psi=1.5,
        jensen_shannon=0.4,
        wasserstein=2.0,
    )
    report = {
        "id": new_id(),
        "model_id": "risk",
        "model_version": "1.0.0",
        "kind": "drift",
        "created_at": AT_MS,
        "rows": 1000,
        "report": msgspec.to_builtins(DriftReport(1000, 500, (moved,))),
    }
    with database.write() as connection:
        connection.execute(insert(drift_reports), [report])
        connection.execute(insert(incidents), [incident])
        connection.execute(insert(retrain_jobs), [job])


def ask(reader: psycopg.Connection, query: str) -> list[dict[str, Any]]:
    """What the query of a panel finds, for one model after the other."""
    times = [datetime.fromtimestamp(AT_MS / 1000 + seconds, UTC).isoformat() for seconds in (-86400, 86400)]
    found = []
    for model in ("risk", "price"):
        sent = as_sent_to_postgresql(query, model, (times[0], times[1]))
        with reader.cursor(row_factory=dict_row) as cursor:
            found += cursor.execute(sent).fetchall()
    return found


@pytest.mark.parametrize("name", QUERIES)
def test_every_sql_query_finds_data_in_every_column(reader: psycopg.Connection, name: str) -> None:
    """A column that is always empty is one that was renamed or joined wrongly."""
    found = ask(reader, QUERIES[name])

    assert found
    empty = {column for column in found[0] if all(row[column] is None for row in found)}
    assert empty == set()


@pytest.mark.parametrize("file", DASHBOARDS)
def test_what_becomes_a_graph_has_times_and_numbers(reader: psycopg.Connection, file: str) -> None:
    """Grafana draws a line for each `metric`, of the `value` at each `time`, in order."""
    for panel in DASHBOARDS[file]["panels"]:
        for target in panel["targets"]:
            if target.get("format") != "time_series":
                continue
            found = ask(reader, target["rawSql"])

            assert {(*row, type(row["time"]), type(row["metric"])) for row in found} == {
                ("time", "metric", "value", datetime, str)
            }
            assert all(float(row["value"]) >= 0 for row in found)


def test_grafanas_user_reads_nothing_but_the_views(reader: psycopg.Connection) -> None:
    """Whoever may edit a dashboard must not read features, nor change anything."""
    (names,) = zip(
        *reader.execute(
            "SELECT table_name FROM information_schema.table_privileges WHERE grantee = current_user"
        ),
        strict=True,
    )
    assert all(str(name).startswith("v_") for name in names)
    for refused in (
        "SELECT features FROM prediction_logs",
        "DELETE FROM v_incidents",
        "CREATE TABLE mine (x int)",
    ):
        with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction)):
            reader.execute(refused)


def test_the_user_is_the_one_that_the_script_makes() -> None:
    """The name is written in two files."""
    script = (DEPLOY / "postgres" / "reader.sql").read_text()

    assert set(re.findall(r"ROLE (\w+)", script)) == {DATA_SOURCES["postgres"]["user"]}
    assert urlsplit(f"//{DATA_SOURCES['postgres']['url']}").port == 5432
