"""``predict`` and ``bench``: requests to a server that runs."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from phoenix_ml.cli.common import (
    T,
    counted,
    data_option,
    err,
    example,
    json_option,
    main,
    opened,
    parse_value,
    server_url,
    show_json,
    url_option,
    watched_version,
)
from phoenix_ml.domain.errors import InvalidField, PhoenixError, ServerUnreachable

ENTITY_COLUMN = "entity_id"
# Answers on record are computed again in a batch as large, and a commit must not keep a server's log waiting.
SCORED_ROWS, RECORDED_ROWS = 16_384, 1000


@main.command()
@click.argument("model_id", metavar="[MODEL_ID]", required=False)
@click.option("--model", help="The same as MODEL_ID.")
@click.option("--entity", "entity_id", help="Whose stored features to use.")
@click.option("--feature", "given", multiple=True, metavar="NAME=VALUE", help="A feature; repeat it.")
@click.option("--version", "model_version", help="Ask this version instead of the routing's choice.")
@click.option(
    "--input",
    "source",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Score the rows of this file (.parquet, .csv) instead, here, without a server.",
)
@click.option(
    "--output",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write (.parquet, .csv): the rows with their answers.",
)
@click.option("--log", "is_logged", is_flag=True, help="Put the answers of --input on record.")
@click.option(
    "--entity-column",
    metavar="COLUMN",
    help="With --log, whom the rows are about; by default entity_id, where there is one.",
)
@url_option
@data_option
@json_option
@example("phoenix-ml predict credit-risk --entity cust_0001")
def predict(
    model_id: str | None,
    model: str | None,
    entity_id: str | None,
    given: tuple[str, ...],
    model_version: str | None,
    source: Path | None,
    target: Path | None,
    is_logged: bool,
    entity_column: str | None,
    url: str | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """Ask a running server for one prediction, or score a file without a server."""
    if (model_id is None) == (model is None):
        raise click.UsageError("name the model once: phoenix-ml predict MODEL_ID")
    model_id = model_id or str(model)
    if (source is None) != (target is None):
        raise click.UsageError("--input and --output go together: what to score, and where to write it")
    if source is not None and target is not None:
        if entity_id is not None or given:
            raise click.UsageError("--input brings the features: leave out --entity and --feature")
        if target.exists() and source.exists() and target.samefile(source):
            raise click.UsageError("--output is the file of --input: write to another one")
        if entity_column is not None and not is_logged:
            raise click.UsageError("--entity-column says what goes on record: it needs --log")
        done = score_file(model_id, model_version, source, target, data, is_logged, entity_column)
        show_scored(model_id, target, done, as_json)
        return
    if is_logged or entity_column is not None:
        raise click.UsageError(
            "--log and --entity-column are for --input: a server's answer is always on record"
        )
    body: dict[str, Any] = {"model_id": model_id}
    if entity_id is not None:
        body["entity_id"] = entity_id
    if given:
        body["features"] = dict(parse_value(word) for word in given)
    if model_version is not None:
        body["model_version"] = model_version
    answered, found = call_server(server_url(url), "/predict", body, Answered)
    if as_json:
        show_json(msgspec.json.decode(answered))
        return
    confidence = "" if found.confidence is None else f"  confidence {found.confidence:.3f}"
    console = Console()
    console.print(f"[bold]{found.result}[/]{confidence}")
    console.print(
        f"[dim]{found.model_id} {found.model_version} as {found.role}, {found.latency_ms} ms, "
        f"id {found.prediction_id}[/]"
    )


class Scoring(msgspec.Struct):
    """What came of scoring a file; ``on_record`` says how many rows are, and ``new_on_record`` how many were not before."""

    rows: int
    model_version: str
    file: str
    seconds: float
    on_record: int | None = None
    new_on_record: int | None = None


def score_file(
    model_id: str,
    model_version: str | None,
    source: Path,
    target: Path,
    data: Path | None,
    is_logged: bool,
    entity_column: str | None,
) -> Scoring:
    """Writes the rows of a file with a version's answers, which go on record if asked for."""
    from phoenix_ml.application.scoring import RecordedScorer, Recorder, Scorer, choose_for_file
    from phoenix_ml.domain.models import check_takes_rows
    from phoenix_ml.infrastructure.tables import Extension, digest_file, extend_table

    def make(names: Sequence[str]) -> Extension:
        scorer = Scorer(engine, version.metadata, names, is_recorded=recorder is not None)
        if recorder is None:
            return scorer
        if entity_column is not None and entity_column not in names:
            raise InvalidField(
                f"{source.name} has no column {entity_column!r}; it has {', '.join(names)}",
                field="entity_column",
            )
        entity = entity_column or (ENTITY_COLUMN if ENTITY_COLUMN in names else None)
        return RecordedScorer(scorer, recorder, entity)

    with (
        opened(data) as phoenix,
        Progress(
            *Progress.get_default_columns(), console=err, transient=True, disable=not err.is_terminal
        ) as bar,
    ):
        version = watched_version(phoenix, model_id, model_version)
        check_takes_rows(version.metadata)
        path = phoenix.artifacts.fetch(version.uri, version.sha256)
        engine = phoenix.engines.load(path, version.metadata, version.framework)
        task = bar.add_task("reading" if is_logged else "scoring", total=1.0)
        recorder = None
        rows_at_once, text_columns = SCORED_ROWS, []
        if is_logged:
            choice = choose_for_file(phoenix.registry, version, is_named=model_version is not None)
            recorder = Recorder(phoenix.prediction_log, version, choice, digest_file(source))
            rows_at_once, text_columns = RECORDED_ROWS, [entity_column or ENTITY_COLUMN]
        rows = 0
        began_at = time.monotonic()
        try:
            for done, share in extend_table(
                source, target, make, rows_at_once=rows_at_once, text_columns=text_columns
            ):
                rows = done
                bar.update(task, completed=share, description=f"scoring, {done:,} rows")
        except BaseException:
            if recorder is not None and recorder.rows:
                err.print(
                    f"[yellow]{recorder.rows:,} rows are on record, and no output is written:[/] run the same command "
                    "again, and the others follow",
                    highlight=False,
                    soft_wrap=True,
                )
            raise
        seconds = time.monotonic() - began_at
    scoring = Scoring(rows, version.version, str(target), seconds)
    if recorder is not None:
        scoring.on_record, scoring.new_on_record = recorder.rows, recorder.new_rows
    return scoring


def show_scored(model_id: str, target: Path, done: Scoring, as_json: bool) -> None:
    if as_json:
        show_json(done)
        return
    click.echo(
        f"wrote {counted(done.rows, 'row')} with the answers of {model_id} {done.model_version} to {target}"
    )
    if done.on_record is not None and done.new_on_record is not None:
        known = done.on_record - done.new_on_record
        before = f"; {known:,} were on record before" if known else ""
        click.echo(f"{done.new_on_record:,} of them are new on record{before}")


def counts(_: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """Whole numbers from 1, separated by commas."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter("write whole numbers from 1, separated by commas: 1,16,64", param=parameter)
    return [int(word) for word in words]


@main.command()
@click.argument("model_id", metavar="[MODEL_ID]", required=False)
@click.option("--entity", "entity_ids", multiple=True, help="Whose stored features to use; repeat it.")
@click.option("--features", "file", type=click.Path(path_type=Path), help="Rows to send (.csv, .parquet).")
@click.option(
    "--connections", callback=counts, default="1,16,64", show_default=True, help="A run for each number."
)
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="How long a run lasts."
)
@click.option(
    "--rate", type=click.FloatRange(0.1), help="Requests a second; else each connection asks on and on."
)
@url_option
@json_option
@example("phoenix-ml bench credit-risk --entity cust_0001 --connections 1,16 --rate 500")
def bench(
    model_id: str | None,
    entity_ids: tuple[str, ...],
    file: Path | None,
    connections: list[int],
    seconds: float,
    rate: float | None,
    url: str | None,
    as_json: bool,
) -> None:
    """Put load on a running server and measure: every answer goes on record, as any other does."""
    from phoenix_ml.bench import Target, run_on

    if entity_ids and file is not None:
        raise click.UsageError("give --entity or --features, not both")
    url = server_url(url)
    target = Target.of(url)
    model_id = model_id or only_model(url)
    instances = [{"entity_id": entity_id} for entity_id in entity_ids] or rows_to_send(url, model_id, file)
    bodies = [{"model_id": model_id} | instance for instance in instances]
    call_server(url, "/predict", bodies[0], Answered)  # what is wrong with the request is said once
    requests = [target.post("/predict", msgspec.json.encode(body)) for body in bodies]
    runs = []
    for count in connections:
        pace = "" if rate is None else f", {rate:g} requests/s"
        err.print(f"[dim]{count} connections{pace}, {seconds:g} s …[/]")
        runs.append(run_on(target, requests, count, seconds, rate))
    if as_json:
        show_json({"model_id": model_id, "url": url, "runs": runs})
    else:
        table = Table(
            "connections", "requests/s", "p50 ms", "p95 ms", "p99 ms", "errors", "CPU µs/request", box=None
        )
        for run in runs:
            times = [run.p50_ms, run.p95_ms, run.p99_ms, run.cpu_us_per_request]
            *quantiles, cpu = ["" if value is None else f"{value:.2f}" for value in times]
            errors = str(sum(run.errors.values()))
            table.add_row(str(run.connections), f"{run.requests_per_second:,.0f}", *quantiles, errors, cpu)
        Console().print(table)
        for error, count in sum((Counter(run.errors) for run in runs), Counter()).items():
            click.echo(f"{count} × {error}")
        if refusal := next((run.refusal for run in runs if run.refusal), ""):
            click.echo(f"the first error: {refusal}")
        processes = runs[0].cpu_processes
        click.echo(
            f"CPU: of the {processes} processes that hold port {target.port}, without the background process"
            if processes
            else "CPU: not known, as no process of yours on this machine holds the port"
        )
    sys.exit(1 if any(run.errors for run in runs) else 0)


class Catalogued(msgspec.Struct):
    """What the load needs to know of the versions that a server lists."""

    class Version(msgspec.Struct):
        id: str
        is_active: bool
        features: dict[str, dict[str, Any]]

    versions: list[Version] = msgspec.field(default_factory=list)
    items: list[Version] = msgspec.field(default_factory=list)


class Recorded(msgspec.Struct):
    """The features of predictions on record."""

    class Item(msgspec.Struct):
        features: dict[str, Any]

    items: list[Item]


def only_model(url: str) -> str:
    """The active model of a server that has one. Raises InvalidField where there is a choice, or none."""
    _, found = call_server(url, "/models?limit=1000", None, Catalogued)
    names = sorted({version.id for version in found.items if version.is_active})
    if len(names) != 1:
        known = f"it has {', '.join(names)}" if names else "it has none that is active"
        raise InvalidField(f"name the model of {url} to ask: {known}", field="model_id")
    return names[0]


def rows_to_send(url: str, model_id: str, file: Path | None) -> list[dict[str, Any]]:
    """The file's rows; without one the newest row on record, else one of defaults and zeros."""
    from phoenix_ml.infrastructure.tables import read_columns

    name = quote(model_id, safe="")
    _, model = call_server(url, f"/models/{name}", None, Catalogued)
    versions = [version for version in model.versions if version.is_active] or model.versions
    rules = versions[-1].features
    if file is not None:
        columns = {name: values for name, values in read_columns(file).items() if name in rules}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if not rows:
            raise InvalidField(
                f"{file.name} has no row with features of {model_id}: {', '.join(rules)}", field="file"
            )
        return [{"features": row} for row in rows]
    _, recorded = call_server(url, f"/predictions?model_id={name}&limit=1", None, Recorded)
    zeros = {"float": 0.0, "integer": 0, "boolean": False, "string": ""}
    newest = recorded.items[0].features if recorded.items else {}
    plain = {name: rule.get("default", zeros[rule["type"]]) for name, rule in rules.items()}
    return [{"features": newest if newest.keys() == plain.keys() else plain}]


class Answered(msgspec.Struct):
    """What is shown of a server's answer."""

    prediction_id: str
    model_id: str
    model_version: str
    result: Any
    confidence: float | None
    role: str
    latency_ms: float


class Refused(msgspec.Struct):
    """A server's answer that is an error."""

    class Error(msgspec.Struct):
        code: str
        message: str
        details: dict[str, Any]

    error: Error


def call_server(url: str, path: str, body: dict[str, Any] | None, answer: type[T]) -> tuple[bytes, T]:
    """The answer's JSON, and read as ``answer``; without a body it is a GET.

    Raises ServerUnreachable, or the server's own error.
    """
    import httpx

    method = "GET" if body is None else "POST"
    try:
        response = httpx.request(method, f"{url}{path}", json=body, timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ServerUnreachable(
            f"{url} does not answer ({exc}): start one with 'phoenix-ml serve', or give --url"
        ) from exc
    try:
        if response.is_success:
            return response.content, msgspec.json.decode(response.content, type=answer)
        refused = msgspec.json.decode(response.content, type=Refused).error
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ServerUnreachable(
            f"{url} answered with status {response.status_code}, but is not a Phoenix server: give the --url of one"
        ) from exc
    raise ServerRefusal(refused)


class ServerRefusal(PhoenixError):
    """An error that the server answered, shown with the server's own code."""

    def __init__(self, error: Refused.Error) -> None:
        super().__init__(error.message, **error.details)
        self.code = error.code  # type: ignore[misc]
