"""The reference pages say what the code says, no more and no less."""

import asyncio
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import pytest

from phoenix_ml.bootstrap import bootstrap, bootstrap_infer, bootstrap_predict, open_features
from phoenix_ml.cli import main
from phoenix_ml.domain import errors
from phoenix_ml.domain.predictions import PredictionRequest
from phoenix_ml.extras import LIBRARIES
from phoenix_ml.infrastructure.events.journal import JournalWriter
from phoenix_ml.infrastructure.http.app import build_app
from phoenix_ml.infrastructure.http.calls import PredictionCalls
from phoenix_ml.infrastructure.http.codec import AnswerBody
from phoenix_ml.infrastructure.http.errors import status_of
from phoenix_ml.infrastructure.http.infer import InferCalls
from phoenix_ml.infrastructure.telemetry.catalogue import CATALOGUE
from phoenix_ml.infrastructure.telemetry.meter import MetricsMeter
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.settings import Settings, load_settings

_ROOT = Path(__file__).parents[2]
_DOCS = _ROOT / "docs"
_PAGES = sorted([*_DOCS.rglob("*.md"), _ROOT / "README.md", _ROOT / "CHANGELOG.md"])
_CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def _read(name: str) -> str:
    return (_DOCS / name).read_text()


def _rows(text: str) -> list[list[str]]:
    """The cells of the tables' rows that begin with code, without the backticks of the first."""
    found = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def test_the_settings_page_lists_every_setting_with_its_default_and_meaning() -> None:
    """One row a setting, in the order of the code, and no other."""
    expected = []
    for name, field in Settings.model_fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        shown = f"`{default}`" if default else "*(empty)*"
        expected.append([f"PHOENIX_{name.upper()}", shown, field.description])
    assert _rows(_read("reference/settings.md")) == expected


def test_the_settings_page_names_every_choice() -> None:
    """A setting that takes one of a few words has all of them on its page."""
    page = _read("reference/settings.md")
    for schema in Settings.model_json_schema()["properties"].values():
        for word in schema.get("enum", ()):
            assert f"`{word}`" in page


def test_the_metrics_page_lists_every_metric() -> None:
    """One row a metric with type, labels and help, in the order of the catalogue, and no other."""
    expected = [
        [
            metric.name,
            type(metric).__name__.lower(),
            ", ".join(f"`{label}`" for label in metric.labelnames) or "none",
            metric.help,
        ]
        for metric in CATALOGUE
    ]
    assert _rows(_read("reference/metrics.md")) == expected


def _error_kinds(kind: type[errors.PhoenixError]) -> Iterator[type[errors.PhoenixError]]:
    # Only the tree of the domain: tests and tools may derive errors of their own.
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            if "code" in vars(child):
                yield child
            yield from _error_kinds(child)


def test_the_errors_page_lists_every_code_with_its_status() -> None:
    """One row a code, with the status that the HTTP table gives it, and no other."""
    expected = {
        kind.code: str(status_of(kind("said by a test"))) for kind in _error_kinds(errors.PhoenixError)
    }
    rows = _rows(_read("reference/errors.md"))
    assert {row[0]: row[1] for row in rows} == expected
    assert len(rows) == len(expected)


def test_every_error_is_explained_with_what_to_do() -> None:
    """Neither the meaning nor the advice is empty."""
    assert all(len(row) == 4 and row[2] and row[3] for row in _rows(_read("reference/errors.md")))


def _commands(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _commands(child, (*words, name))
    else:
        yield " ".join(words), command


_COMMANDS = dict(_commands(main, ("phoenix-ml",)))


def _sections(page: str, level: str) -> dict[str, str]:
    parts = re.split(rf"^{level} `([^`]+)`\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_command_page_has_every_command() -> None:
    """One section a command, in the order of the code, and no other."""
    assert sorted(_sections(_read("reference/cli.md"), "##")) == sorted(_COMMANDS)


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_command_page_has_every_option_and_argument(name: str) -> None:
    """One row a parameter, in the order of the code, and no other."""
    command = _COMMANDS[name]
    context = click.Context(command, info_name=name)
    expected = []
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            expected.append(max(parameter.opts, key=len))
        elif isinstance(parameter.type, click.Choice):
            expected.append(parameter.human_readable_name.upper())
        else:
            expected.append(parameter.make_metavar(context))
    section = _sections(_read("reference/cli.md"), "##")[name]
    assert [row[0] for row in _rows(section)] == expected


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_command_page_names_the_choices_that_the_command_takes(name: str) -> None:
    """What a reader copies from the page is what the command accepts."""
    command = _COMMANDS[name]
    context = click.Context(command, info_name=name)
    section = _sections(_read("reference/cli.md"), "##")[name]
    for parameter in command.params:
        if isinstance(parameter.type, click.Choice):
            for choice in parameter.type.choices:
                word = parameter.type.normalize_choice(choice, context)
                assert f"`{word}`" in section


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_command_page_shows_the_example_of_the_help(name: str) -> None:
    """The example in the page and the one in ``--help`` are the same."""
    example = (_COMMANDS[name].help or "").rpartition("Example:")[2].strip()
    assert example
    assert f"```sh\n{example}\n```" in _sections(_read("reference/cli.md"), "##")[name]


async def _described(folder: Path) -> dict[str, Any]:
    settings = load_settings(data=folder, database="", features="sqlite:", artifacts="file:")
    phoenix = bootstrap(settings)
    features = open_features(settings)
    journal = JournalWriter(settings.journal_folder / "api-0")
    with MetricsWriter(settings.metrics_folder / "api-0.mmap") as metrics:
        meter = MetricsMeter(metrics)
        live, predict = bootstrap_predict(phoenix, features, journal, meter)
        calls = PredictionCalls(predict, live, journal, meter, body_limit_bytes=1024, batch_limit=1)
        infer = bootstrap_infer(phoenix, live, predict, journal, meter)
        infer_calls = InferCalls(infer, live, meter, body_limit_bytes=1024)
        app: Any = build_app(phoenix, features, live, calls, infer_calls, lambda: "ok")
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            description: dict[str, Any] = (await client.get("/openapi.json")).raise_for_status().json()
    await features.close()
    journal.close()
    phoenix.database.close()
    return description


@pytest.fixture(scope="module")
def openapi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the application says of itself, built as a server builds it, in an empty folder."""
    return asyncio.run(_described(tmp_path_factory.mktemp("data")))


def test_the_http_page_has_every_route(openapi: dict[str, Any]) -> None:
    """One section a method and path, and no other."""
    routes = {f"{method.upper()} {path}" for path, item in openapi["paths"].items() for method in item}
    sections = re.findall(r"^### `([^`]+)`$", _read("reference/http-api.md"), re.MULTILINE)
    assert set(sections) == routes
    assert len(sections) == len(routes)


def test_openapi_says_how_calls_are_answered_and_refused(openapi: dict[str, Any]) -> None:
    """Clients are generated from it: FastAPI alone would say texts, and errors of a form that we never send."""
    predict = openapi["paths"]["/predict"]["post"]
    request = predict["requestBody"]["content"]["application/json"]
    schemas = openapi["components"]["schemas"]
    answered = _schema_of(predict["responses"]["200"], schemas)
    assert set(answered["properties"]) == set(AnswerBody.__struct_fields__)
    assert set(request["schema"]["properties"]) == set(PredictionRequest.__struct_fields__)
    assert msgspec.convert(request["example"], PredictionRequest).entity_id == "cust_0001"
    refused = _schema_of(predict["responses"]["4XX"], schemas)
    assert refused["properties"] == {"error": {"$ref": "#/components/schemas/Problem"}}
    assert set(schemas["Problem"]["properties"]) == {"code", "message", "details"}
    assert "HTTPValidationError" not in msgspec.json.encode(openapi).decode()
    assert "pinned" not in str(openapi["paths"]["/models/{model_id}/routing"]["put"])
    for path, item in openapi["paths"].items():
        for operation in item.values():
            assert {"4XX", "5XX"} < set(operation["responses"]), path
            for response in operation["responses"].values():
                assert _schema_of(response, schemas)["type"] in ("object", "string"), path
            assert operation["summary"].endswith("."), path


def _schema_of(response: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    [content] = response["content"].values()
    name = content["schema"].get("$ref", "").removeprefix("#/components/schemas/")
    found: dict[str, Any] = schemas[name] if name else content["schema"]
    return found


def test_the_http_page_names_every_field_of_a_request(openapi: dict[str, Any]) -> None:
    """Each field of a JSON body and each query parameter stands in its route's section."""
    sections = _sections(_read("reference/http-api.md"), "###")
    # A batch's instances and a list of outcomes refer to the section before.
    sections["POST /predict/batch"] += sections["POST /predict"]
    for path, item in openapi["paths"].items():
        for method, operation in item.items():
            section = sections[f"{method.upper()} {path}"]
            names = {
                parameter["name"]
                for parameter in operation.get("parameters", ())
                if parameter["in"] == "query"
            }
            for content in operation.get("requestBody", {}).get("content", {}).values():
                names |= _property_names(content["schema"])
            missing = {name for name in names if not re.search(rf"\b{name}\b", section)}
            assert not missing, f"{method.upper()} {path}"


def _property_names(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_property_names, schema))
    if not isinstance(schema, dict):
        return set()
    names = set(schema["properties"]) if isinstance(schema.get("properties"), dict) else set()
    return names.union(*map(_property_names, schema.values()))


def _package(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found
    return found[0].lower()


def test_every_dependency_is_justified() -> None:
    """The page lists the packages of pyproject.toml and no other, each with a reason."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    expected = [("", _package(requirement)) for requirement in project["dependencies"]]
    for extra, requirements in project["optional-dependencies"].items():
        expected += [(extra, _package(r)) for r in requirements if _package(r) != project["name"]]
    listed = []
    for row in _rows(_read("dependencies.md")):
        assert row[-1], f"{row[0]} has no reason"
        listed.append(("", row[0]) if len(row) == 2 else (row[0], row[1].strip("`")))
    assert sorted(listed) == sorted(expected)


def test_uvicorn_is_of_the_minor_version_that_is_locked_and_no_other() -> None:
    """The hot lane subclasses its protocol: another one, which no test has seen, may answer otherwise."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    (required,) = (one for one in project["dependencies"] if _package(one) == "uvicorn")
    locks = sorted((_ROOT / "requirements").glob("*.txt"))
    locked = {
        (int(major), int(minor))
        for lock in locks
        for major, minor in re.findall(r"^uvicorn==(\d+)\.(\d+)", lock.read_text(), re.MULTILINE)
    }

    ((major, minor),) = locked
    assert required == f"uvicorn>={major}.{minor},<{major}.{minor + 1}"


def test_missing_libraries_are_named_as_the_extras_have_them() -> None:
    """`pip install 'phoenix-ml[redis]'` would install a stranger's package from PyPI."""
    extras = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra: [re.split("[<>=]", requirement)[0] for requirement in requirements]
        for extra, requirements in extras.items()
        if extra != "all"
    }
    assert {extra: list(libraries) for extra, libraries in LIBRARIES.items()} == named
    pages = [_ROOT / "README.md", *_DOCS.rglob("*.md"), *(_ROOT / "src").rglob("*.py")]
    assert [str(page) for page in pages if "phoenix-ml[" in page.read_text()] == []


def test_decisions_are_numbered_without_a_gap() -> None:
    """File names and titles carry 1, 2, 3, …; each has its three parts; the list names all of them."""
    records = sorted((_DOCS / "adr").glob("0*.md"))
    overview = _read("adr/README.md")
    for number, record in enumerate(records, 1):
        text = record.read_text()
        assert record.name.startswith(f"{number:04}-")
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
        assert f"({record.name})" in overview
    assert len(records) == overview.count(".md)")


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as repository hosts make them."""
    headings = re.findall(r"^#+ (.*)$", _CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Relative links name files that exist, and headings that they have."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _CODE_BLOCK.sub("", page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked), target


def test_the_map_leads_to_every_page() -> None:
    """No page under docs is an orphan."""
    reached = {_DOCS / "README.md"}
    waiting = [_DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            linked = (page.parent / target).resolve()
            if linked.is_relative_to(_DOCS) and linked not in reached:
                reached.add(linked)
                waiting.append(linked)
    assert reached == set(_DOCS.rglob("*.md"))
