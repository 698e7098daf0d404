"""What all commands share: the group, options, how they open the application and print."""

import asyncio
import getpass
import inspect
import json
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from phoenix_ml import __version__
from phoenix_ml.bootstrap import Phoenix, bootstrap
from phoenix_ml.domain.errors import InvalidField, PhoenixError
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.settings import load_settings, misspelt_variables

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
    if ctx.invoked_subcommand not in ("serve", "doctor"):  # they say it in their own way
        for name, near in misspelt_variables(os.environ).items():
            say("warning", f"{name} is not a setting and is ignored: is {near} meant?")


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


def say(kind: str, message: str) -> None:
    """One line on standard error, however long it is: what is no error, but should be known."""
    err.print(f"[yellow]{kind}[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)


def show_json(content: Any) -> None:
    click.echo(json.dumps(msgspec.to_builtins(content), indent=2, ensure_ascii=False))


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
