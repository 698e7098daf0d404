"""Who is calling: the one place where a request's caller is known."""

from collections.abc import Mapping
from typing import Any


def name_caller(scope: Mapping[str, Any]) -> str:
    """The caller's name for the audit log. Without keys all that is known is the address."""
    client = scope.get("client")
    return f"http {client[0]}" if client else "http"
