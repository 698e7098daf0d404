"""compose.yaml and the files that it mounts. No container is started: there may be no engine here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_servers import DEPLOY, ROOT, program

from phoenix_ml.settings import Settings

EXAMPLE = (ROOT / ".env.example").read_text()
SECRETS = re.findall(r"^(\w+)=$", EXAMPLE, re.MULTILINE)
# A version that is complete: neither `latest`, nor a line that moves, such as `17`.
EXACT = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[a-z]+)?")

# The settings of the monitor that .env may have.
TOLD_BY_ENV = ("alerts", "trainer")


def _config(folder: Path, environment: str) -> subprocess.CompletedProcess[str]:
    file = folder / "settings.env"
    file.write_text(environment)
    compose = [
        program("docker-compose", "docker-compose"),
        "--env-file",
        str(file),
        "-f",
        str(ROOT / "compose.yaml"),
    ]
    return subprocess.run(
        [*compose, "config"],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What docker-compose makes of the file with the example's settings, its secrets filled in."""
    filled = "".join(
        f"{line}secret{line.count('=')}\n" if line.endswith("=") else f"{line}\n"
        for line in EXAMPLE.splitlines()
    )
    shown = _config(tmp_path_factory.mktemp("compose"), filled)
    assert shown.returncode == 0, shown.stderr
    found: dict[str, Any] = yaml.safe_load(shown.stdout)["services"]
    return found


@pytest.mark.parametrize("left_out", SECRETS)
def test_no_password_is_made_up(tmp_path: Path, left_out: str) -> None:
    """A secret that was not set stops everything, with words that say where to set it."""
    given = EXAMPLE.replace("=\n", "=secret\n").replace(f"{left_out}=secret\n", f"{left_out}=\n")

    shown = _config(tmp_path, given)

    assert shown.returncode == 1
    assert "set it in .env" in shown.stderr


def test_the_example_asks_for_every_secret() -> None:
    """It names what compose.yaml insists on, and leaves all of it empty."""
    required = re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yaml").read_text())

    assert (
        set(required)
        == set(SECRETS)
        == {
            "POSTGRES_PASSWORD",
            "GRAFANA_ADMIN_PASSWORD",
            "GRAFANA_DATABASE_PASSWORD",
        }
    )


def test_every_image_has_an_exact_version(services: dict[str, Any]) -> None:
    """The same images tomorrow as today; ours alone is built from the tree."""
    moving = {
        name: service["image"] for name, service in services.items() if not EXACT.fullmatch(service["image"])
    }

    assert set(moving.values()) == {"phoenix-ml:local"}
    assert {name for name, service in services.items() if "build" in service} == set(moving)


def test_every_service_is_kept_running_and_checked(services: dict[str, Any]) -> None:
    """All but what runs once is started again and says whether it is well."""
    once = {"migrate", "reader"}

    assert once == {name for name, service in services.items() if service["restart"] == "no"}
    assert once == {name for name, service in services.items() if "healthcheck" not in service}


def test_only_nginx_is_reachable_from_outside(services: dict[str, Any]) -> None:
    """The servers ask nobody for a key, so their ports stay inside; even nginx's are this machine's by default."""
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert set(published) == {"nginx", "prometheus", "grafana"}
    assert all(str(port).startswith("127.0.0.1:") for ports in published.values() for port in ports)
    insecure = {
        name for name, service in services.items() if "PHOENIX_INSECURE" in service.get("environment", {})
    }
    assert insecure == {"api-1", "api-2", "log", "monitor", "migrate"}
    inside_only = insecure - {"monitor"}  # which asks others, and publishes no port
    assert {frozenset(services[name]["networks"]) for name in inside_only} == {frozenset({"inside"})}


def test_the_monitor_reaches_whom_it_alerts_and_who_trains(tmp_path: Path) -> None:
    """What .env says of them gets there, and the way out is open; no other service is told the secrets."""
    named = {f"PHOENIX_{name.upper()}" for name in Settings.model_fields if name.startswith(TOLD_BY_ENV)}
    given = {name: f"{number}" for number, name in enumerate(sorted(named), 1000)}
    passwords = EXAMPLE.replace("=\n", "=secret\n")

    shown = _config(tmp_path, passwords + "".join(f"{name}={value}\n" for name, value in given.items()))

    assert shown.returncode == 0, shown.stderr
    services = yaml.safe_load(shown.stdout)["services"]
    got = {name: service.get("environment", {}).keys() & given for name, service in services.items()}
    assert {name for name, found in got.items() if found} == {"monitor"}
    assert given.items() <= services["monitor"]["environment"].items()
    assert services["monitor"]["networks"].keys() == {"inside", "outside"}
    offered = set(re.findall(r"^# (PHOENIX_(?:ALERTS|TRAINER)\w*)=", EXAMPLE, re.MULTILINE))
    assert offered == {
        "PHOENIX_ALERTS",
        "PHOENIX_ALERTS_SECRET",
        "PHOENIX_TRAINER",
        "PHOENIX_TRAINER_TOKEN",
    }


def test_what_is_not_in_env_has_its_default(services: dict[str, Any]) -> None:
    """An empty text is no number, and no process would start."""
    environment = services["monitor"]["environment"]

    assert {environment[name] for name in environment if name[8:].lower().startswith(TOLD_BY_ENV)} == {None}


def test_every_setting_exists(services: dict[str, Any]) -> None:
    """An unknown variable would be ignored without a word."""
    known = {f"PHOENIX_{name.upper()}" for name in Settings.model_fields}

    for service in services.values():
        given = {name for name in service.get("environment", {}) if name.startswith("PHOENIX_")}
        assert given - known == set()


def test_each_replica_has_a_journal_of_its_own(services: dict[str, Any]) -> None:
    """Two processes on one data folder would take each other's journals; the artifacts they share."""
    mounted = {
        name: dict(reversed(volume.split(":")[:2]) for volume in services[name]["volumes"])
        for name in ("api-1", "api-2", "log", "monitor")
    }

    assert len({volumes["/data"] for volumes in mounted.values()}) == len(mounted)
    assert mounted["api-1"]["/artifacts"] == mounted["api-2"]["/artifacts"]


def test_the_database_is_migrated_first(services: dict[str, Any]) -> None:
    """No process of this version meets tables of another."""
    for name in ("api-1", "api-2", "log", "monitor"):
        condition = services[name]["depends_on"]["migrate"]["condition"]
        assert condition == "service_completed_successfully"


def test_nginx_and_prometheus_name_services_that_exist(services: dict[str, Any]) -> None:
    """A renamed service would be a server that never answers."""
    upstreams = re.findall(
        r"^server ([\w-]+):8000 ", (DEPLOY / "nginx/site/servers.conf").read_text(), re.MULTILINE
    )
    targets = DEPLOY / "prometheus" / "targets"
    scraped = {
        file.stem: [target for group in yaml.safe_load(file.read_text()) for target in group["targets"]]
        for file in targets.iterdir()
    }

    apis = [name for name in services if name.startswith("api-")]
    assert upstreams == apis
    assert scraped == {
        "phoenix-api": [f"{name}:8000" for name in apis],
        "phoenix-log": ["log:9100"],
        "phoenix-monitor": ["monitor:9100"],
    }
    assert {services[name]["command"][-1] for name in ("log", "monitor")} == {"9100"}


def test_what_is_mounted_exists(services: dict[str, Any]) -> None:
    """The engine would make an empty folder of a path that is misspelt."""
    mounted = {
        volume.split(":")[0]
        for service in services.values()
        for volume in service.get("volumes", ())
        if volume.startswith("/")
    }

    assert mounted
    assert [path for path in mounted if not Path(path).is_dir()] == []
