"""The dashboards that are deployed, and their queries as Grafana sends them."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deploy_servers import DEPLOY

DASHBOARDS: dict[str, Any] = {
    file.stem: json.loads(file.read_text())
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
}


def promql_queries() -> dict[str, str]:
    """What the panels ask Prometheus, by dashboard, panel and letter."""
    return {name: target["expr"] for name, target in _targets() if "expr" in target}


def sql_queries() -> dict[str, str]:
    """What they ask PostgreSQL."""
    return {name: target["rawSql"] for name, target in _targets() if "rawSql" in target}


def _targets() -> Iterator[tuple[str, dict[str, Any]]]:
    for file, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{file}: {panel['title']} {target['refId']}", target


def as_sent_to_prometheus(expression: str, model: str) -> str:
    """The expression for one model, over a minute."""
    return expression.replace("$__rate_interval", "1m").replace("$model", model)


def as_sent_to_postgresql(query: str, model: str, times: tuple[str, str]) -> str:
    """The query for one model in a range of time, its macros replaced."""
    first, last = (f"'{time}'" for time in times)
    values: Mapping[str, str] = {
        r"\$__timeFilter\(([\w.]+)\)": rf"\1 BETWEEN {first} AND {last}",
        r"\$__timeFrom\(\)": first,
        r"\$__timeTo\(\)": last,
        r"\$\{model:sqlstring\}": f"'{model}'",
    }
    for pattern, value in values.items():
        query = re.sub(pattern, value, query)
    assert "$" not in query, f"this is not replaced: {query}"
    return query
