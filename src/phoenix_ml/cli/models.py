"""``models``: the registry at the terminal."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phoenix_ml.cli.common import (
    actor,
    checked_by,
    data_option,
    example,
    json_option,
    main,
    opened,
    place_of,
    print_wide,
    show_json,
    tell,
    warn,
    working,
)
from phoenix_ml.domain.errors import InvalidField, MalformedBody
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.models import (
    Framework,
    Metadata,
    ModelVersion,
    Stage,
    Task,
    check_model_id,
    check_version,
)
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy, default_routing

if TYPE_CHECKING:
    from phoenix_ml.infrastructure.formats.parity import Conversion

STAGES = [stage.value for stage in Stage]
STRATEGIES = [strategy.value for strategy in Strategy if strategy is not Strategy.PINNED]


@main.group()
def models() -> None:
    """Versions of models: register, promote, activate, route."""


@models.command("register")
@click.argument("artifact", metavar="PATH")
@click.option(
    "--id", "model_id", required=True, callback=checked_by(check_model_id), help="The model's name."
)
@click.option(
    "--version", required=True, callback=checked_by(check_version), help="Semantic version, such as 1.0.0."
)
@click.option("--stage", type=click.Choice(STAGES), default="dev", show_default=True)
@click.option(
    "--features", type=click.Path(exists=True, path_type=Path), help="Feature contract, a JSON file."
)
@click.option(
    "--task",
    type=click.Choice([task.value for task in Task]),
    help="Where the graph is unclear; 'tensors' takes it as it is, for /v2 alone.",
)
@click.option(
    "--framework",
    type=click.Choice([framework.value for framework in Framework]),
    default=Framework.ONNX.value,
    show_default=True,
    help="tensorrt runs it by TensorRT where there is a GPU, else by ONNX Runtime.",
)
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Training rows (.csv, .parquet) for the baseline."
)
@click.option("--time", help="The rows' column that orders them in time; it need be no feature.")
@click.option("--outcome", help="The rows' column with the truth; it need be no feature.")
@click.option(
    "--sample",
    type=click.Path(path_type=Path),
    help="Rows (.csv, .parquet) that a model which is no ONNX must answer as before; else the reference.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-4,
    show_default=True,
    help="How far its answers to the sample may move.",
)
@click.option("--trust", is_flag=True, help="Open a pickle, which runs whatever code it holds.")
@click.option("--tracking-uri", help="Where MLflow keeps models:/… (MLFLOW_TRACKING_URI).")
@click.option("--activate", is_flag=True, help="Let it answer requests at once.")
@data_option
@json_option
@example(
    "phoenix-ml models register model.onnx --id credit-risk --version 1.0.0 --reference train.parquet --activate"
)
def models_register(
    artifact: str,
    model_id: str,
    version: str,
    stage: str,
    features: Path | None,
    task: str | None,
    framework: str,
    reference: Path | None,
    time: str | None,
    outcome: str | None,
    sample: Path | None,
    tolerance: float,
    trust: bool,
    tracking_uri: str | None,
    activate: bool,
    data: Path | None,
    as_json: bool,
) -> None:
    """Register a model as a version: stored, checked, loaded and run, over the reference if there is one.

    PATH is an ONNX file; or a model of scikit-learn (.joblib, .pkl), XGBoost (.json, .ubj) or LightGBM (.txt), which
    is converted to ONNX and must answer a sample as before; or one of MLflow: its folder, or models:/NAME@ALIAS.
    """
    from phoenix_ml.application.catalogue import Reference, Registration, notes_on, register
    from phoenix_ml.application.catalogue import activate as activate_version
    from phoenix_ml.application.reports import describe_version
    from phoenix_ml.infrastructure.formats.convert import Wanted, check_trust, convert, needs_conversion
    from phoenix_ml.infrastructure.tables import read_columns

    contract = {} if features is None else read_contract(features)
    if reference is None and sample is None and (time or outcome):
        raise click.UsageError("--time and --outcome name columns of --reference or --sample")
    conversion = None
    with opened(data, may_create=True) as phoenix, TemporaryDirectory() as folder:
        path = _locate(artifact, Path(folder), tracking_uri)
        with working(f"registering {model_id} {version}"):
            reference_columns = None if reference is None else read_columns(reference)
            if needs_conversion(path):
                sample_columns = reference_columns if sample is None else read_columns(sample)
                if sample_columns is None:
                    raise click.UsageError(
                        f"{path.name} is converted to ONNX: give --sample, with rows that it must answer as before"
                    )
                if task is not None:
                    raise click.UsageError(f"--task is for ONNX files: {path.name} says itself what it is")
                if check_trust(path, trust):
                    warn(f"{path.name} is a pickle: opening it runs whatever code it holds, as you")
                left_out = [name for name in (time, outcome) if name is not None]
                wanted = Wanted(sample_columns, left_out, tolerance, contract, trust)
                path, contract, conversion = convert(path, wanted, phoenix.engines, Path(folder))
                for note in conversion.notes:
                    warn(note)
            elif sample is not None or trust:
                raise click.UsageError(
                    f"--sample and --trust are for models to convert, {path.name} is taken as ONNX"
                )
            registered = register(
                phoenix.registry,
                phoenix.artifacts,
                phoenix.engines,
                path,
                Registration(model_id, version, Stage(stage), contract, task, Framework(framework)),
                actor=actor(),
                reference=None if reference_columns is None else Reference(reference_columns, time, outcome),
            )
            if activate:
                registered = activate_version(
                    phoenix.registry, phoenix.artifacts, phoenix.engines, model_id, version, actor=actor()
                )
    notes = notes_on(registered.metadata)
    for note in notes:
        tell(note)
    if as_json:
        told = {"notes": notes} if conversion is None else {"notes": notes, "conversion": conversion}
        show_json(describe_version(registered) | told)
    else:
        show_version(registered, conversion=conversion)


def read_contract(path: Path) -> dict[str, FeatureRule]:
    """The feature contract in a file. Raises InvalidField, naming the file and what is wrong with it."""
    from phoenix_ml.infrastructure.http.codec import decode_json

    try:
        return decode_json(path.read_bytes(), dict[str, FeatureRule])
    except MalformedBody as exc:
        raise MalformedBody(
            f"{path} is no feature contract, which is a file of JSON: {exc.__cause__}"
        ) from exc
    except InvalidField as exc:
        raise InvalidField(f"{path}: {exc.message}", field="features") from exc
    except OSError as exc:
        raise InvalidField(f"{path} cannot be read: {exc.strerror}", field="features") from exc


def _locate(artifact: str, folder: Path, tracking_uri: str | None) -> Path:
    """The model's file, fetched into the folder where MLflow has it."""
    from phoenix_ml.infrastructure.formats import mlflow

    if artifact.startswith(mlflow.SCHEME):
        return mlflow.fetch(artifact, folder, tracking_uri)
    path = Path(artifact)
    if mlflow.is_folder(path):
        return mlflow.find_file(path, folder)
    if not path.exists():
        raise click.BadParameter(f"there is no file {artifact!r}", param_hint="PATH")
    if path.is_dir():
        raise click.BadParameter(f"{artifact!r} is a folder, and has no MLmodel", param_hint="PATH")
    return path


def show_version(
    version: ModelVersion, *, baseline: bool = False, conversion: "Conversion | None" = None
) -> None:
    console = Console()
    console.print(_state_of(version))
    console.print(
        f"[dim]{version.metadata.task}, {version.metadata.runtime}, sha256 {version.sha256[:16]}…[/]"
    )
    if conversion is not None:
        labels = conversion.labels_differing
        differing = "" if labels is None else f", {labels} label{'' if labels == 1 else 's'} differ"
        console.print(
            f"[dim]converted from {conversion.source}: {conversion.rows} rows answered as before, "
            f"largest difference {conversion.max_difference:.2g}{differing}[/]",
            highlight=False,
        )
    if version.metadata.task is Task.TENSORS:
        _show_tensors(version.metadata, console)
        return
    table = Table("feature", "type", "default", "max age", "meaning", box=None)
    for name in version.metadata.features:
        rule = version.metadata.contract[name]
        required = isinstance(rule.default, msgspec.UnsetType)
        age = "" if rule.max_age_s is None else f"{rule.max_age_s:g} s"
        default = "[dim]required[/]" if required else json.dumps(rule.default)
        table.add_row(name, rule.type, default, age, rule.description)
    console.print(table)
    if baseline:
        show_json(version.metadata.baseline)


def show_state(version: ModelVersion, as_json: bool) -> None:
    """One line of what may change about a version; in JSON all of it."""
    from phoenix_ml.application.reports import describe_version

    if as_json:
        show_json(describe_version(version))
    else:
        Console().print(_state_of(version))


def _state_of(version: ModelVersion) -> str:
    state = "[green]active[/]" if version.is_active else "inactive"
    return f"[bold]{version.model_id} {version.version}[/]  {version.stage}  {state}"


def _show_tensors(metadata: Metadata, console: Console) -> None:
    from phoenix_ml.application.infer import describe_shape

    why = f": {metadata.not_tabular}" if metadata.not_tabular else ""
    console.print(f"[yellow]Answers to /v2 alone, not to /predict[/]{escape(why)}")
    table = Table("tensor", "type", "shape", box=None)
    for kind, specs in (("input", metadata.signature.inputs), ("output", metadata.signature.outputs)):
        for spec in specs:
            table.add_row(f"[dim]{kind}[/] {escape(spec.name)}", spec.type, escape(str(describe_shape(spec))))
    console.print(table)


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
        place = place_of(phoenix)
    if as_json:
        show_json([describe_version(version) for version in versions])
        return
    if not versions:
        click.echo(
            f"no model is registered yet {place}: phoenix-ml models register PATH --id ID --version V --activate"
        )
        return
    table = Table("model", "version", "stage", "active", "role", "task", "registered", box=None)
    for version in versions:
        routing = routings.get(version.model_id)
        if routing is not None:
            roles = [f"{a.role} {a.weight:g}" for a in routing.arms if a.version == version.version]
        else:
            found = default_routing(v for v in versions if v.model_id == version.model_id and v.is_active)
            roles = ["champion (default)"] if found and found.versions == (version.version,) else []
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
        show_version(one, baseline=baseline)


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
        changed = phoenix.registry.set_stage(model_id, version, Stage(stage), actor())
    show_state(changed, as_json)


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
    show_state(activated, as_json)


@models.command("deactivate")
@click.argument("model_id")
@click.argument("version")
@data_option
@json_option
@example("phoenix-ml models deactivate credit-risk 1.0.0")
def models_deactivate(model_id: str, version: str, data: Path | None, as_json: bool) -> None:
    """Take a version out of service."""
    with opened(data) as phoenix:
        changed = phoenix.registry.set_active(model_id, version, False, actor())
    show_state(changed, as_json)


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

    with opened(data, may_create=bool(changes)) as phoenix:
        if changes:
            parsed = dict(map(parse_setting, changes))
            settings = phoenix.monitoring.change_settings(model_id, parsed, actor())
        else:
            if model_id != ALL_MODELS:
                phoenix.registry.check_model(model_id)
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

    if clear and (arms or strategy or salt):
        raise click.UsageError(
            "--clear goes back to the default routing: leave out versions, --strategy and --salt"
        )
    if (strategy or salt) and not arms:
        raise click.UsageError(
            "--strategy and --salt say how versions share requests: name these, such as 1.0.0=90 1.1.0=10"
        )
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
            raise click.BadParameter(f"{word!r}: write VERSION=WEIGHT, such as 1.0.0=90") from None
    return Routing(chosen, tuple(parsed), salt)
