"""``features``: the feature store at the terminal."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from phoenix_ml.bootstrap import open_features
from phoenix_ml.cli.common import (
    counted,
    data_option,
    err,
    example,
    folder_of,
    json_option,
    looked_at,
    main,
    opened,
    parse_value,
    run_async,
    show_json,
    tell,
    warn,
)
from phoenix_ml.domain.errors import DatabaseUnavailable, EntityUnknown, InvalidField, PhoenixError
from phoenix_ml.settings import load_settings

if TYPE_CHECKING:
    from phoenix_ml.domain.features import PackedSignature

# A bulk command waits for the store as long as a person would, not as long as a request may.
_COMMAND_DEADLINE_MS = 5000.0


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
        click.echo(f"{counted(loaded, 'entity', 'entities')} loaded")


async def load_file(file: Path, entity: str, data: Path | None) -> int:
    from phoenix_ml.application.features import load_features
    from phoenix_ml.infrastructure.tables import open_table

    signatures, known = active_features(data)
    store = open_features(load_settings(data=data), _COMMAND_DEADLINE_MS)
    stored = 0
    try:
        with open_table(file, text_columns=[entity]) as table, Progress(console=err) as bar:
            if entity not in table.names:
                raise InvalidField(
                    f"{file.name} has no column {entity!r}; it has {', '.join(table.names)}", field="entity"
                )
            note_unknown([name for name in table.names if name != entity], known)
            task = bar.add_task(f"loading {file.name}", total=1.0)

            def show(share: float, loaded: int) -> None:
                nonlocal stored
                stored = loaded
                bar.update(task, completed=share)

            return await load_features(store, table.batches, entity, show, signatures)
    except PhoenixError as exc:
        if stored:
            exc.message += f"; the {stored} entities before it are stored"
        raise
    finally:
        await store.close()


def active_features(data: Path | None) -> tuple[Sequence["PackedSignature"], set[str]]:
    """The signatures of the active models, and the names of their features; none while the database cannot say."""
    from phoenix_ml.application.features import packed_signatures

    try:
        with opened(data) as phoenix:
            versions = phoenix.registry.list_versions()
    except DatabaseUnavailable as exc:
        warn(f"features are stored, but no rows are packed: {exc.message}")
        return (), set()
    return packed_signatures(versions), {
        name for v in versions if v.is_active for name in v.metadata.features
    }


def note_unknown(names: Sequence[str], known: set[str]) -> None:
    """Says which names are features of no active model: they may be for one to come, or misspelt."""
    strange = [name for name in names if name not in known]
    if not known or not strange:
        return
    near = {name: get_close_matches(name, sorted(known), 1) for name in strange}
    said = (f"{name} (is {near[name][0]} meant?)" if near[name] else name for name in strange)
    tell(f"no active model takes {', '.join(said)}")


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
        with looked_at(load_settings(data=data)) as settings:
            store = open_features(settings, _COMMAND_DEADLINE_MS)
            try:
                return await show_features(store, entity_id)
            except EntityUnknown as exc:
                if store.name == "sqlite":
                    exc.message += f"; looked {folder_of(load_settings(data=data))}"
                raise
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

    given = dict(parse_value(word) for word in values)
    signatures, known = active_features(data)
    note_unknown(list(given), known)

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
        click.echo(f"{counted(len(given), 'feature')} of {entity_id} written")
