"""Which version answers, and how soon a change is in force everywhere."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from lanes import Lane, ask_anew, eventually, log_rows, logged, ok, refused, unique
from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.domain.routing import Arm, Role, Router, Routing, Strategy

pytestmark = pytest.mark.system

IN_FORCE_S = 1.0
ROUTED = "/models/routed/routing"
CHAMPION = {"version": "1.0.0", "role": "champion"}
CHALLENGER = {"version": "1.1.0", "role": "challenger"}
SHADOW = {"version": "1.1.0", "role": "shadow"}


def arm(of: dict[str, str], weight: float) -> dict[str, Any]:
    """The arm with a weight."""
    return {**of, "weight": weight}


@pytest.fixture(autouse=True)
def _default_routing(http: Lane) -> Iterator[None]:
    """Each test begins with the default routing, and leaves it behind."""
    ok(http.request("DELETE", ROUTED))
    yield
    ok(http.request("DELETE", ROUTED))


def route(lane: Lane, strategy: str, *arms: dict[str, Any], salt: str = "") -> dict[str, Any]:
    """Sets the routing of the model `routed`."""
    body = {"strategy": strategy, "arms": arms, "salt": salt}
    answered: dict[str, Any] = ok(lane.request("PUT", ROUTED, json=body))
    return answered


def ask(lane: Lane, **body: Any) -> dict[str, Any]:
    """A prediction of the model `routed`."""
    answered: dict[str, Any] = ok(
        lane.request("POST", "/predict", json={"model_id": "routed", "features": [0, 0, 0], **body})
    )
    return answered


def process_of(prediction_id: str) -> str:
    """The part of an id that is drawn once a process."""
    return prediction_id[-11:]


def ask_any(server: PhoenixServer, **body: Any) -> httpx.Response:
    """The answer of whichever API process is quickest."""
    return ask_anew(server.url, {"model_id": "routed", "features": [0, 0, 0], **body})


def test_without_a_routing_the_highest_active_version_of_the_highest_stage_answers(lane: Lane) -> None:
    """An activation alone must not take traffic from a version in production."""
    ok(lane.request("DELETE", ROUTED))  # the process of this very lane knows of it at once

    default = ok(lane.request("GET", ROUTED))
    answer = ask(lane)

    assert default["is_default"]
    assert default["routing"]["arms"][0]["version"] == "1.1.0"
    assert (answer["model_version"], answer["role"]) == ("1.1.0", "champion")


def test_single_sends_every_request_to_its_version(lane: Lane) -> None:
    """The way to hold a version while newer ones are activated."""
    shown = route(lane, "single", CHAMPION)

    assert ok(lane.request("GET", ROUTED)) == shown
    assert not shown["is_default"]
    assert {ask(lane, routing_key=str(n))["model_version"] for n in range(30)} == {"1.0.0"}


def test_an_ab_test_shares_requests_out_by_its_weights(lane: Lane) -> None:
    """Only the ratio counts: 30 to 10 is a quarter for the challenger."""
    route(lane, "ab_test", arm(CHAMPION, 30), arm(CHALLENGER, 10))

    answers = [ask(lane, routing_key=f"key-{n}") for n in range(400)]

    roles = Counter(answer["role"] for answer in answers)
    assert 60 <= roles["challenger"] <= 140  # 100 expected, four standard deviations are 35
    assert {(a["role"], a["model_version"]) for a in answers} == {
        ("champion", "1.0.0"),
        ("challenger", "1.1.0"),
    }
    row = logged(lane, answers[0]["prediction_id"])
    assert row["route"]["strategy"] == "ab_test"
    assert row["route"]["role"] == answers[0]["role"]
    assert row["route"]["probability"] == (0.75 if answers[0]["role"] == "champion" else 0.25)
    assert row["route"]["routing_key"] == "key-0"


def test_the_same_key_gets_the_same_version_in_every_process_and_lane(
    lane: Lane, http: Lane, server: PhoenixServer
) -> None:
    """A customer who changes sides within a session spoils both the session and the experiment."""
    # Weights that no other test sets, so that its routing cannot be taken for this one.
    route(lane, "ab_test", arm(CHAMPION, 51), arm(CHALLENGER, 49), salt="autumn")
    arms = (Arm("1.0.0", Role.CHAMPION, 51), Arm("1.1.0", Role.CHALLENGER, 49))
    router = Router("routed", Routing(Strategy.AB_TEST, arms, "autumn"))
    keys = [f"key-{n}" for n in range(40)]
    settle(http, server, {0.51, 0.49})

    here = {key: ask(lane, routing_key=key)["model_version"] for key in keys}
    anew = {key: ok(ask_any(server, routing_key=key))["model_version"] for key in keys}

    assert here == anew == {key: router.choose(key).version for key in keys}


def settle(http: Lane, server: PhoenixServer, probabilities: set[float]) -> None:
    """Returns when both API processes follow a routing whose arms have these probabilities."""
    following: set[str] = set()

    def all_follow() -> bool:
        # Several at once, else one process may take them all while the other sleeps.
        for answer in pool.map(lambda _: ok(ask_any(server)), range(4)):
            if logged_route(http, answer["prediction_id"])["probability"] in probabilities:
                following.add(process_of(answer["prediction_id"]))
        return len(following) == 2

    with ThreadPoolExecutor(4) as pool:
        wait_until(all_follow, 60, "both processes follow the routing")


def logged_route(http: Lane, prediction_id: str) -> dict[str, Any]:
    """The route of a prediction, from the log."""
    found = eventually(
        lambda: http.request("GET", f"/predictions/{prediction_id}"),
        lambda response: response.status_code == 200,
        "the prediction is logged",
    )
    route_: dict[str, Any] = found.json()["route"]
    return route_


def test_the_entity_is_the_key_when_the_request_names_none(lane: Lane) -> None:
    """Sticky without anybody thinking of it."""
    route(lane, "ab_test", arm(CHAMPION, 50), arm(CHALLENGER, 50))
    entity = unique()

    versions = {ask(lane, entity_id=entity)["model_version"] for _ in range(20)}
    by_key = ask(lane, entity_id=unique(), routing_key=entity)

    assert versions == {by_key["model_version"]}
    assert logged(lane, by_key["prediction_id"])["route"]["routing_key"] == entity


def test_a_canary_takes_its_share_and_growing_it_never_sends_anybody_back(lane: Lane) -> None:
    """Whoever has seen the new version keeps it while the share grows."""
    keys = [f"key-{n}" for n in range(200)]

    def moved(share: float) -> set[str]:
        route(lane, "canary", arm(CHAMPION, 100 - share), arm(CHALLENGER, share))
        return {key for key in keys if ask(lane, routing_key=key)["model_version"] == "1.1.0"}

    few, more = moved(10), moved(40)

    assert 4 <= len(few) <= 40
    assert few < more


def test_another_salt_gives_another_assignment(lane: Lane) -> None:
    """Else the same customers would be the guinea pigs of every experiment."""
    keys = [f"key-{n}" for n in range(60)]
    assigned = []
    for salt in ("one", "two"):
        route(lane, "ab_test", arm(CHAMPION, 1), arm(CHALLENGER, 1), salt=salt)
        assigned.append([ask(lane, routing_key=key)["model_version"] for key in keys])

    assert assigned[0] != assigned[1]


def test_a_shadow_is_logged_and_never_returned(lane: Lane) -> None:
    """The new version sees real traffic while nobody depends on it."""
    route(lane, "shadow", CHAMPION, SHADOW)
    entity = unique()

    answer = ask(lane, entity_id=entity, features=[1, 2, 3], request_id=entity)

    assert (answer["model_version"], answer["role"], answer["result"]) == ("1.0.0", "champion", 14)
    eventually(
        lambda: lane.request("GET", "/predictions", params={"entity_id": entity}),
        lambda found: len(found.json()["items"]) == 2,
        "both answers are logged",
    )
    rows = {row["route"]["role"]: row for row in log_rows(lane, entity_id=entity)}
    shadow = rows["shadow"]
    assert shadow["route"]["shadow_of"] == answer["prediction_id"] == rows["champion"]["prediction_id"]
    assert shadow["prediction_id"] != answer["prediction_id"]
    assert (shadow["model_version"], shadow["result"]) == ("1.1.0", 1014)
    assert shadow["request_id"] == entity
    assert shadow["features"] == rows["champion"]["features"]
    assert rows["champion"]["route"]["shadow_of"] is None


def test_every_row_of_a_batch_has_its_shadow(lane: Lane) -> None:
    """A comparison that leaves batches out compares other customers."""
    route(lane, "shadow", CHAMPION, SHADOW)
    entity = unique()
    rows = [{"entity_id": entity, "features": [n, 0, 0]} for n in range(5)]

    answers = ok(lane.request("POST", "/predict/batch", json={"model_id": "routed", "instances": rows}))[
        "predictions"
    ]

    eventually(
        lambda: lane.request("GET", "/predictions", params={"entity_id": entity}),
        lambda found: len(found.json()["items"]) == 10,
        "all answers are logged",
    )
    shadows = [row for row in log_rows(lane, entity_id=entity) if row["route"]["role"] == "shadow"]
    assert {row["route"]["shadow_of"] for row in shadows} == {a["prediction_id"] for a in answers}
    assert [answer["result"] for answer in answers] == [0, 1, 2, 3, 4]


def test_a_request_that_names_its_version_has_no_shadow(lane: Lane) -> None:
    """Pinned requests belong to no experiment."""
    route(lane, "shadow", CHAMPION, SHADOW)
    entity = unique()

    ask(lane, entity_id=entity, model_version="1.0.0")
    marker = ask(lane, entity_id=entity, model_version="1.0.0")

    logged(lane, marker["prediction_id"])
    assert len(log_rows(lane, entity_id=entity)) == 2


def test_rows_of_one_batch_are_routed_each_by_its_own_key(lane: Lane) -> None:
    """A batch of many customers is many decisions."""
    route(lane, "ab_test", arm(CHAMPION, 1), arm(CHALLENGER, 1))
    keys = [f"key-{n}" for n in range(20)]
    rows = [{"features": [n, 0, 0], "routing_key": key} for n, key in enumerate(keys)]

    answers = ok(lane.request("POST", "/predict/batch", json={"model_id": "routed", "instances": rows}))[
        "predictions"
    ]

    alone = [ask(lane, routing_key=key)["model_version"] for key in keys]
    assert [answer["model_version"] for answer in answers] == alone
    assert set(alone) == {"1.0.0", "1.1.0"}
    results = [n + (1000 if version == "1.1.0" else 0) for n, version in enumerate(alone)]
    assert [answer["result"] for answer in answers] == results


BAD: dict[str, tuple[str, list[dict[str, Any]], int, str]] = {
    "no arms": ("single", [], 422, "routing_invalid"),
    "single with two": ("single", [CHAMPION, CHALLENGER], 422, "routing_invalid"),
    "no champion": ("ab_test", [CHALLENGER], 422, "routing_invalid"),
    "two champions": ("ab_test", [CHAMPION, {**CHALLENGER, "role": "champion"}], 422, "routing_invalid"),
    "the same version twice": (
        "ab_test",
        [CHAMPION, {**CHALLENGER, "version": "1.0.0"}],
        422,
        "routing_invalid",
    ),
    "weight 0": ("ab_test", [CHAMPION, arm(CHALLENGER, 0)], 422, "routing_invalid"),
    "negative weight": ("ab_test", [CHAMPION, arm(CHALLENGER, -1)], 422, "routing_invalid"),
    "weights beyond a float": (
        "ab_test",
        [arm(CHAMPION, 1e308), arm(CHALLENGER, 1e308)],
        422,
        "routing_invalid",
    ),
    "an ab_test with a shadow": ("ab_test", [CHAMPION, SHADOW], 422, "routing_invalid"),
    "a canary alone": ("canary", [CHAMPION], 422, "routing_invalid"),
    "a shadow without one": ("shadow", [CHAMPION], 422, "routing_invalid"),
    "pinned": ("pinned", [CHAMPION], 422, "routing_invalid"),
    "a strategy that is none": ("random", [CHAMPION], 422, "invalid_field"),
    "a role that is none": ("single", [{**CHAMPION, "role": "boss"}], 422, "invalid_field"),
    "a weight that is no number": ("single", [{**CHAMPION, "weight": "1"}], 422, "invalid_field"),
    "an unknown field": ("single", [{**CHAMPION, "share": 1}], 422, "invalid_field"),
    "an unknown version": ("single", [{"version": "9.9.9"}], 404, "version_unknown"),
    "an inactive version": ("single", [{"version": "2.0.0"}], 409, "version_inactive"),
}


@pytest.mark.parametrize(("strategy", "arms", "status", "code"), BAD.values(), ids=BAD.keys())
def test_a_routing_that_cannot_be_followed_is_refused_and_the_old_one_stays(
    http: Lane, strategy: str, arms: list[dict[str, Any]], status: int, code: str
) -> None:
    """A routing that fails at the first request fails too late."""
    before = route(http, "single", CHAMPION)

    refused(http.request("PUT", ROUTED, json={"strategy": strategy, "arms": arms}), status, code)

    assert ok(http.request("GET", ROUTED)) == before


def test_a_change_is_in_force_in_every_process_within_a_second_and_no_request_fails(
    http: Lane, server: PhoenixServer
) -> None:
    """Nobody should have to wait, or to stop traffic, to change what serves."""
    route(http, "single", CHAMPION)
    seen: list[tuple[float, str, str]] = []
    failures: list[str] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            asked_at = time.monotonic()
            try:
                response = ask_any(server)
            except httpx.HTTPError as exc:
                failures.append(repr(exc))
                continue
            if response.status_code != 200:
                failures.append(response.text)
                continue
            answer = response.json()
            seen.append((asked_at, process_of(answer["prediction_id"]), answer["model_version"]))

    def both_answered(version: str, since: float) -> bool:
        return len({one for at, one, found in list(seen) if at >= since and found == version}) == 2

    askers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        wait_until(lambda: both_answered("1.0.0", 0), 60, "both processes answer with 1.0.0")
        changed_at = {}
        for version in ("1.1.0", "1.0.0", "1.1.0"):
            route(http, "single", {"version": version})
            changed_at[version] = time.monotonic()
            in_force_at = changed_at[version] + IN_FORCE_S
            wait_until(
                lambda v=version, at=in_force_at: both_answered(v, at),  # type: ignore[misc]
                60,
                f"both processes answer with {version} a second after the change",
            )
            late = {found for at, _, found in list(seen) if at >= in_force_at}
            assert late == {version}
    finally:
        over.set()
        for asker in askers:
            asker.join()

    assert failures == []


def test_the_command_line_sets_the_routing_of_a_running_server(http: Lane, server: PhoenixServer) -> None:
    """Operators work on the machine; what they set there must reach every process just the same."""
    done = server.command("models", "routing", "routed", "1.0.0=93", "1.1.0=7", "--strategy", "canary")

    assert done.returncode == 0, done.stderr
    shown = ok(http.request("GET", ROUTED))
    assert (shown["routing"]["strategy"], shown["is_default"]) == ("canary", False)
    settle(http, server, {0.93, 0.07})
