"""``phoenix-ml demo``: the platform at work on real credit applications, with no server to install."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx
import numpy as np
from msgspec import convert
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from phoenix_ml.application.catalogue import Reference, Registration, activate, register, set_routing
from phoenix_ml.application.features import load_features, packed_signatures
from phoenix_ml.application.ports import LoggedPrediction, PredictionQuery
from phoenix_ml.bootstrap import Phoenix, bootstrap, open_features
from phoenix_ml.demo.training import MODEL_NAME, CreditData, Training, train
from phoenix_ml.domain.errors import Misconfigured, ServerUnreachable
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.models import Stage
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy
from phoenix_ml.infrastructure.tables import open_table, read_columns
from phoenix_ml.processes.supervisor import sole_supervisor
from phoenix_ml.settings import fixed_settings

_MARKER = "made-by-phoenix-demo"
_CLIENTS = 4
_START_DEADLINE_S = 60.0
_LOG_DEADLINE_S = 30.0
_ENDING = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Replayed:
    """What the clients saw: the prediction id of each held-out applicant, and each call's milliseconds."""

    predictions: dict[str, str]
    latencies_ms: list[float]
    seconds: float


def run_demo(data: Path, port: int, exit_after: bool, console: Console | None = None) -> int:
    """The exit code; ends after the report with ``exit_after``, else with Ctrl-C."""
    end_in_order()
    console = console or Console()
    renew(data)
    console.rule("[bold]Phoenix ML[/] — credit applications, two models, one A/B test")
    with console.status("training two models on 3,118 applications …"):
        training = train(data / "training", lambda step: console.print(f"  [dim]{step}[/]"))
    # Only the demo's own folder, whatever databases and stores the caller's settings name.
    phoenix = bootstrap(fixed_settings(data=data.absolute()))
    phoenix.database.upgrade_if_embedded()
    with console.status("registering both versions, loading the features of all applicants …"):
        _register_versions(phoenix, training)
        loaded = asyncio.run(_load_features(phoenix, training))
    console.print(
        "registered [bold]1.0.0[/] (champion) and [bold]1.1.0[/] (challenger), half of the traffic each"
    )
    console.print(f"loaded the features of [bold]{loaded:,}[/] applicants, cust_0001 …")
    with running_server(phoenix, free_port(port, console), console) as url:
        replayed = asyncio.run(_replay(url, training.data, console))
        asyncio.run(_send_outcomes(url, training.data, replayed))
        rows = _await_log(phoenix, len(replayed.predictions))
        _report(console, training.data, replayed, rows)
        _point_on(console, None if exit_after else url, data, rows[0])
        if not exit_after:
            console.print("\nStill serving. [bold]Ctrl-C[/] stops it.")
            wait_for_interrupt()
    phoenix.database.close()
    return 0


def end_in_order() -> None:
    """Has the signals that would end the demo at once unwind it instead, so that its server ends too."""

    def end(received: int, _: FrameType | None) -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + received)

    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, end)


def renew(data: Path) -> None:
    """An empty folder. Only one that an earlier demo made, and that nobody serves now, is removed."""
    if data.exists() and any(data.iterdir()):
        if not (data / _MARKER).exists():
            raise Misconfigured(f"{data} exists and was not made by the demo: give another --data")
        with sole_supervisor(data / "run"):
            shutil.rmtree(data)
    data.mkdir(parents=True, exist_ok=True)
    (data / _MARKER).touch()


def _register_versions(phoenix: Phoenix, training: Training) -> None:
    contract = convert(json.loads(training.contract_path.read_text()), dict[str, FeatureRule])
    reference = read_columns(training.reference_path)
    for trained, stage in zip(training.versions, (Stage.PROD, Stage.STAGING), strict=True):
        registration = Registration(MODEL_NAME, trained.version, stage, contract)
        register(
            phoenix.registry,
            phoenix.artifacts,
            phoenix.engines,
            trained.onnx_path,
            registration,
            actor="demo",
            reference=Reference(reference),
        )
        activate(
            phoenix.registry, phoenix.artifacts, phoenix.engines, MODEL_NAME, trained.version, actor="demo"
        )
    champion, challenger = (trained.version for trained in training.versions)
    arms = (Arm(champion, Role.CHAMPION, 50), Arm(challenger, Role.CHALLENGER, 50))
    set_routing(phoenix.registry, MODEL_NAME, Routing(Strategy.AB_TEST, arms), actor="demo")


async def _load_features(phoenix: Phoenix, training: Training) -> int:
    store = open_features(phoenix.settings)
    try:
        with open_table(training.features_path) as table:
            signatures = packed_signatures(phoenix.registry.list_versions())
            return await load_features(store, table.batches, "entity_id", lambda *_: None, signatures)
    finally:
        await store.close()


def free_port(wanted: int, console: Console) -> int:
    """The wanted port, or any free one where another program has it, which is said."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            taken = int(probe.getsockname()[1])
            if wanted not in (0, taken):
                console.print(f"port {wanted} is in use, taking {taken}", highlight=False)
            return taken
    raise Misconfigured("no TCP port is free")


@contextmanager
def running_server(phoenix: Phoenix, port: int, console: Console) -> Iterator[str]:
    """The base URL of a real server, ``phoenix-ml serve``; it is stopped at the end of the block."""
    url = f"http://127.0.0.1:{port}"
    data = phoenix.settings.data
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("PHOENIX_")}
    environment = inherited | phoenix.settings.environment()
    command = [sys.executable, "-m", "phoenix_ml.cli", "serve", "--port", str(port), "--data", str(data)]
    log_path = data / "serve.log"
    with log_path.open("w") as log:
        started = time.monotonic()
        # A session of its own: Ctrl-C ends the demo, which then stops the server in order. And a folder of
        # its own: in the caller's there may be a phoenix.toml.
        server = subprocess.Popen(  # noqa: S603
            command, stdout=log, stderr=log, env=environment, cwd=data, start_new_session=True
        )
        try:
            _await_ready(url, server, log_path)
            console.print(
                f"[bold]phoenix-ml serve[/] was ready after {time.monotonic() - started:.1f} s at {url}"
            )
            yield url
        finally:
            server.terminate()
            server.wait()


def _await_ready(url: str, server: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise ServerUnreachable(f"the server did not start; its log, {log_path}:\n{log_path.read_text()[-2000:]}")


async def _replay(url: str, data: CreditData, console: Console) -> Replayed:
    """Asks for a prediction for every held-out applicant, as several clients at once."""
    waiting = [data.ids[row] for row in reversed(data.held_out)]
    predictions: dict[str, str] = {}
    latencies_ms: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("replaying held-out applicants", total=len(waiting))

        async def ask() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                while waiting:
                    entity_id = waiting.pop()
                    asked_at = time.perf_counter()
                    response = await client.post(
                        "/predict", json={"model_id": MODEL_NAME, "entity_id": entity_id}
                    )
                    latencies_ms.append((time.perf_counter() - asked_at) * 1000)
                    response.raise_for_status()
                    predictions[entity_id] = response.json()["prediction_id"]
                    bar.advance(task)

        await asyncio.gather(*(ask() for _ in range(_CLIENTS)))
    return Replayed(predictions, latencies_ms, time.perf_counter() - started)


async def _send_outcomes(url: str, data: CreditData, replayed: Replayed) -> None:
    """Tells the truth about each applicant, as a bank would learn it later."""
    feedback = [
        {"prediction_id": replayed.predictions[data.ids[row]], "outcome": data.outcomes[row]}
        for row in data.held_out
    ]
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for start in range(0, len(feedback), 200):
            response = await client.post("/feedback", json=feedback[start : start + 200])
            response.raise_for_status()


def _await_log(phoenix: Phoenix, expected: int) -> list[LoggedPrediction]:
    """All rows of the prediction log, once every prediction and outcome has arrived there."""
    deadline = time.monotonic() + _LOG_DEADLINE_S
    while True:
        rows: list[LoggedPrediction] = []
        cursor: str | None = None
        while True:
            page, cursor = phoenix.prediction_log.page(PredictionQuery(MODEL_NAME, limit=500, cursor=cursor))
            rows += page
            if cursor is None:
                break
        if len(rows) == expected and all(row.outcome is not None for row in rows):
            return rows
        if time.monotonic() > deadline:
            raise ServerUnreachable(f"only {len(rows)} of {expected} predictions reached the log")
        time.sleep(0.1)


def version_table(rows: Sequence[LoggedPrediction], title: str | None = None) -> Table:
    """Accuracy and AUC by version, of logged answers that all have an outcome."""
    from sklearn.metrics import accuracy_score, roc_auc_score

    by_version = Table(title=title, title_justify="left", box=None)
    for heading in ("version", "answers", "accuracy", "AUC"):
        by_version.add_column(heading, justify="right")
    for version in sorted({row.model_version for row in rows}):
        answered = [row for row in rows if row.model_version == version]
        truth = [row.outcome for row in answered]
        accuracy = accuracy_score(truth, [row.result for row in answered])
        good = [row.probabilities[1] for row in answered if row.probabilities]
        auc = roc_auc_score([outcome == "good" for outcome in truth], good)
        by_version.add_row(version, str(len(answered)), f"{accuracy:.3f}", f"{auc:.3f}")
    return by_version


def _report(console: Console, data: CreditData, replayed: Replayed, rows: list[LoggedPrediction]) -> None:
    few = Table(title="\nA few answers, from the prediction log", title_justify="left", box=None)
    for heading in ("applicant", "version", "role", "answer", "confidence", "outcome", ""):
        few.add_column(heading, justify="right" if heading == "confidence" else "left")
    for row in rows[:6]:
        right = "[green]right[/]" if row.result == row.outcome else "[red]wrong[/]"
        role = row.route["role"]
        few.add_row(
            row.entity_id, row.model_version, role, row.result, f"{row.confidence:.3f}", row.outcome, right
        )
    console.print(few)
    console.print(version_table(rows, "\nBy version, from the same log"))
    server_ms = [row.latency_ms for row in rows]
    console.print(
        f"\n{len(rows):,} answers in {replayed.seconds:.1f} s by {_CLIENTS} clients on this machine; each is in "
        "the log once, with its outcome"
    )
    for name, values in (("in the server", server_ms), ("seen by the clients", replayed.latencies_ms)):
        p50, p99 = np.percentile(values, [50, 99])
        console.print(f"  {name:20} p50 {p50:6.2f} ms   p99 {p99:6.2f} ms")


def _point_on(console: Console, url: str | None, data: Path, row: LoggedPrediction) -> None:
    phoenix_ml = typed_command()
    served = (
        ()
        if url is None
        else (
            f"open {url}/docs",
            f"curl {url}/metrics",
            f"{phoenix_ml} predict {MODEL_NAME} --entity cust_0042 --url {url}",
        )
    )
    point_on(
        console,
        *served,
        f"{phoenix_ml} predictions show {row.id} --data {data}",
        f"{phoenix_ml} models list --data {data}",
        f"{phoenix_ml} models routing {MODEL_NAME} 1.0.0=90 1.1.0=10 --strategy canary --data {data}",
        *(() if served else (f"{phoenix_ml} serve --data {data}",)),
    )


def point_on(console: Console, *commands: str) -> None:
    """Prints what to type next; what needs the server is for as long as it serves on."""
    console.print("\n[bold]Where to look next[/]")
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)


def typed_command() -> str:
    """How a person types our command here: `make demo` does not put its virtual environment on the PATH."""
    own = Path(sys.executable).with_name("phoenix-ml")
    found = shutil.which("phoenix-ml")
    # Another one may be on the PATH: of another installation, or of another program.
    return "phoenix-ml" if found is not None and Path(found).absolute() == own else os.path.relpath(own)


def wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
