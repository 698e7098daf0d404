"""What all commands share: the group, options, how they open the application and print."""

import asyncio
import getpass
import inspect
import json
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from phoenix_ml import __version__
from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.errors import (
    IncidentUnknown,
    InvalidField,
    Misconfigured,
    ModelUnknown,
    PhoenixError,
    PredictionUnknown,
)
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.settings import Settings, load_settings, misspelt_variables

T = TypeVar("T")
err = Console(stderr=True)


class PhoenixGroup(click.Group):
    """Shows our errors as one line and exits with 1; anything else is a defect and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PhoenixError as exc:
            err.print(f"[bold red]error[/] [dim]{exc.code}[/] ", end="")
            err.print(exc.message, markup=False, highlight=False, soft_wrap=True)
            ctx.exit(1)


def example(text: str) -> Callable[[T], T]:
    """Puts an example at the end of a command's help, as it is to be typed."""

    def add(command: T) -> T:
        command.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n\b\nExample:\n  {text}"
        return command

    return add


def _folder(_: click.Context, parameter: click.Parameter, name: str | None) -> Path | None:
    if name == "":  # a variable that is not set; it would be the current folder
        raise click.BadParameter("it is empty", param=parameter)
    return None if name is None else Path(name)


data_option = click.option(
    "--data", type=click.Path(), callback=_folder, help="Folder of all that is stored (PHOENIX_DATA)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _base_url(_: click.Context, parameter: click.Parameter, url: str | None) -> str | None:
    if url is not None and not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{url!r}: write http://HOST:PORT or https://HOST:PORT", param=parameter)
    return url


url_option = click.option(
    "--url",
    callback=_base_url,
    help="Base URL of a running server; else that of PHOENIX_HOST and PHOENIX_PORT.",
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
    if ctx.invoked_subcommand not in ("serve", "doctor"):  # they say it in their own way
        for name, near in misspelt_variables(os.environ).items():
            warn(f"{name} is not a setting and is ignored: is {near} meant?")


def warn(message: str) -> None:
    """Says it on standard error, in one line."""
    err.print("[yellow]warning[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)


def tell(message: str) -> None:
    """As ``warn``, what is no fault but should be known."""
    err.print("[yellow]note[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def opened(data: Path | None, *, may_create: bool = False) -> Iterator[Phoenix]:
    """The application with its database; one of an older version is left to who serves it to upgrade.

    Where nothing was stored yet it is empty, and only a command that ``may_create`` the data folder does so: who looks
    in the wrong place leaves nothing there.
    """
    settings = load_settings(data=data)
    with nullcontext(settings) if may_create else looked_at(settings) as found:
        phoenix = replace(bootstrap(found), settings=settings)
        try:
            phoenix.database.upgrade_if_new()
            yield phoenix
        except (ModelUnknown, PredictionUnknown, IncidentUnknown) as exc:
            exc.message += f"; looked {place_of(phoenix)}"
            raise
        finally:
            phoenix.close()


@contextmanager
def looked_at(settings: Settings) -> Iterator[Settings]:
    """The settings, with an empty data folder for as long as it takes where there is none."""
    if settings.data.exists():
        yield settings
        return
    with TemporaryDirectory() as folder:
        yield settings.model_copy(update={"data": Path(folder)})


def place_of(phoenix: Phoenix) -> str:
    """Where commands look, and what says so."""
    if phoenix.settings.database:
        return f"in {phoenix.database.name} (PHOENIX_DATABASE)"
    return folder_of(phoenix.settings)


def folder_of(settings: Settings) -> str:
    here = "" if settings.data.is_absolute() else " of this folder"
    return f"in {settings.data}{here} (--data or PHOENIX_DATA say where)"


def server_url(url: str | None) -> str:
    """The URL that was given, else where a server with these settings listens. Raises Misconfigured."""
    if url is not None:
        return url
    settings = load_settings()
    if not settings.port:
        raise Misconfigured("PHOENIX_PORT is 0, so that the server takes a free port: give its --url")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - not to listen
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def actor() -> str:
    """Who types, for the audit log."""
    try:
        return f"cli {getpass.getuser()}"
    except (KeyError, OSError):  # a container may run under a user id without a name
        return "cli"


def show_json(content: Any) -> None:
    click.echo(json.dumps(msgspec.to_builtins(content), indent=2, ensure_ascii=False))


def counted(number: int, noun: str, plural: str = "") -> str:
    """The number with its noun.

    >>> counted(1, "row"), counted(1200, "row"), counted(0, "entity", "entities")
    ('1 row', '1,200 rows', '0 entities')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Shows on a terminal that something goes on, until it has ended. What is printed meanwhile goes to standard error."""
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        progress.add_task(escape(doing), total=None)
        yield


def print_wide(table: Table) -> None:
    """Prints a table whose cells are there to be copied: a terminal folds lines, rich would cut cells."""
    Console(width=max(Console().width, 150)).print(table)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def watched_version(phoenix: Phoenix, model_id: str, model_version: str | None) -> ModelVersion:
    """The version asked for, else the one that answers first."""
    from phoenix_ml.application.retraining import answering_version

    if model_version is not None:
        return phoenix.registry.get(model_id, model_version)
    return answering_version(phoenix.registry, model_id)


def checked_by(check: Callable[[str], None]) -> Callable[[click.Context, click.Parameter, str], str]:
    """An option's callback: what the check refuses is wrong usage."""

    def call(_: click.Context, __: click.Parameter, value: str) -> str:
        try:
            check(value)
        except InvalidField as exc:
            raise click.BadParameter(exc.message) from exc
        return value

    return call


def parse_value(word: str) -> tuple[str, Any]:
    name, separator, text = word.partition("=")
    if not separator or not name:
        raise click.BadParameter(f"{word!r}: write NAME=VALUE, such as income=2100")
    try:
        value = msgspec.json.decode(text.encode(), type=float | int | bool | str | None)
    except msgspec.DecodeError:
        value = text
    return name, value
