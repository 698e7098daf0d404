"""``serve``, ``work``, ``db``, ``doctor`` and ``demo``: what runs the platform."""

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from phoenix_ml import __version__
from phoenix_ml.bootstrap import bootstrap
from phoenix_ml.cli.common import data_option, err, example, json_option, main, opened, show_json, working
from phoenix_ml.settings import ROLES, load_settings, parse_roles

PORT = click.IntRange(0, 65535)


def _roles(_: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> str | None:
    """What was given, as the setting has it."""
    if len(given) > 1:
        typed = f"--roles {','.join(given)}"
        raise click.BadParameter(f"name all of them in one, with commas between: {typed}", param=parameter)
    try:
        for text in given:
            parse_roles(text)
    except ValueError as exc:
        raise click.BadParameter(str(exc), param=parameter) from exc
    return given[0] if given else None


@main.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=PORT, help="TCP port; 0 takes a free one.")
@click.option(
    "--grpc-port",
    type=click.IntRange(-1, 65535),
    help="TCP port of gRPC; 0 takes a free one, -1 serves none.",
)
@click.option("--workers", type=int, help="API processes.")
@click.option(
    "--roles",
    multiple=True,
    callback=_roles,
    metavar="ROLE,…",
    help=f"What the background process does: all, none, or some of {', '.join(ROLES)}, such as log,monitor.",
)
@click.option("--insecure", is_flag=True, default=None, help="Listen where others reach it, without keys.")
@data_option
@example("phoenix-ml serve --port 8000 --workers 2 --data ./phoenix-data")
def serve(**flags: Any) -> None:
    """Serve predictions and keep the log, until Ctrl-C."""
    from phoenix_ml.infrastructure.telemetry.logs import configure_logs
    from phoenix_ml.processes.background import nowhere_to_ship
    from phoenix_ml.processes.supervisor import supervise

    settings = load_settings(**flags)
    if "ship" in settings.background_roles and settings.events.startswith("local:"):
        raise nowhere_to_ship()
    configure_logs(settings.log_level, settings.log_format, "supervisor")

    def announce(url: str, grpc_address: str | None) -> None:
        also = "" if grpc_address is None else f"   gRPC {grpc_address}"
        served = f"[bold]{url}[/]   docs {url}/docs   metrics {url}/metrics{also}"
        err.print(f"Phoenix ML {__version__} serves {served}", soft_wrap=True)
        err.print("[dim]Ctrl-C stops it.[/]")

    sys.exit(supervise(bootstrap(settings), announce))


@main.command()
@click.argument("roles", nargs=-1, required=True, type=click.Choice(ROLES))
@click.option("--metrics-port", type=PORT, help="Serve /metrics and /health/live on this port.")
@data_option
@example("phoenix-ml work log --metrics-port 9100")
def work(roles: tuple[str, ...], metrics_port: int | None, data: Path | None) -> None:
    """Run background roles by themselves: ship sends the journals' events to Kafka, log writes them down,
    monitor watches the models, alert tells people, and heal trains again what suffers.
    """
    from phoenix_ml.infrastructure.telemetry.exporter import export_metrics
    from phoenix_ml.infrastructure.telemetry.logs import configure_logs
    from phoenix_ml.processes.background import metrics_of_worker, stop_on_signals
    from phoenix_ml.processes.background import work as run
    from phoenix_ml.processes.supervisor import check_address

    with opened(data, may_create=True) as phoenix:
        settings = phoenix.settings
        configure_logs(settings.log_level, settings.log_format, "+".join(roles))
        if metrics_port is not None:
            check_address(settings)
        stopping = stop_on_signals()
        with (
            metrics_of_worker(phoenix, roles) as metrics_file,
            export_metrics(metrics_file.parent, settings.host, metrics_port),
        ):
            run(phoenix, roles, metrics_file, stopping)


@main.group()
def db() -> None:
    """The database."""


@db.command("upgrade")
@data_option
@json_option
@example("PHOENIX_DATABASE=postgresql://phoenix@db/phoenix phoenix-ml db upgrade")
def db_upgrade(data: Path | None, as_json: bool) -> None:
    """Bring the database's tables to this version; safe to run again."""
    phoenix = bootstrap(load_settings(data=data))
    try:
        with working(f"upgrading {phoenix.database.name}"):
            revision = phoenix.database.upgrade()
    finally:
        phoenix.database.close()
    if as_json:
        show_json({"database": phoenix.database.name, "revision": revision})
    else:
        click.echo(f"{phoenix.database.name} is at revision {revision}")


@main.command()
@data_option
@json_option
@example("phoenix-ml doctor --data ./phoenix-data")
def doctor(data: Path | None, as_json: bool) -> None:
    """Check what a server would need, and say what to do about what is missing."""
    from phoenix_ml.processes.doctor import examine

    findings = examine(load_settings(data=data))
    if as_json:
        show_json(findings)
    else:
        table = Table("check", "state", "what was found", box=None)
        for finding in findings:
            table.add_row(finding.check, "[green]ok[/]" if finding.ok else "[red]failed[/]", finding.found)
        Console().print(table)
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


@main.command()
@click.option("--port", type=PORT, default=8000, show_default=True)
@click.option("--exit", "exit_after", is_flag=True, help="End after the report instead of serving on.")
@click.option("--healing", is_flag=True, help="Another story: applicants change, and the model is healed.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("phoenix-demo"),
    show_default=True,
    help="Made anew.",
)
@example("phoenix-ml demo --exit")
def demo(port: int, exit_after: bool, healing: bool, data: Path) -> None:
    """See it work: train two credit-risk models, serve them as an A/B test, replay real applicants."""
    if healing:
        from phoenix_ml.demo.healing import run_healing_demo

        sys.exit(run_healing_demo(data, port, exit_after))
    from phoenix_ml.demo.show import run_demo

    sys.exit(run_demo(data, port, exit_after))
