"""What web pages of other sites may not do through the browser of somebody who can reach the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lanes import Lane, ok, refused, unique

from phoenix_ml.infrastructure.http.origins import browser_check
from phoenix_ml.settings import load_settings

ABC = {"model_id": "abc", "features": [1, 2, 3]}
CALLS: list[tuple[str, str, Any]] = [
    ("POST", "/predict", ABC),
    ("POST", "/predict/batch", {"model_id": "abc", "instances": [{"features": [1, 2, 3]}]}),
    ("POST", "/models/abc/versions/1.0.0/activate", None),
    ("PUT", "/models/abc/routing", {"strategy": "single", "arms": [{"version": "1.0.0"}]}),
    ("DELETE", "/models/abc/routing", None),
]


@pytest.mark.system
@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1", "null", ""])
@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_a_page_of_another_site_changes_nothing(
    lane: Lane, method: str, path: str, body: Any, origin: str
) -> None:
    """Any page that a colleague visits could register models on the server of the colleague's machine."""
    response = lane.request(method, path, json=body, headers={"origin": origin, "host": "localhost:8000"})

    error = refused(response, 403, "cross_site_request")
    assert error["details"] == {"origin": origin, "host": "localhost:8000"}
    assert response.headers["x-request-id"]


@pytest.mark.system
@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8000", "localhost:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("https://localhost", "localhost:443"),
        ("http://app.localhost", "App.LocalHost:80"),
    ],
)
def test_a_page_of_this_server_may_do_all(lane: Lane, origin: str, host: str) -> None:
    """The documentation page tries calls out from the browser."""
    ok(lane.request("POST", "/predict", json=ABC, headers={"origin": origin, "host": host}))
    written = lane.request(
        "PUT",
        f"/features/{unique()}",
        json={"features": {"a": 1}},
        headers={"origin": origin, "host": host},
    )

    assert written.status_code == 200


@pytest.mark.system
def test_reading_is_left_to_the_browser(lane: Lane) -> None:
    """It hides the answer from the other page by itself; a link to us must work."""
    ok(lane.request("GET", "/models", headers={"origin": "https://evil.example"}))


@pytest.mark.system
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "[::2]:1",
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/models"), ("POST", "/predict"), ("GET", "/openapi.json"), ("GET", "/nowhere")],
)
def test_a_name_that_was_made_to_lead_here_is_refused(lane: Lane, method: str, path: str, host: str) -> None:
    """To the browser the answers would belong to the page of that name, which could read them all."""
    headers = {"host": host} | ({} if method == "GET" else {"origin": f"http://{host}"})

    error = refused(lane.request(method, path, headers=headers), 403, "host_not_allowed")

    assert error["details"] == {"host": host}
    assert "PHOENIX_ALLOWED_HOSTS" in error["message"]


def scope(host: str | None, origin: str | None = None, method: str = "POST") -> dict[str, Any]:
    """An ASGI scope with these headers."""
    given = {"host": host, "origin": origin}
    headers = [(name.encode(), value.encode()) for name, value in given.items() if value is not None]
    return {"type": "http", "method": method, "headers": headers}


def refusal(host: str | None, origin: str | None = None, /, **settings: Any) -> str | None:
    """The code of the error under these settings; None where there is none."""
    error = browser_check(load_settings(data=Path("unused"), **settings))(scope(host, origin))
    return None if error is None else error.code


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10:1", "localhost", "LOCALHOST:80", "[::1]", "a.localhost"]
)
@pytest.mark.parametrize("listens_on", ["127.0.0.1", "::1", "localhost"])
def test_on_a_loopback_address_its_own_names_are_answered(host: str, listens_on: str) -> None:
    """They are how programs and tunnels call it."""
    assert refusal(host, host=listens_on) is None


def test_the_names_behind_a_proxy_on_the_same_machine_are_listed() -> None:
    """There the public name arrives at a loopback address."""
    listed = "ml.example.com, ML2.example.com:443"

    assert refusal("ml.example.com", "https://ml.example.com", allowed_hosts=listed) is None
    assert refusal("ml.example.com:8443", allowed_hosts=listed) is None
    assert refusal("ml2.example.com", allowed_hosts=listed) is None
    assert refusal("127.0.0.1:8000", allowed_hosts=listed) is None
    assert refusal("example.com", allowed_hosts=listed) == "host_not_allowed"
    assert refusal("ml.example.com", "https://evil.example", allowed_hosts=listed) == "cross_site_request"


def test_on_another_address_names_are_checked_only_when_listed() -> None:
    """Its names are not ours to know; whoever lists them means it."""
    public = {"host": "0.0.0.0", "insecure": True}

    assert refusal("ml.example.com", **public) is None
    assert refusal("ml.example.com", "https://evil.example", **public) == "cross_site_request"
    assert refusal("evil.example", allowed_hosts="ml.example.com", **public) == "host_not_allowed"


def test_programs_send_neither_origin_nor_need_a_host() -> None:
    """Health checks in HTTP/1.0 name no host; a browser always does."""
    assert refusal(None) is None
    assert refusal(None, "https://evil.example") == "cross_site_request"


def test_a_long_header_is_not_repeated_in_full() -> None:
    """An answer must not grow with what an attacker sends."""
    check = browser_check(load_settings(data=Path("unused")))

    errors = [check(scope("x" * 60_000)), check(scope("localhost", "y" * 60_000))]

    assert [len(error.message) < 500 for error in errors if error is not None] == [True, True]
