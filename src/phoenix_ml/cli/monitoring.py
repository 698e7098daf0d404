"""``drift``, ``incidents``, ``alerts`` and ``heal``: what watches models, and makes them well."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phoenix_ml.cli.common import (
    actor,
    data_option,
    example,
    json_option,
    main,
    opened,
    print_wide,
    show_json,
    watched_version,
    working,
)
from phoenix_ml.domain.errors import NoBaseline
from phoenix_ml.domain.monitoring import ALL_MODELS

if TYPE_CHECKING:
    from phoenix_ml.bootstrap import Phoenix
    from phoenix_ml.domain.drift import DriftReport


@main.group()
def drift() -> None:
    """Recent values beside those that a version was trained on."""


@drift.command("check")
@click.argument("model_id")
@click.option("--version", "model_version", help="This version instead of the champion.")
@click.option(
    "--rows", type=click.IntRange(1, 100_000), help="So many of the newest predictions; else one batch."
)
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report as one HTML file."
)
@data_option
@json_option
@example("phoenix-ml drift check credit-risk --rows 5000 --html report.html")
def drift_check(
    model_id: str,
    model_version: str | None,
    rows: int | None,
    html: Path | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """Compare a version's newest predictions with its reference, now. Opens no incident."""
    from phoenix_ml.application.comparison import compare_with_reference
    from phoenix_ml.infrastructure.console.drift_page import drift_page

    with opened(data) as phoenix:
        version = watched_version(phoenix, model_id, model_version)
        settings = phoenix.monitoring.settings(model_id)
        name = f"{model_id} {version.version}"
        with working(f"comparing {name} with its reference"):
            newest = phoenix.monitoring.latest(model_id, version.version, rows or settings.batch_rows)
            report = compare_with_reference(phoenix.artifacts, version, newest, settings)
    if report is None:
        raise no_baseline(model_id, version.version)
    about = describe_rows([row.created_at_ms for row in newest], report.reference_rows)
    if html is not None:
        html.write_text(drift_page(report, f"Drift of {name}", [about]), encoding="utf-8")
    if as_json:
        show_json({"model_id": model_id, "model_version": version.version, "report": report})
        return
    show_drift_report(report, f"{name}: {about}")
    if html is not None:
        click.echo(f"wrote {html}")


@drift.command("show")
@click.argument("model_id")
@click.option("--version", "model_version", help="Only this version.")
@data_option
@json_option
@example("phoenix-ml drift show credit-risk")
def drift_show(model_id: str, model_version: str | None, data: Path | None, as_json: bool) -> None:
    """The latest report that the monitor has written."""
    from phoenix_ml.application.reports import describe_report, iso_time
    from phoenix_ml.domain.drift import DriftReport

    with opened(data) as phoenix:
        registry = phoenix.registry
        versions = (
            registry.list_versions(model_id)
            if model_version is None
            else [registry.get(model_id, model_version)]
        )
        found, _ = phoenix.monitoring.reports(model_id, "drift", model_version)
    if all(version.metadata.baseline is None for version in versions):
        raise no_baseline(model_id, ", ".join(version.version for version in versions))
    if as_json:
        show_json({"items": [describe_report(one) for one in found]})
        return
    if not found:
        click.echo(
            "no report yet: the monitor writes one after the first batch of predictions "
            f"(phoenix-ml models monitoring {model_id} shows how many), later where another feature drifts, else once a "
            "minute at most; drift check compares now"
        )
        return
    report = msgspec.convert(found[0].report, DriftReport)
    written = f"{found[0].rows} rows, written at {iso_time(found[0].created_at_ms)}"
    show_drift_report(report, f"{model_id} {found[0].model_version}: {written}")


def no_baseline(model_id: str, version: str) -> NoBaseline:
    return NoBaseline(
        f"{model_id} {version} has no baseline: register a version with --reference, the rows that it was trained on",
        model_id=model_id,
        model_version=version,
    )


def describe_rows(times_ms: Sequence[int], reference_rows: int) -> str:
    from phoenix_ml.application.reports import iso_time

    if not times_ms:
        return "no predictions yet"
    between = f"from {iso_time(min(times_ms))} to {iso_time(max(times_ms))}"
    return f"{len(times_ms)} predictions {between} beside {reference_rows} rows of the reference"


def show_drift_report(report: "DriftReport", title: str) -> None:
    from phoenix_ml.infrastructure.console.drift import drift_table

    console = Console(width=max(Console().width, 120))
    console.print(title, highlight=False, markup=False)
    console.print(drift_table(report))
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


@main.group()
def incidents() -> None:
    """What is wrong with a model: one incident a cause, from its opening to its end."""


@incidents.command("list")
@click.option("--model", "model_id", help="Only this model.")
@click.option("--unresolved", is_flag=True, help="Only what has not ended.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--cursor", help="Where the previous page ended.")
@data_option
@json_option
@example("phoenix-ml incidents list --unresolved")
def incidents_list(
    model_id: str | None,
    unresolved: bool,
    limit: int,
    cursor: str | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """Incidents, the latest opened first."""
    from phoenix_ml.application.ports import IncidentQuery
    from phoenix_ml.application.reports import describe_incident

    with opened(data) as phoenix:
        if model_id is not None:
            phoenix.registry.check_model(model_id)
        query = IncidentQuery(model_id, None, unresolved, limit, cursor)
        found, next_cursor = phoenix.monitoring.incidents(query)
    items = [describe_incident(one) for one in found]
    if as_json:
        show_json({"items": items, "next_cursor": next_cursor})
        return
    if not items:
        click.echo("no incidents")
        return
    table = Table("opened", "model", "version", "status", "severity", "summary", "id", box=None)
    for item in items:
        cells = (item["opened_at"], item["model_id"], item["model_version"], item["status"], item["severity"])
        table.add_row(*map(str, cells), escape(item["summary"]), item["incident_id"])
    print_wide(table)
    if next_cursor:
        click.echo(f"more: --cursor {next_cursor}")


@incidents.command("ack")
@click.argument("incident_id")
@data_option
@json_option
@example("phoenix-ml incidents ack 01928c5a-…")
def incidents_ack(incident_id: str, data: Path | None, as_json: bool) -> None:
    """Say that a person knows of the incident; it goes on being watched."""
    from phoenix_ml.application.reports import describe_incident

    with opened(data) as phoenix:
        incident = phoenix.monitoring.acknowledge(incident_id, actor(), time.time_ns() // 1_000_000)
    if as_json:
        show_json(describe_incident(incident))
        return
    click.echo(f"{incident.id} acknowledged by {incident.acknowledged_by}: {incident.summary}")


@main.group()
def alerts() -> None:
    """What people are told, and whether it reaches them."""


@alerts.command("list")
@click.option("--model", "model_id", help="Only this model.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--cursor", help="Where the previous page ended.")
@data_option
@json_option
@example("phoenix-ml alerts list")
def alerts_list(
    model_id: str | None, limit: int, cursor: str | None, data: Path | None, as_json: bool
) -> None:
    """Alerts, the newest first."""
    from phoenix_ml.application.reports import describe_alert

    with opened(data) as phoenix:
        if model_id is not None:
            phoenix.registry.check_model(model_id)
        found, next_cursor = phoenix.monitoring.alerts(model_id, limit, cursor)
    items = [describe_alert(one) for one in found]
    if as_json:
        show_json({"items": items, "next_cursor": next_cursor})
        return
    if not items:
        click.echo("no alerts")
        return
    table = Table("told", "severity", "what", "id", box=None)
    for item in items:
        table.add_row(item["created_at"], item["severity"], escape(item["title"]), item["alert_id"])
    print_wide(table)
    if next_cursor:
        click.echo(f"more: --cursor {next_cursor}")


@alerts.command("test")
@data_option
@json_option
@example("phoenix-ml alerts test")
def alerts_test(data: Path | None, as_json: bool) -> None:
    """Tell every channel of PHOENIX_ALERTS a test alert, now; exit code 1 when one does not take it."""
    from phoenix_ml.application.ports import Delivery, DeliveryFailed
    from phoenix_ml.domain.ids import new_id
    from phoenix_ml.domain.incidents import Alert, Severity
    from phoenix_ml.infrastructure.alerts.channels import open_channels

    at_ms = time.time_ns() // 1_000_000
    words = f"{actor()} has typed: phoenix-ml alerts test"
    alert = Alert(new_id(), "test", "0.0.0", Severity.WARNING, "Phoenix ML: a test", words, (), at_ms)
    outcomes: dict[str, str] = {}
    with opened(data) as phoenix:
        settings = phoenix.settings
        for name, channel in open_channels(settings.alerts, settings.alerts_secret, phoenix.kafka).items():
            try:
                channel.tell(Delivery(alert.id, name, "alert", msgspec.to_builtins(alert), at_ms, 1))
                outcomes[name] = "told"
            except DeliveryFailed as exc:
                outcomes[name] = f"failed: {exc}"
            except Exception as exc:  # noqa: BLE001 - a defect of one channel says nothing of the others
                outcomes[name] = f"failed: a defect, {type(exc).__name__}"
            channel.close()
    if as_json:
        show_json(outcomes)
    else:
        table = Table("channel", "result", box=None)
        for name, outcome in outcomes.items():
            table.add_row(escape(name), escape(outcome))
        print_wide(table)
    if any(outcome != "told" for outcome in outcomes.values()):
        sys.exit(1)


@main.group()
def heal() -> None:
    """Models that suffer are trained again, checked, and put beside their champion."""


@heal.command("status")
@click.option("--model", "model_id", help="Only this model.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--cursor", help="Where the previous page ended.")
@data_option
@json_option
@example("phoenix-ml heal status")
def heal_status(
    model_id: str | None, limit: int, cursor: str | None, data: Path | None, as_json: bool
) -> None:
    """Retrain jobs, the latest requested first, and the models whose healing is paused."""
    from phoenix_ml.application.ports import JobQuery
    from phoenix_ml.application.reports import describe_job

    with opened(data) as phoenix:
        if model_id is not None:
            phoenix.registry.check_model(model_id)
        found, next_cursor = phoenix.retrain_jobs.page(JobQuery(model_id, limit, cursor=cursor))
        trainer = phoenix.settings.trainer
        paused = [name for name in _paused(phoenix) if model_id in (None, name)]
    items = [describe_job(job) for job in found]
    if as_json:
        show_json(
            {"items": items, "next_cursor": next_cursor, "has_trainer": bool(trainer), "paused": paused}
        )
        return
    if not trainer:
        click.echo("no trainer is set (PHOENIX_TRAINER): requests wait")
    if paused:
        click.echo(f"healing is paused, until heal resume: {', '.join(paused)}")
    if not items:
        click.echo("no retrain jobs")
        return
    table = Table("requested", "model", "version", "status", "new version", "reason", "error", "id", box=None)
    for item in items:
        told = (
            "requested_at",
            "model_id",
            "model_version",
            "status",
            "new_version",
            "reason",
            "error",
            "job_id",
        )
        table.add_row(*(escape(str(item[name] or "")) for name in told))
    print_wide(table)
    if next_cursor:
        click.echo(f"more: --cursor {next_cursor}")


@heal.command("run")
@click.argument("model_id")
@data_option
@json_option
@example("phoenix-ml heal run credit-risk")
def heal_run(model_id: str, data: Path | None, as_json: bool) -> None:
    """Ask for a retraining of the champion now, whatever the monitor thinks."""
    from phoenix_ml.application.reports import describe_job
    from phoenix_ml.application.retraining import ask_for_retraining

    with opened(data) as phoenix:
        now_ms = time.time_ns() // 1_000_000
        job, is_new = ask_for_retraining(
            phoenix.registry, phoenix.retrain_jobs, phoenix.monitoring, model_id, actor(), now_ms
        )
    if as_json:
        show_json(describe_job(job))
        return
    asked = "is asked for" if is_new else f"is asked for already, and {job.status}"
    click.echo(f"{job.id} {asked}: {model_id} {job.model_version}; heal status tells how it goes")


def set_paused(model_id: str, paused: bool, data: Path | None, as_json: bool) -> None:
    with opened(data, may_create=True) as phoenix:
        monitoring = phoenix.monitoring
        # What is paused for all is resumed for one by a setting of its own; else it has none.
        is_general = model_id != ALL_MODELS and monitoring.settings(ALL_MODELS).healing_paused
        wanted = False if is_general and not paused else (paused or None)
        is_paused = monitoring.change_settings(model_id, {"healing_paused": wanted}, actor()).healing_paused
        others = [] if model_id != ALL_MODELS else _paused(phoenix, is_paused=not is_paused)
    if as_json:
        show_json({"model_id": model_id, "healing_paused": is_paused})
        return
    whose = "any model" if model_id == ALL_MODELS else model_id
    click.echo(
        f"no retraining of {whose} is asked for, and none that was begins, until heal resume"
        if is_paused
        else f"retrainings of {whose} are asked for again"
    )
    if others:
        click.echo(f"by a setting of its own this is not so of: {', '.join(others)}")


def _paused(phoenix: "Phoenix", *, is_paused: bool = True) -> list[str]:
    """The models whose healing is paused, or those whose is not."""
    names = dict.fromkeys(version.model_id for version in phoenix.registry.list_versions())
    return [name for name in names if phoenix.monitoring.settings(name).healing_paused is is_paused]


@heal.command("pause")
@click.argument("model_id")
@data_option
@json_option
@example("phoenix-ml heal pause credit-risk")
def heal_pause(model_id: str, data: Path | None, as_json: bool) -> None:
    """Ask for no retraining of a model; `*` stands for all models."""
    set_paused(model_id, True, data, as_json)


@heal.command("resume")
@click.argument("model_id")
@data_option
@json_option
@example("phoenix-ml heal resume credit-risk")
def heal_resume(model_id: str, data: Path | None, as_json: bool) -> None:
    """Ask for retrainings again."""
    set_paused(model_id, False, data, as_json)
