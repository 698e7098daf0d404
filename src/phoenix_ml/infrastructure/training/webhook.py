"""Trainers outside, asked over HTTP: signed webhooks, Airflow, Kubeflow Pipelines, GitHub Actions."""

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Struct

from phoenix_ml.application.ports import RemoteTrainer, TrainingFailed, TrainingRequest
from phoenix_ml.application.reports import iso_time
from phoenix_ml.domain.errors import Misconfigured
from phoenix_ml.infrastructure.alerts.channels import signing_key, webhook_headers
from phoenix_ml.infrastructure.webhooks import request_within

if TYPE_CHECKING:  # imported where it is used
    import httpx

T = TypeVar("T")
_TIMEOUT_S = 10.0
_MOST_READ, _MOST_QUOTED = 1024 * 1024, 200
_SETTING, _TOKEN_SETTING = "PHOENIX_TRAINER", "PHOENIX_TRAINER_TOKEN"
_WANTED = {
    "webhook": "webhook:https://HOST/PATH",
    "airflow": "airflow:https://HOST/DAG_ID, with USER:PASSWORD@ before the host where there is no token",
    "kubeflow": "kubeflow:https://HOST/PIPELINE_ID, with ?experiment_id=…&version_id=… after it where they are wanted",
    "github": "github:OWNER/REPO, or github:https://HOST/api/v3/OWNER/REPO",
}
KINDS = tuple(_WANTED)
_GITHUB = "https://api.github.com"
_GITHUB_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# httpx takes a bracket, for one, as part of a name, and writes it %5B.
_HOST = re.compile(rb"[\w.:-]+", re.ASCII)
# What a header can hold, and no space.
_TOKEN = re.compile(r"[\x21-\x7e]*")


def open_remote_trainer(spec: str, token: str, timeout_s: float = _TIMEOUT_S) -> RemoteTrainer:
    """The trainer that the spec, ``KIND:TARGET``, stands for.

    Raises Misconfigured, saying what to write; what it says holds nothing of the target.
    """
    kind, colon, target = spec.strip().partition(":")
    if kind not in _WANTED:
        what = f"{kind}: is no trainer" if colon else "a value without a kind is no trainer"
        raise Misconfigured(
            f"PHOENIX_TRAINER: {what}: write process:COMMAND, {', '.join(f'{one}:…' for one in KINDS)}",
            setting=_SETTING,
        )
    token = token.strip()
    if kind == "webhook":
        return WebhookTrainer(_parse(kind, target), token, timeout_s)
    if not _TOKEN.fullmatch(token):
        raise Misconfigured(
            "PHOENIX_TRAINER_TOKEN: it has spaces or signs that are not ASCII: give the token and nothing else",
            setting=_TOKEN_SETTING,
        )
    if kind == "airflow":
        return AirflowTrainer(_parse(kind, target), token, timeout_s)
    if kind == "kubeflow":
        return KubeflowTrainer(_parse(kind, target), token, timeout_s)
    if _GITHUB_REPOSITORY.fullmatch(target):
        target = f"{_GITHUB}/{target}"
    return GithubTrainer(_parse(kind, target), token, timeout_s)


class WebhookTrainer:
    """A POST of JSON, signed as https://www.standardwebhooks.com says where there is a token.

    The run id is the message's id, by which a receiver can tell what it has already.
    """

    def __init__(self, url: "httpx.URL", token: str, timeout_s: float) -> None:
        self._key = signing_key(token, _TOKEN_SETTING)
        basic = ""
        if url.userinfo:
            basic = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
        self._user = {"authorization": f"Basic {basic}"} if basic else {}
        self._target = str(url.copy_with(userinfo=b""))
        # A webhook's path is often its password, and servers name the path that they do not know.
        secrets = [token, basic, url.password, url.raw_path.decode(), url.path, url.query.decode()]
        self._server = _Server(url, secrets, timeout_s)

    def ask(self, request: TrainingRequest) -> None:
        body = msgspec.json.encode(
            {
                "type": "phoenix-ml.retrain-requested",
                "timestamp": iso_time(time.time_ns() // 1_000_000),
                "data": request,
            }
        )
        headers = {**webhook_headers(self._key, request.run_id, body), **self._user}
        self._server.call("POST", self._target, headers, body)


class AirflowTrainer:
    """A run of a DAG by the REST API of Airflow 3, with the run id as its own and the request as its ``conf``."""

    def __init__(self, url: "httpx.URL", token: str, timeout_s: float) -> None:
        _refuse_query("airflow", url, ())
        base, (dag,) = _split("airflow", url, 1)
        if url.userinfo and token:
            raise _misconfigured("airflow", "there is a user in the URL and PHOENIX_TRAINER_TOKEN as well")
        if bool(url.username) is not bool(url.password):
            raise _misconfigured(
                "airflow", "there is a user without a password, or a password without a user"
            )
        self._user = {"username": url.username, "password": url.password} if url.userinfo else None
        self._token = token
        self._base = base
        self._runs = f"{base}/api/v2/dags/{dag}/dagRuns"
        self._server = _Server(url, [token, url.password], timeout_s)

    def ask(self, request: TrainingRequest) -> None:
        token = self._token if self._user is None else self._fetch_token(self._user)
        body = {"dag_run_id": request.run_id, "logical_date": None, "conf": request}
        # Conflict: a run of this id exists, so it was asked for already.
        self._server.call(
            "POST", self._runs, _headers(token), msgspec.json.encode(body), fine=[409], secrets=[token]
        )

    def _fetch_token(self, user: Mapping[str, str]) -> str:
        answer = self._server.call("POST", f"{self._base}/auth/token", _headers(), msgspec.json.encode(user))
        token = self._server.decode(answer, _AirflowToken).access_token
        if not (token and _TOKEN.fullmatch(token)):
            raise TrainingFailed(f"{self._server.host}: /auth/token answers no token")
        return token


class _AirflowToken(Struct):
    access_token: str


class KubeflowTrainer:
    """A run of a pipeline by the API v2beta1 of Kubeflow Pipelines, with the run id as its name.

    Its parameters are the fields of the request, the evidence as JSON: the pipeline has to take all of them, as
    Kubeflow refuses a parameter that a pipeline does not have.
    """

    def __init__(self, url: "httpx.URL", token: str, timeout_s: float) -> None:
        _refuse_user("kubeflow", url)
        _refuse_query("kubeflow", url, ("experiment_id", "version_id"))
        base, (pipeline,) = _split("kubeflow", url, 1)
        self._pipeline = {"pipeline_id": pipeline}
        if version := url.params.get("version_id"):
            self._pipeline["pipeline_version_id"] = version
        experiment = url.params.get("experiment_id")
        self._experiment = {"experiment_id": experiment} if experiment else {}
        self._runs = f"{base}/apis/v2beta1/runs"
        self._headers = _headers(token)
        self._server = _Server(url, [token], timeout_s)

    def ask(self, request: TrainingRequest) -> None:
        if self._is_asked(request.run_id):
            return
        parameters = msgspec.to_builtins(request)
        parameters["evidence"] = msgspec.json.encode(request.evidence).decode()
        body = {
            "display_name": request.run_id,
            "pipeline_version_reference": self._pipeline,
            "runtime_config": {"parameters": parameters},
            **self._experiment,
        }
        self._server.call("POST", self._runs, self._headers, msgspec.json.encode(body))

    def _is_asked(self, run_id: str) -> bool:
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": run_id}
        wanted = {
            "filter": msgspec.json.encode({"predicates": [predicate]}).decode(),
            "page_size": "1",
            **self._experiment,
        }
        answer = self._server.call("GET", self._runs, self._headers, params=wanted)
        found = self._server.decode(answer, _KubeflowRuns)
        return any(run.display_name == run_id for run in found.runs or ())


class _KubeflowRun(Struct):
    display_name: str = ""


class _KubeflowRuns(Struct):
    runs: list[_KubeflowRun] | None = None


class GithubTrainer:
    """A ``repository_dispatch`` event, which starts the workflows of the repository that wait for its type.

    GitHub does not tell one event from another: a workflow that must not run twice compares the run ids.
    """

    def __init__(self, url: "httpx.URL", token: str, timeout_s: float) -> None:
        _refuse_user("github", url)
        _refuse_query("github", url, ())
        base, names = _split("github", url, 2)
        if url.host in ("github.com", "www.github.com"):
            raise _misconfigured("github", "the URL is of GitHub's pages, not of its API")
        if not token:
            raise Misconfigured(
                "PHOENIX_TRAINER_TOKEN: github: needs one: give a token that may write the contents of the repository",
                setting=_TOKEN_SETTING,
            )
        self._dispatches = f"{base}/repos/{'/'.join(names)}/dispatches"
        self._headers = {
            **_headers(token),
            "accept": "application/vnd.github+json",
            "x-github-api-version": "2022-11-28",
        }
        self._server = _Server(url, [token], timeout_s)

    def ask(self, request: TrainingRequest) -> None:
        # GitHub takes ten properties at most; the request has eight.
        body = {"event_type": "phoenix-ml-retrain", "client_payload": request}
        self._server.call("POST", self._dispatches, self._headers, msgspec.json.encode(body))


class _Server:
    """Who is asked. What is told of a failure has none of the secrets in it, even where the answer repeats them."""

    def __init__(self, url: "httpx.URL", secrets: Sequence[str], timeout_s: float) -> None:
        self.host = url.netloc.decode()
        self._secrets = secrets
        self._timeout_s = timeout_s

    def call(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        *,
        params: Mapping[str, str] | None = None,
        fine: Sequence[int] = (),
        secrets: Sequence[str] = (),
    ) -> bytes:
        """What it answers with a status that is 2xx or among the ``fine`` ones. Raises TrainingFailed."""
        import httpx

        try:
            status, answer = request_within(
                self._timeout_s, _MOST_READ, method, url, headers=headers, content=body, params=params
            )
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            why = self._quote(f"{type(exc).__name__}: {exc}", secrets)
            raise TrainingFailed(f"{self.host} cannot be asked: {why}") from exc
        if not (200 <= status < 300 or status in fine):
            said = self._quote(answer.decode(errors="replace"), secrets) or "no reason given"
            raise TrainingFailed(f"{self.host} answers HTTP {status}: {said}")
        return answer

    def decode(self, answer: bytes, kind: type[T]) -> T:
        """Raises TrainingFailed where something else answers, such as the page of a login."""
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as exc:
            raise TrainingFailed(f"{self.host} does not answer as its API says: {exc}") from exc

    def _quote(self, text: str, more: Sequence[str]) -> str:
        for secret in (*self._secrets, *more):
            if secret in ("", "/"):
                continue
            for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe="")):
                text = text.replace(form, "***")
        return " ".join(text.split())[:_MOST_QUOTED]


def _parse(kind: str, target: str) -> "httpx.URL":
    """The URL; a message holds nothing of it, as a part of a password may stand anywhere in what is no URL."""
    import httpx

    try:
        url = httpx.URL(target.strip())
    except (httpx.InvalidURL, ValueError):
        url = None
    is_clear = url is not None and _HOST.fullmatch(url.raw_host) and b"@" not in url.raw_path
    if url is None or not is_clear or url.scheme not in ("http", "https") or url.fragment:
        raise _misconfigured(
            kind,
            "what follows is no http:// or https:// URL (in a password, @ : / ? # are %40 %3A %2F %3F %23)",
        )
    return url


def _split(kind: str, url: "httpx.URL", count: int) -> tuple[str, list[str]]:
    """The base URL without user, query and closing slash, and the last segments of the path."""
    path = url.raw_path.decode().partition("?")[0].strip("/")
    segments = path.split("/")
    if len(segments) < count or not all(segments):
        raise _misconfigured(kind, "the URL lacks what is to be run")
    base = url.copy_with(userinfo=b"", raw_path=b"/")
    return "/".join([str(base).rstrip("/"), *segments[:-count]]), segments[-count:]


def _refuse_user(kind: str, url: "httpx.URL") -> None:
    if url.userinfo:
        raise _misconfigured(
            kind, "a user in the URL means nothing here, the token goes into PHOENIX_TRAINER_TOKEN"
        )


def _refuse_query(kind: str, url: "httpx.URL", known: Sequence[str]) -> None:
    if not set(url.params) <= set(known):
        raise _misconfigured(kind, "the URL has a query that means nothing here")


def _misconfigured(kind: str, why: str) -> Misconfigured:
    return Misconfigured(f"PHOENIX_TRAINER: {kind}: {why}: write {_WANTED[kind]}", setting=_SETTING)


def _headers(token: str = "") -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    return headers
