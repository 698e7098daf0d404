"""``phoenix-ml serve``: N API processes on one socket, one background process, none of them missed."""

import fcntl
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from phoenix_ml.bootstrap import Phoenix
from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.extras import install
from phoenix_ml.infrastructure.telemetry import catalogue
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter, clear
from phoenix_ml.settings import UPLOAD_PREFIX, Settings, misspelt_variables

log = logging.getLogger(__name__)
_SHORT_LIFE_S = 10.0
_SHORT_LIVES = 5
_LONGEST_PAUSE_S = 5.0
_LOG_STOP_S = 30.0
_LOOK_EVERY_S = 0.1


class Child:
    """One supervised process and how it has fared."""

    def __init__(self, slot: str, module: str, descriptors: tuple[int, ...]) -> None:
        self.slot = slot
        self.restart_at = 0.0
        self.is_ready = False
        self._module = module
        self._descriptors = descriptors
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._short_lives = 0
        self.ready_fd = -1

    def start(self, environment: dict[str, str]) -> None:
        self.ready_fd, ready_end = os.pipe()
        passed = (*self._descriptors, ready_end)
        arguments = [sys.executable, "-m", self._module, self.slot, *(str(fd) for fd in passed)]
        # A session of its own: Ctrl-C reaches the supervisor alone, which stops the rest in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own modules
            arguments, env=environment, pass_fds=passed, start_new_session=True
        )
        os.close(ready_end)
        self.is_ready = False
        self._started_at = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else -1

    def exit_code(self) -> int | None:
        """None while the process lives."""
        return self._process.poll() if self._process is not None else None

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, deadline: float) -> None:
        """Returns when the process has ended; it is killed at the deadline."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("%s does not stop and is killed", self.slot)  # noqa: TRY400
            self._process.kill()
            self._process.wait()

    def plan_restart(self) -> bool:
        """Whether the process deserves another start; sets when: at once, later if it keeps dying young."""
        now = time.monotonic()
        self._short_lives = self._short_lives + 1 if now - self._started_at < _SHORT_LIFE_S else 0
        self._process = None
        self.restart_at = now + (
            min(_LONGEST_PAUSE_S, 0.1 * 2 ** min(self._short_lives, 10)) if self._short_lives > 1 else 0.0
        )
        return self._short_lives < _SHORT_LIVES or self.is_ready


def supervise(phoenix: Phoenix, announce: Callable[[str, str | None], None]) -> int:
    """The exit code: 0 after a stop that was asked for, 1 when a process cannot be kept alive.

    ``announce`` gets the base URL, and gRPC's address if it is served, once every process is ready. Raises Misconfigured for an address that
    cannot be had and for a data folder that is being served already.
    """
    settings = phoenix.settings
    check_address(settings)
    for name, near in misspelt_variables(os.environ).items():
        log.warning("%s is not a setting and is ignored: is %s meant?", name, near)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopping.append(received))
    with ExitStack() as stack:
        stack.enter_context(sole_supervisor(settings.run_folder))
        phoenix.database.upgrade_if_embedded()
        _outwait_earlier_processes(settings, stopping)
        if stopping:
            return 0
        _remove_abandoned_uploads(settings.data)
        metrics = stack.enter_context(MetricsWriter(settings.metrics_folder / "supervisor.mmap"))
        listener = stack.enter_context(_listen(settings))
        host, port = listener.getsockname()[:2]
        lifeline, held_end = os.pipe()
        stack.callback(os.close, held_end)
        environment = os.environ | settings.environment() | {"PHOENIX_PORT": str(port)}
        grpc_address = None
        if settings.grpc_port >= 0:
            grpc_address = _address(host, stack.enter_context(_hold_grpc_port(settings)).getsockname()[1])
            environment["PHOENIX_GRPC_PORT"] = grpc_address.rpartition(":")[2]
        apis = [
            Child(f"api-{n}", "phoenix_ml.processes.api", (listener.fileno(), lifeline))
            for n in range(settings.workers)
        ]
        background = (
            [Child("background", "phoenix_ml.processes.background", (lifeline,))]
            if settings.background_roles
            else []
        )
        children = [*background, *apis]
        for child in children:
            child.start(environment)
        url = f"http://{_address(host, port)}"
        code = _watch(children, environment, metrics, stopping, lambda: announce(url, grpc_address))
        # Callers that come now are refused at once: held open, it would let them wait for nobody.
        listener.close()
        _stop(apis, background, settings)
    return code


def check_address(settings: Settings) -> None:
    """Raises Misconfigured for an address that others reach, unless that is asked for; then warns."""
    if settings.is_loopback:
        return
    if not settings.insecure:
        raise Misconfigured(
            f"{settings.host} can be reached from other machines and Phoenix has no API keys yet: listen on "
            "127.0.0.1, or say --insecure if the network is yours alone",
            setting="PHOENIX_HOST",
        )
    log.critical("INSECURE: whoever reaches %s may predict, register and change models", settings.host)


def _outwait_earlier_processes(settings: Settings, stopping: list[int]) -> None:
    """Returns when no API process of an earlier supervisor is left, or when a signal has come.

    One that was killed leaves processes behind that answer what they had accepted, and until then they keep
    the port and their metrics. Their last state is forgotten. Raises Misconfigured when they stay.
    """
    patience_s = settings.stop_timeout_s + 5
    deadline = time.monotonic() + patience_s
    is_said = False
    while not stopping:
        left = ", ".join(slot for slot in clear(settings.metrics_folder) if slot.startswith("api-"))
        if not left:
            return
        if time.monotonic() > deadline:
            raise Misconfigured(
                f"{left} of an earlier 'serve' on {settings.data} did not end within {patience_s} s: end what "
                f"'fuser {settings.metrics_folder}/api-*.mmap' names, and start again"
            )
        if not is_said:
            log.warning("waiting up to %d s until %s of an earlier 'serve' has ended", patience_s, left)
            is_said = True
        time.sleep(_LOOK_EVERY_S)


def _remove_abandoned_uploads(data: Path) -> None:
    """Frees the space that uploads hold whose process was killed; no other can be in work now."""
    for folder in data.glob(f"{UPLOAD_PREFIX}*"):
        try:
            shutil.rmtree(folder)
        except OSError as exc:
            log.warning("%s, left by an earlier 'serve', cannot be removed: %s", folder, exc.strerror)


def _watch(
    children: list[Child],
    environment: dict[str, str],
    metrics: MetricsWriter,
    stopping: list[int],
    on_ready: Callable[[], None],
) -> int:
    """Restarts what dies, until a signal comes or a process cannot be kept alive.

    One that cannot work with these settings ends the start; once all were ready it is tried again like any
    other, for the rest of the server is of use without it.
    """
    selector = selectors.DefaultSelector()
    for child in children:
        selector.register(child.ready_fd, selectors.EVENT_READ, child)
    announced = False
    while not stopping:
        for key, _ in selector.select(0.1):
            child = key.data
            child.is_ready = os.read(key.fd, 1) == b"+"
            selector.unregister(key.fd)
            os.close(key.fd)
        if not announced and all(child.is_ready for child in children):
            on_ready()
            announced = True
        for child in children:
            code = child.exit_code()
            if code is not None:
                log.error("%s ended by itself with code %d", child.slot, code)
                if code == os.EX_CONFIG and not announced:
                    log.error("%s would fail again; its own message above says why", child.slot)
                    return 1
                metrics.counter(catalogue.PROCESS_RESTARTS, slot=child.slot).add()
                if not child.plan_restart():
                    log.error("%s cannot be kept alive; its own messages above say why", child.slot)
                    return 1
            if child.pid == -1 and time.monotonic() >= child.restart_at:
                child.start(environment)
                selector.register(child.ready_fd, selectors.EVENT_READ, child)
    return 0


def _stop(apis: list[Child], background: list[Child], settings: Settings) -> None:
    """First the API processes, so that the background process finds finished journals."""
    deadline = time.monotonic() + settings.stop_timeout_s + 5
    for child in apis:
        child.signal(signal.SIGTERM)
    for child in apis:
        child.wait(deadline)
    for child in background:
        child.signal(signal.SIGTERM)
        child.wait(time.monotonic() + _LOG_STOP_S)


@contextmanager
def sole_supervisor(run_folder: Path) -> Iterator[None]:
    """Within the block nobody else serves the folder. Raises Misconfigured when somebody does already."""
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / "serve.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.seek(0)
            raise Misconfigured(
                f"{run_folder.parent} is being served already by process {file.read().strip()}: stop it, or "
                "give another --data"
            ) from exc
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _address(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def _hold_grpc_port(settings: Settings) -> socket.socket:
    """A socket that has gRPC's port and never listens: every API process opens its own on it, before and after.

    Raises Misconfigured when gRPC is not installed, or the port is somebody else's.
    """
    if find_spec("grpc_reflection") is None:
        raise Misconfigured(
            f"PHOENIX_GRPC_PORT needs the libraries of gRPC: {install('grpc')}",
            setting="PHOENIX_GRPC_PORT",
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    wanted = (settings.host, settings.grpc_port)
    try:
        # Without the option first: with it, another server that has it too would share its calls with us.
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(wanted)
            wanted = alone.getsockname()[:2]
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(wanted)
    except OSError as exc:
        raise Misconfigured(
            f"gRPC cannot listen on {settings.host}:{settings.grpc_port}: {exc.strerror}; choose another --grpc-port",
            setting="PHOENIX_GRPC_PORT",
        ) from exc
    return held


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as exc:
        listener.close()
        raise Misconfigured(
            f"cannot listen on {settings.host}:{settings.port}: {exc.strerror}; choose another --port",
            setting="PHOENIX_PORT",
        ) from exc
    listener.listen(2048)
    return listener
