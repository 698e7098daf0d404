"""``predictions``: what is on record."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from phoenix_ml.cli.common import (
    counted,
    data_option,
    err,
    example,
    json_option,
    main,
    opened,
    print_wide,
    show_json,
    watched_version,
)
from phoenix_ml.domain.errors import ModelUnknown

if TYPE_CHECKING:
    from phoenix_ml.application.replay import Replay
    from phoenix_ml.bootstrap import Phoenix


@main.group()
def predictions() -> None:
    """The prediction log."""


@predictions.command("list")
@click.option("--model", "model_id", help="Only this model.")
@click.option("--version", "model_version", help="Only this version.")
@click.option("--entity", "entity_id", help="Only this entity.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--cursor", help="Where the previous page ended.")
@data_option
@json_option
@example("phoenix-ml predictions list --model credit-risk --limit 5")
def predictions_list(
    model_id: str | None,
    model_version: str | None,
    entity_id: str | None,
    limit: int,
    cursor: str | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """Predictions on record, newest first."""
    from phoenix_ml.application.ports import PredictionQuery
    from phoenix_ml.application.reports import describe_prediction

    query = PredictionQuery(model_id, model_version, entity_id, limit=limit, cursor=cursor)
    with opened(data) as phoenix:
        if model_id is not None:
            phoenix.registry.check_model(model_id)
        rows, next_cursor = phoenix.prediction_log.page(query)
    items = [describe_prediction(row) for row in rows]
    if as_json:
        show_json({"items": items, "next_cursor": next_cursor})
        return
    table = Table(
        "time", "model", "version", "role", "entity", "result", "confidence", "outcome", "id", box=None
    )
    for item in items:
        confidence = "" if item["confidence"] is None else f"{item['confidence']:.3f}"
        outcome = "" if item["outcome"] is None else str(item["outcome"])
        table.add_row(
            item["created_at"],
            item["model_id"],
            item["model_version"],
            item["route"]["role"],
            item["entity_id"] or "",
            _shorten(item["result"]),
            confidence,
            outcome,
            item["prediction_id"],
        )
    print_wide(table)
    if next_cursor:
        click.echo(f"more: --cursor {next_cursor}")


def _shorten(result: Any) -> str:
    """The result; of tensors what they are, as a line has no room for what they hold."""
    if not isinstance(result, dict):
        return str(result)
    return ", ".join(f"{name} {tensor['datatype']}{tensor['shape']}" for name, tensor in result.items())


@predictions.command("show")
@click.argument("prediction_id")
@data_option
@click.option("--json", is_flag=True, expose_value=False, help="Print JSON, which it does anyway.")
@example("phoenix-ml predictions show 01928c5a-…")
def predictions_show(prediction_id: str, data: Path | None) -> None:
    """One prediction in full, as JSON: values, sources, route, outcome."""
    from phoenix_ml.application.reports import describe_prediction

    with opened(data) as phoenix:
        show_json(describe_prediction(phoenix.prediction_log.get(prediction_id)))


@predictions.command("export")
@click.option("--model", "model_id", help="The model; of a single one there is no need to say it.")
@click.option(
    "--version", "model_version", help="Only this version; its features are the columns, else the champion's."
)
@click.option("--with-outcomes", is_flag=True, help="Only predictions whose outcome is known.")
@click.option(
    "--for-training",
    is_flag=True,
    help="Only what a trainer may see: outcomes known, less those kept for the comparison and those of broken data.",
)
@click.option("--since", type=click.DateTime(), help="From this time on (UTC).")
@click.option("--until", type=click.DateTime(), help="Before this time (UTC).")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File to write (.parquet, .csv).",
)
@data_option
@json_option
@example(
    "phoenix-ml predictions export --model credit-risk --with-outcomes --since 2026-11-01 --out train.parquet"
)
def predictions_export(
    model_id: str | None,
    model_version: str | None,
    with_outcomes: bool,
    for_training: bool,
    since: datetime | None,
    until: datetime | None,
    out: Path,
    data: Path | None,
    as_json: bool,
) -> None:
    """Write what a model was asked, what it answered and what came of it into a table to train on."""
    from phoenix_ml.application.export import export_columns, export_rows, to_train_on
    from phoenix_ml.application.ports import PredictionQuery
    from phoenix_ml.application.reports import epoch_ms
    from phoenix_ml.infrastructure.tables import write_table

    since_ms = None if since is None else epoch_ms(since, "since")
    until_ms = None if until is None else epoch_ms(until, "until")
    written = left_out = 0
    with (
        opened(data) as phoenix,
        Progress(console=err, transient=True, disable=not err.is_terminal) as progress,
    ):
        version = watched_version(phoenix, model_id or _single_model(phoenix), model_version)
        query = PredictionQuery(version.model_id, model_version, since_ms=since_ms, until_ms=until_ms)
        broken = None
        if for_training:
            from phoenix_ml.application.broken_data import (
                find_broken_data,
            )  # its statistics take a second to import

            broken = find_broken_data(phoenix.monitoring, version.model_id)
        task = progress.add_task("exporting", total=None)
        with write_table(out, export_columns(version.metadata)) as add_rows:
            for page in export_rows(
                phoenix.prediction_log, query, version.metadata, with_outcomes=with_outcomes or for_training
            ):
                rows = page
                if broken is not None:
                    whole = broken.without(page)
                    left_out += len(page) - len(whole)
                    rows = to_train_on(whole)
                add_rows(rows)
                written += len(rows)
                progress.update(task, description=f"exporting, {written:,} rows")
    if as_json:
        show_json({"rows": written, "left_out_as_broken": left_out, "file": str(out)})
        return
    click.echo(f"wrote {counted(written, 'row')} to {out}")
    if left_out:
        click.echo(f"left out {counted(left_out, 'row')}: their data was broken (see incidents list)")


def _single_model(phoenix: "Phoenix") -> str:
    names = sorted({version.model_id for version in phoenix.registry.list_versions()})
    if len(names) > 1:
        raise click.UsageError(f"say which model by --model: {', '.join(names)}")
    if not names:
        raise ModelUnknown("no model is registered")
    return names[0]


@predictions.command("replay")
@click.argument("prediction_id")
@data_option
@json_option
@example("phoenix-ml predictions replay 01928c5a-…")
def predictions_replay(prediction_id: str, data: Path | None, as_json: bool) -> None:
    """Compute a prediction again, from its exact inputs by its very artifact, and compare bit for bit."""
    from phoenix_ml.application.replay import replay

    with opened(data) as phoenix:
        replayed = replay(
            phoenix.prediction_log, phoenix.registry, phoenix.artifacts, phoenix.engines, prediction_id
        )
    if as_json:
        show_json(replayed)
    else:
        show_replay(replayed)
    sys.exit(0 if replayed.identical else 1)


def show_replay(replayed: "Replay") -> None:
    console = Console()
    verdict = "[green]identical[/]" if replayed.identical else "[red]different[/]"
    console.print(
        f"{verdict}  [bold]{replayed.model_id} {replayed.model_version}[/], row {replayed.batch_position + 1} of "
        f"{replayed.batch_size} in its batch"
    )
    console.print(f"[dim]{replayed.runtime}, sha256 {replayed.sha256[:16]}…[/]")
    table = Table("", "on record", "computed now", "", box=None)
    for name in ("result", "confidence", "probabilities"):
        value = getattr(replayed, name)
        state = "[green]identical[/]" if value.identical else "[red]different[/]"
        table.add_row(name, escape(json.dumps(value.logged)), escape(json.dumps(value.computed)), state)
    print_wide(table)
    if replayed.logged_device != replayed.device:
        console.print(
            f"answered on {replayed.logged_device}, computed now on {replayed.device}, which rounds differently",
            highlight=False,
        )
    if replayed.registered_runtime != replayed.runtime:
        console.print(
            f"registered with {replayed.registered_runtime}, computed now by {replayed.runtime}, which may round "
            "differently",
            highlight=False,
        )


@predictions.command("unmatched")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--cursor", help="Where the previous page ended.")
@data_option
@json_option
@example("phoenix-ml predictions unmatched")
def predictions_unmatched(limit: int, cursor: str | None, data: Path | None, as_json: bool) -> None:
    """Outcomes that were reported for predictions nobody made, newest first."""
    from phoenix_ml.application.reports import list_unmatched

    with opened(data) as phoenix:
        found = list_unmatched(phoenix.prediction_log, limit, cursor)
    if as_json:
        show_json(found)
        return
    click.echo(f"{counted(found['count'], 'outcome')} without a prediction in the log")
    for item in found["items"]:
        click.echo(f"  {item['received_at']}  {item['prediction_id']}  {item['outcome']}")
    if found["next_cursor"]:
        click.echo(f"more: --cursor {found['next_cursor']}")
