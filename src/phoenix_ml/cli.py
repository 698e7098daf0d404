"""The command ``phoenix-ml``. Exit codes: 0, 1 (failed), 2 (usage)."""

import asyncio
import getpass
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from phoenix_ml import __version__
from phoenix_ml.bootstrap import Phoenix, bootstrap, open_dead_letters, open_features
from phoenix_ml.domain.errors import (
    DatabaseUnavailable,
    InvalidField,
    NoBaseline,
    PhoenixError,
    ServerUnreachable,
)
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.models import ModelVersion, Stage
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy
from phoenix_ml.settings import load_settings

if TYPE_CHECKING:
    from phoenix_ml.application.replay import Replay
    from phoenix_ml.domain.drift import DriftReport
    from phoenix_ml.domain.features import PackedSignature

T = TypeVar("T")
# A bulk command waits for the store as long as a person would, not as long as a request may.
_COMMAND_DEADLINE_MS = 5000.0

err = Console(stderr=True)
STAGES = [stage.value for stage in Stage]
STRATEGIES = [strategy.value for strategy in Strategy if strategy is not Strategy.PINNED]


class PhoenixGroup(click.Group):
    """Shows our errors as one line and exits with 1; anything else is a defect and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PhoenixError as exc:
            err.print(f"[bold red]error[/] [dim]{exc.code}[/] ", end="")
            err.print(exc.message, markup=False, highlight=False)
            ctx.exit(1)


def example(text: str) -> Callable[[T], T]:
    """Puts an example at the end of a command's help, as it is to be typed."""

    def add(command: T) -> T:
        command.__doc__ = f"{command.__doc__}\n\n\b\nExample:\n  {text}"
        return command

    return add


data_option = click.option(
    "--data", type=click.Path(path_type=Path), help="Folder of all that is stored (PHOENIX_DATA)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
url_option = click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="Base URL of a running server."
)


@click.group(cls=PhoenixGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="phoenix-ml")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Real-time machine-learning inference: fast, on record, watched.

    Settings come from flags, else PHOENIX_… variables, else phoenix.toml.
    """
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    # What the commands and their processes write is for this user alone: it holds what callers sent.
    users_own = os.umask(0o077)
    ctx.call_on_close(lambda: os.umask(users_own))


@contextmanager
def opened(data: Path | None) -> Iterator[Phoenix]:
    """The application with its database; one of an older version is left to who serves it to upgrade."""
    phoenix = bootstrap(load_settings(data=data))
    try:
        phoenix.database.upgrade_if_new()
        yield phoenix
    finally:
        phoenix.close()


def actor() -> str:
    """Who types, for the audit log."""
    try:
        return f"cli {getpass.getuser()}"
    except (KeyError, OSError):  # a container may run under a user id without a name
        return "cli"


def show_json(content: Any) -> None:
    click.echo(json.dumps(msgspec.to_builtins(content), indent=2, ensure_ascii=False))


def print_wide(table: Table) -> None:
    """Prints a table whose cells are there to be copied: a terminal folds lines, rich would cut cells."""
    Console(width=max(Console().width, 150)).print(table)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


# serve, work, db, doctor


@main.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="TCP port; 0 takes a free one.")
@click.option("--workers", type=int, help="API processes.")
@click.option(
    "--roles",
    type=click.Choice(["all", "ship", "log", "monitor", "alert", "heal", "none"]),
    help="What the background process does.",
)
@click.option("--insecure", is_flag=True, default=None, help="Listen where others reach it, without keys.")
@data_option
@example("phoenix-ml serve --port 8000 --workers 2 --data ./phoenix-data")
def serve(**flags: Any) -> None:
    """Serve predictions and keep the log, until Ctrl-C."""
    from phoenix_ml.infrastructure.telemetry.logs import configure_logs
    from phoenix_ml.processes.supervisor import supervise

    settings = load_settings(**flags)
    configure_logs(settings.log_level, settings.log_format, "supervisor")

    def announce(url: str) -> None:
        err.print(f"Phoenix ML {__version__} serves [bold]{url}[/]   docs {url}/docs   metrics {url}/metrics")
        err.print("[dim]Ctrl-C stops it.[/]")

    sys.exit(supervise(bootstrap(settings), announce))


@main.command()
@click.argument(
    "roles", nargs=-1, required=True, type=click.Choice(["ship", "log", "monitor", "alert", "heal"])
)
@click.option("--metrics-port", type=int, help="Serve /metrics and /health/live on this port.")
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

    with opened(data) as phoenix:
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


# models


@main.group()
def models() -> None:
    """Versions of models: register, promote, activate, route."""


@models.command("register")
@click.argument("artifact", metavar="PATH", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--id", "model_id", required=True, help="The model's name.")
@click.option("--version", required=True, help="Semantic version, such as 1.0.0.")
@click.option("--stage", type=click.Choice(STAGES), default="dev", show_default=True)
@click.option(
    "--features", type=click.Path(exists=True, path_type=Path), help="Feature contract, a JSON file."
)
@click.option(
    "--task", type=click.Choice(["classification", "regression"]), help="Where the graph is unclear."
)
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Training rows (.csv, .parquet) for the baseline."
)
@click.option("--time", help="The reference's column that orders its rows in time; it need be no feature.")
@click.option("--outcome", help="The reference's column with the truth; it need be no feature.")
@click.option("--activate", is_flag=True, help="Let it answer requests at once.")
@data_option
@json_option
@example(
    "phoenix-ml models register model.onnx --id credit-risk --version 1.0.0 --reference train.parquet --activate"
)
def models_register(
    artifact: Path,
    model_id: str,
    version: str,
    stage: str,
    features: Path | None,
    task: str | None,
    reference: Path | None,
    time: str | None,
    outcome: str | None,
    activate: bool,
    data: Path | None,
    as_json: bool,
) -> None:
    """Register an ONNX file as a version: stored, checked, loaded and run, over the reference if there is one."""
    from phoenix_ml.application.catalogue import Reference, Registration, register
    from phoenix_ml.application.catalogue import activate as activate_version
    from phoenix_ml.infrastructure.tables import read_columns

    contract: dict[str, FeatureRule] = {}
    if features is not None:
        from phoenix_ml.infrastructure.http.codec import decode_json

        contract = decode_json(features.read_bytes(), dict[str, FeatureRule])
    if reference is None and (time or outcome):
        raise click.UsageError("--time and --outcome name columns of --reference")
    registration = Registration(model_id, version, Stage(stage), contract, task)
    with opened(data) as phoenix:
        registered = register(
            phoenix.registry,
            phoenix.artifacts,
            phoenix.engines,
            artifact,
            registration,
            actor=actor(),
            reference=None if reference is None else Reference(read_columns(reference), time, outcome),
        )
        if activate:
            registered = activate_version(
                phoenix.registry, phoenix.artifacts, phoenix.engines, model_id, version, actor=actor()
            )
    show_version(registered, as_json)


def show_version(version: ModelVersion, as_json: bool, *, baseline: bool = False) -> None:
    from phoenix_ml.application.reports import describe_version

    described = describe_version(version, baseline=baseline)
    if as_json:
        show_json(described)
        return
    console = Console()
    state = "[green]active[/]" if version.is_active else "inactive"
    console.print(f"[bold]{version.model_id} {version.version}[/]  {version.stage}  {state}")
    console.print(
        f"[dim]{version.metadata.task}, {version.metadata.runtime}, sha256 {version.sha256[:16]}…[/]"
    )
    table = Table("feature", "type", "default", "max age", "meaning", box=None)
    for name in version.metadata.features:
        rule = version.metadata.contract[name]
        required = isinstance(rule.default, msgspec.UnsetType)
        age = "" if rule.max_age_s is None else f"{rule.max_age_s:g} s"
        default = "[dim]required[/]" if required else json.dumps(rule.default)
        table.add_row(name, rule.type, default, age, rule.description)
    console.print(table)
    if baseline:
        show_json(described["baseline"])


@models.command("list")
@data_option
@json_option
@example("phoenix-ml models list")
def models_list(data: Path | None, as_json: bool) -> None:
    """All versions of all models."""
    from phoenix_ml.application.reports import describe_version, iso_time

    with opened(data) as phoenix:
        versions = phoenix.registry.list_versions()
        routings = phoenix.registry.routings()
    if as_json:
        show_json([describe_version(version) for version in versions])
        return
    if not versions:
        click.echo(
            "no model is registered yet: phoenix-ml models register PATH --id ID --version V --activate"
        )
        return
    table = Table("model", "version", "stage", "active", "role", "task", "registered", box=None)
    for version in versions:
        routing = routings.get(version.model_id)
        arms = routing.arms if routing else ()
        roles = [f"{a.role} {a.weight:g}" for a in arms if a.version == version.version]
        table.add_row(
            version.model_id,
            version.version,
            version.stage,
            "yes" if version.is_active else "",
            roles[0] if roles else "",
            version.metadata.task,
            iso_time(version.created_at_ms),
        )
    print_wide(table)


@models.command("show")
@click.argument("model_id")
@click.argument("version", required=False)
@click.option("--baseline", is_flag=True, help="The training data's distribution too.")
@data_option
@json_option
@example("phoenix-ml models show credit-risk 1.0.0 --baseline")
def models_show(model_id: str, version: str | None, baseline: bool, data: Path | None, as_json: bool) -> None:
    """One version, or all of a model: signature, feature contract, stage."""
    from phoenix_ml.application.reports import describe_version

    with opened(data) as phoenix:
        registry = phoenix.registry
        found = registry.list_versions(model_id) if version is None else [registry.get(model_id, version)]
    if as_json:
        described = [describe_version(one, baseline=baseline) for one in found]
        show_json(described if version is None else described[0])
        return
    for one in found:
        show_version(one, False, baseline=baseline)


@models.command("stage")
@click.argument("model_id")
@click.argument("version")
@click.argument("stage", type=click.Choice(STAGES))
@data_option
@json_option
@example("phoenix-ml models stage credit-risk 1.1.0 prod")
def models_stage(model_id: str, version: str, stage: str, data: Path | None, as_json: bool) -> None:
    """Move a version one step: dev, staging, prod."""
    with opened(data) as phoenix:
        show_version(phoenix.registry.set_stage(model_id, version, Stage(stage), actor()), as_json)


@models.command("activate")
@click.argument("model_id")
@click.argument("version")
@data_option
@json_option
@example("phoenix-ml models activate credit-risk 1.1.0")
def models_activate(model_id: str, version: str, data: Path | None, as_json: bool) -> None:
    """Let a version answer requests, once it was found to load."""
    from phoenix_ml.application.catalogue import activate

    with opened(data) as phoenix:
        activated = activate(
            phoenix.registry, phoenix.artifacts, phoenix.engines, model_id, version, actor=actor()
        )
    show_version(activated, as_json)


@models.command("deactivate")
@click.argument("model_id")
@click.argument("version")
@data_option
@json_option
@example("phoenix-ml models deactivate credit-risk 1.0.0")
def models_deactivate(model_id: str, version: str, data: Path | None, as_json: bool) -> None:
    """Take a version out of service."""
    with opened(data) as phoenix:
        show_version(phoenix.registry.set_active(model_id, version, False, actor()), as_json)


@models.command("monitoring")
@click.argument("model_id")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting; repeat it. Without a value the default comes back.",
)
@data_option
@json_option
@example("phoenix-ml models monitoring credit-risk --set batch_rows=500 --set left_out=age")
def models_monitoring(model_id: str, changes: tuple[str, ...], data: Path | None, as_json: bool) -> None:
    """Show or change how a model is watched and healed; `*` stands for all models."""
    from phoenix_ml.domain.monitoring import ALL_MODELS, parse_setting

    with opened(data) as phoenix:
        if changes:
            parsed = dict(map(parse_setting, changes))
            settings = phoenix.monitoring.change_settings(model_id, parsed, actor())
        else:
            if model_id != ALL_MODELS:
                phoenix.registry.list_versions(model_id)
            settings = phoenix.monitoring.settings(model_id)
    told = msgspec.to_builtins(settings)
    if as_json:
        show_json(told)
        return
    for key, value in told.items():
        click.echo(f"{key:18} {'' if value is None else json.dumps(value)}")


@models.command("routing")
@click.argument("model_id")
@click.argument("arms", nargs=-1, metavar="[VERSION[=WEIGHT]]...")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    help="Default: ab_test.",
)
@click.option("--salt", default="", help="Separates this experiment's assignment from others.")
@click.option("--clear", is_flag=True, help="Go back to the default routing.")
@data_option
@json_option
@example("phoenix-ml models routing credit-risk 1.0.0=90 1.1.0=10 --strategy canary")
def models_routing(
    model_id: str,
    arms: tuple[str, ...],
    strategy: str | None,
    salt: str,
    clear: bool,
    data: Path | None,
    as_json: bool,
) -> None:
    """Show or set how requests are shared out. The first version is the champion."""
    from phoenix_ml.application.catalogue import set_routing

    with opened(data) as phoenix:
        versions = phoenix.registry.list_versions(model_id)
        if clear:
            phoenix.registry.clear_routing(model_id, actor())
        elif arms:
            routing = parse_routing(arms, strategy, salt)
            set_routing(phoenix.registry, model_id, routing, actor=actor())
        in_force = phoenix.registry.routings().get(model_id)
        is_default = in_force is None
        if in_force is None:
            from phoenix_ml.domain.routing import default_routing

            in_force = default_routing(version for version in versions if version.is_active)
    if as_json:
        show_json({"routing": in_force, "is_default": is_default})
        return
    if in_force is None:
        click.echo(f"no version of {model_id} is active: phoenix-ml models activate {model_id} VERSION")
        return
    table = Table("version", "role", "weight", box=None)
    for arm in in_force.arms:
        table.add_row(arm.version, arm.role, f"{arm.weight:g}")
    Console().print(f"[bold]{model_id}[/]  {in_force.strategy}{' (default)' if is_default else ''}")
    Console().print(table)


def parse_routing(arms: tuple[str, ...], strategy: str | None, salt: str) -> Routing:
    """A routing from ``VERSION[=WEIGHT]`` words; the first is the champion."""
    chosen = Strategy(strategy or ("single" if len(arms) == 1 else "ab_test"))
    other = Role.SHADOW if chosen is Strategy.SHADOW else Role.CHALLENGER
    parsed = []
    for number, word in enumerate(arms):
        version, _, weight = word.partition("=")
        try:
            parsed.append(Arm(version, other if number else Role.CHAMPION, float(weight or 1)))
        except ValueError:
            raise InvalidField(f"{word!r}: write VERSION=WEIGHT, such as 1.0.0=90", field="arms") from None
    return Routing(chosen, tuple(parsed), salt)


# features


@main.group()
def features() -> None:
    """The feature store."""


@features.command("load")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--entity", required=True, metavar="COLUMN", help="The column with the entity ids.")
@data_option
@json_option
@example("phoenix-ml features load customers.parquet --entity customer_id")
def features_load(file: Path, entity: str, data: Path | None, as_json: bool) -> None:
    """Load a CSV or Parquet table: a row an entity, a column a feature; empty cells remove."""
    loaded = run_async(load_file(file, entity, data))
    if as_json:
        show_json({"entities": loaded})
    else:
        click.echo(f"{loaded} entities loaded")


async def load_file(file: Path, entity: str, data: Path | None) -> int:
    from phoenix_ml.application.features import load_features
    from phoenix_ml.infrastructure.tables import open_table

    signatures = signatures_to_pack(data)
    store = open_features(load_settings(data=data), _COMMAND_DEADLINE_MS)
    try:
        with open_table(file, text_columns=[entity]) as table, Progress(console=err) as bar:
            if entity not in table.names:
                raise InvalidField(
                    f"{file.name} has no column {entity!r}; it has {', '.join(table.names)}", field="entity"
                )
            task = bar.add_task(f"loading {file.name}", total=1.0)
            return await load_features(
                store, table.batches, entity, lambda share: bar.update(task, completed=share), signatures
            )
    finally:
        await store.close()


def signatures_to_pack(data: Path | None) -> Sequence["PackedSignature"]:
    """Those of the active models; none while the database cannot say."""
    from phoenix_ml.application.features import packed_signatures

    try:
        with opened(data) as phoenix:
            return packed_signatures(phoenix.registry.list_versions())
    except DatabaseUnavailable as exc:
        err.print(f"[yellow]features are stored, but no rows are packed:[/] {escape(exc.message)}")
        return ()


@features.command("get")
@click.argument("entity_id")
@data_option
@json_option
@example("phoenix-ml features get cust_0001")
def features_get(entity_id: str, data: Path | None, as_json: bool) -> None:
    """What is stored for an entity, and since when."""
    from phoenix_ml.application.features import show_features
    from phoenix_ml.application.reports import iso_time

    async def fetch() -> dict[str, Any]:
        store = open_features(load_settings(data=data), _COMMAND_DEADLINE_MS)
        try:
            return await show_features(store, entity_id)
        finally:
            await store.close()

    found = run_async(fetch())
    if as_json:
        show_json(found)
        return
    table = Table("feature", "value", "written", box=None)
    for name, value in found["features"].items():
        table.add_row(name, json.dumps(value, ensure_ascii=False), iso_time(found["updated_at_ms"][name]))
    Console().print(table)


@features.command("put")
@click.argument("entity_id")
@click.argument("values", nargs=-1, required=True, metavar="NAME=VALUE...")
@data_option
@json_option
@example("phoenix-ml features put cust_0001 income=2100 home=owner debt=null")
def features_put(entity_id: str, values: tuple[str, ...], data: Path | None, as_json: bool) -> None:
    """Store features of an entity: numbers, true, false; null removes; else text."""
    from phoenix_ml.application.features import store_features

    given = dict(_parse_value(word) for word in values)
    signatures = signatures_to_pack(data)

    async def put() -> int:
        store = open_features(load_settings(data=data), _COMMAND_DEADLINE_MS)
        try:
            return await store_features(store, {entity_id: given}, signatures)
        finally:
            await store.close()

    written = run_async(put())
    if as_json:
        show_json({"written": written})
    else:
        click.echo(f"{len(given)} features of {entity_id} written")


def _parse_value(word: str) -> tuple[str, Any]:
    name, separator, text = word.partition("=")
    if not separator or not name:
        raise InvalidField(f"{word!r}: write NAME=VALUE, such as income=2100", field="values")
    try:
        value = msgspec.json.decode(text.encode(), type=float | int | bool | str | None)
    except msgspec.DecodeError:
        value = text
    return name, value


# predict, predictions


@main.command()
@click.argument("model_id")
@click.option("--entity", "entity_id", help="Whose stored features to use.")
@click.option("--feature", "given", multiple=True, metavar="NAME=VALUE", help="A feature; repeat it.")
@click.option("--version", "model_version", help="Ask this version instead of the routing's choice.")
@url_option
@json_option
@example("phoenix-ml predict credit-risk --entity cust_0001")
def predict(
    model_id: str,
    entity_id: str | None,
    given: tuple[str, ...],
    model_version: str | None,
    url: str,
    as_json: bool,
) -> None:
    """Ask a running server for one prediction."""
    body: dict[str, Any] = {"model_id": model_id}
    if entity_id is not None:
        body["entity_id"] = entity_id
    if given:
        body["features"] = dict(_parse_value(word) for word in given)
    if model_version is not None:
        body["model_version"] = model_version
    answered, found = call_server(url, "/predict", body, Answered)
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
    url: str,
    as_json: bool,
) -> None:
    """Put load on a running server and measure: every answer goes on record, as any other does."""
    from phoenix_ml.bench import Target, run_on

    if entity_ids and file is not None:
        raise click.UsageError("give --entity or --features, not both")
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
            str(item["result"]),
            confidence,
            outcome,
            item["prediction_id"],
        )
    print_wide(table)
    if next_cursor:
        click.echo(f"more: --cursor {next_cursor}")


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
@click.option("--model", "model_id", required=True, help="The model.")
@click.option(
    "--version", "model_version", help="Only this version; its features are the columns, else the champion's."
)
@click.option("--with-outcomes", is_flag=True, help="Only predictions whose outcome is known.")
@click.option(
    "--for-training",
    is_flag=True,
    help="Only what a trainer may see: outcomes known, less those kept for the comparison with the champion.",
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
    model_id: str,
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
    written = 0
    with opened(data) as phoenix, Progress(console=err, transient=True) as progress:
        version = watched_version(phoenix, model_id, model_version)
        query = PredictionQuery(model_id, model_version, since_ms=since_ms, until_ms=until_ms)
        task = progress.add_task("exporting", total=None)
        with write_table(out, export_columns(version.metadata)) as add_rows:
            for page in export_rows(
                phoenix.prediction_log, query, version.metadata, with_outcomes=with_outcomes or for_training
            ):
                rows = to_train_on(page) if for_training else page
                add_rows(rows)
                written += len(rows)
                progress.update(task, description=f"exporting, {written:,} rows")
    if as_json:
        show_json({"rows": written, "file": str(out)})
        return
    click.echo(f"wrote {written:,} rows to {out}")


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
    click.echo(f"{found['count']} outcomes have no prediction in the log")
    for item in found["items"]:
        click.echo(f"  {item['received_at']}  {item['prediction_id']}  {item['outcome']}")
    if found["next_cursor"]:
        click.echo(f"more: --cursor {found['next_cursor']}")


# events


@main.group()
def events() -> None:
    """What travels from the answers to the log."""


@events.group("dead")
def events_dead() -> None:
    """Dead letters: what could not be shipped or logged, and why."""


@events_dead.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@data_option
@json_option
@example("phoenix-ml events dead list --limit 5")
def events_dead_list(limit: int, data: Path | None, as_json: bool) -> None:
    """The oldest dead letters that were not requeued: those beside the journal, then those in Kafka."""
    from phoenix_ml.application.reports import describe_event

    letters = [
        letter for store in open_dead_letters(load_settings(data=data)) for letter in store.letters(limit)
    ]
    items = [
        {
            "buried_at": letter.buried_at,
            "origin": letter.place,
            "reason": letter.reason,
            "event": None if letter.event is None else describe_event(letter.event),
            "payload_bytes": len(letter.payload),
        }
        for letter in letters[:limit]
    ]
    if as_json:
        show_json({"items": items})
        return
    if not items:
        click.echo("there are no dead letters")
        return
    table = Table("buried at", "origin", "event", "reason", box=None)
    for letter in letters[:limit]:
        event = None if letter.event is None else describe_event(letter.event)
        shown = f"{event['kind']} {event['id']}" if event else f"{len(letter.payload)} bytes, no event"
        # Foreign bytes may stand in the last: they are no markup of ours.
        table.add_row(letter.buried_at, escape(letter.place), escape(shown), escape(letter.reason))
    print_wide(table)


@events_dead.command("requeue")
@click.option(
    "--limit", type=click.IntRange(1), default=1000, show_default=True, help="At most so many of each store."
)
@data_option
@json_option
@example("phoenix-ml events dead requeue")
def events_dead_requeue(limit: int, data: Path | None, as_json: bool) -> None:
    """Put dead letters back on the road to the log, the oldest first, once the cause is gone."""
    requeued = sum(store.requeue(limit) for store in open_dead_letters(load_settings(data=data)))
    if as_json:
        show_json({"requeued": requeued})
    else:
        click.echo(f"{requeued} events are on their way to the log again")


# drift, incidents


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
    from phoenix_ml.application.monitoring import describe_drift
    from phoenix_ml.infrastructure.console.drift_page import drift_page

    with opened(data) as phoenix:
        version = watched_version(phoenix, model_id, model_version)
        settings = phoenix.monitoring.settings(model_id)
        newest = phoenix.monitoring.latest(model_id, version.version, rows or settings.batch_rows)
        report = describe_drift(phoenix.artifacts, version, newest, settings)
    name = f"{model_id} {version.version}"
    if report is None:
        raise NoBaseline(
            f"{name} has no baseline: register a version with --reference, the rows that it was trained on",
            model_id=model_id,
            model_version=version.version,
        )
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
        phoenix.registry.list_versions(model_id)
        found = phoenix.monitoring.reports(model_id, "drift", model_version)
    if as_json:
        show_json({"items": [describe_report(one) for one in found]})
        return
    if not found:
        click.echo(
            "no report yet: the monitor writes one after each batch of predictions "
            f"(phoenix-ml models monitoring {model_id} shows how many); drift check compares now"
        )
        return
    report = msgspec.convert(found[0].report, DriftReport)
    written = f"{found[0].rows} rows, written at {iso_time(found[0].created_at_ms)}"
    show_drift_report(report, f"{model_id} {found[0].model_version}: {written}")


def watched_version(phoenix: Phoenix, model_id: str, model_version: str | None) -> ModelVersion:
    """The version asked for, else the one that answers first."""
    from phoenix_ml.application.retraining import answering_version

    if model_version is not None:
        return phoenix.registry.get(model_id, model_version)
    return answering_version(phoenix.registry, model_id)


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
            phoenix.registry.list_versions(model_id)
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
def heal() -> None:
    """Models that suffer are trained again, checked, and put beside their champion."""


@heal.command("status")
@click.option("--model", "model_id", help="Only this model.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@data_option
@json_option
@example("phoenix-ml heal status")
def heal_status(model_id: str | None, limit: int, data: Path | None, as_json: bool) -> None:
    """Retrain jobs, the latest requested first."""
    from phoenix_ml.application.ports import JobQuery
    from phoenix_ml.application.reports import describe_job

    with opened(data) as phoenix:
        if model_id is not None:
            phoenix.registry.list_versions(model_id)
        items = [describe_job(job) for job in phoenix.retrain_jobs.page(JobQuery(model_id, limit))]
        trainer = phoenix.settings.trainer
    if as_json:
        show_json({"items": items, "has_trainer": bool(trainer)})
        return
    if not trainer:
        click.echo("no trainer is set (PHOENIX_TRAINER): requests wait")
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
        job = ask_for_retraining(phoenix.registry, phoenix.retrain_jobs, model_id, actor(), now_ms)
    if as_json:
        show_json(describe_job(job))
        return
    click.echo(f"{job.id} is asked for: {model_id} {job.model_version}; heal status tells how it goes")


def set_paused(model_id: str, paused: bool, data: Path | None) -> None:
    with opened(data) as phoenix:
        phoenix.monitoring.change_settings(model_id, {"healing_paused": paused or None}, actor())


@heal.command("pause")
@click.argument("model_id")
@data_option
@example("phoenix-ml heal pause credit-risk")
def heal_pause(model_id: str, data: Path | None) -> None:
    """Ask for no retraining of a model; `*` stands for all models."""
    set_paused(model_id, True, data)
    click.echo(f"no retraining of {model_id} is asked for until heal resume")


@heal.command("resume")
@click.argument("model_id")
@data_option
@example("phoenix-ml heal resume credit-risk")
def heal_resume(model_id: str, data: Path | None) -> None:
    """Ask for retrainings again."""
    set_paused(model_id, False, data)
    click.echo(f"retrainings of {model_id} are asked for again")


# demo


@main.command()
@click.option("--port", type=int, default=8000, show_default=True)
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


if __name__ == "__main__":
    main()
