"""``events``: dead letters."""

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from phoenix_ml.bootstrap import open_dead_letters
from phoenix_ml.cli.common import counted, data_option, example, json_option, main, print_wide, show_json
from phoenix_ml.settings import load_settings


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
        click.echo(f"{counted(requeued, 'event')} on the way to the log again")
