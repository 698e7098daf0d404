"""What the Dockerfile is made of. No test builds the image: there may be no engine here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from deploy_servers import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COPIED = [
    word
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    for word in line.split()[:-1]
]
EXTRAS = ("redis", "postgres", "kafka", "alerts", "grpc")


def _pins(name: str) -> dict[str, set[str]]:
    """The versions of each package; there may be one for each of several Pythons."""
    pins: dict[str, set[str]] = {}
    for package, version in re.findall(
        r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE
    ):
        pins.setdefault(package, set()).add(version)
    return pins


def test_the_context_is_what_is_copied() -> None:
    """Nothing else can get into an image: no .env, no data, no key."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]

    assert sorted(allowed) == sorted(COPIED)


def test_the_package_builds_from_what_is_copied(tmp_path: Path) -> None:
    """The build needs no file that stays outside, and the migrations and the command are in."""
    context = tmp_path / "context"
    for name in COPIED:
        target = context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)

    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    made = subprocess.run(
        [*wheel, "--wheel-dir", str(tmp_path), str(context)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert made.returncode == 0, made.stderr
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as contents:
        names = contents.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"phoenix-ml = phoenix_ml.cli:main" in contents.read(entry_points)
    assert any("/versions/" in name and name.endswith(".py") for name in names)


def test_the_lock_has_all_that_the_servers_need() -> None:
    """The package, its clients of Redis, PostgreSQL, Kafka and people, gRPC, and what builds it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in EXTRAS:
        needed += project["project"]["optional-dependencies"][extra]

    names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in needed}
    assert names - set(_pins("serve.txt")) == set()


def test_what_is_deployed_is_what_was_tested() -> None:
    """The versions in the image are those under which the tests run."""
    tested = _pins("test.txt")

    differing = {
        name: versions for name, versions in _pins("serve.txt").items() if versions != tested.get(name)
    }
    assert differing == {}


def test_every_dependency_is_checked_by_its_hash() -> None:
    """pip is told to insist, and each pin has hashes."""
    lock = (ROOT / "requirements" / "serve.txt").read_text()
    pins = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]

    assert "pip install --require-hashes -r /build/requirements/serve.txt" in DOCKERFILE
    assert [pin for pin in pins if "--hash=sha256:" not in pin] == []


def test_the_image_does_not_run_as_root() -> None:
    """Whoever breaks out of a model's parser is a user without rights."""
    stages = DOCKERFILE.split("\nFROM ")

    assert re.findall(r"^USER (\w+)$", stages[-1], re.MULTILINE) == ["phoenix"]
    assert "useradd --uid 10001" in stages[-1]


def test_the_base_image_has_an_exact_version() -> None:
    """The same base for both stages, since the virtual environment moves from one to the other."""
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)

    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])
