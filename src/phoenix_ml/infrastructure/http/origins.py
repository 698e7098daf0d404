"""What web pages may not do: use, through a visitor's browser, a server that only the visitor can reach.

Any page may send requests to any address, and one whose own name is made to lead to this machine (DNS
rebinding) may read the answers, too. The browser tells in ``Origin`` whose page asks, and in ``Host`` under
which name it knows us; programs other than browsers send no ``Origin``.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Final

from phoenix_ml.domain.errors import CrossSiteRequest, Forbidden, HostNotAllowed
from phoenix_ml.settings import Settings

_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORT: Final = {"http": ":80", "https": ":443"}
_SHOWN: Final = 100

Check = Callable[[Mapping[str, Any]], Forbidden | None]


def browser_check(settings: Settings) -> Check:
    """Why the request of an ASGI scope is refused; None for one that is not."""
    allowed = {_name(entry.strip()) for entry in settings.allowed_hosts.lower().split(",")} - {""}
    any_host = not settings.is_loopback and not allowed

    @lru_cache(maxsize=64)
    def is_ours(host: bytes) -> bool:
        name = _name(host.decode("latin-1").lower())
        return any_host or name in allowed or _is_loopback(name)

    def check(scope: Mapping[str, Any]) -> Forbidden | None:
        host, origin = b"", None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
        if host and not is_ours(host):
            shown = host.decode("latin-1")[:_SHOWN]
            return HostNotAllowed(
                f"the host {shown!r} is not one of this server's: call it localhost, or list the name in "
                "PHOENIX_ALLOWED_HOSTS if a proxy passes it on",
                host=shown,
            )
        if origin is None or scope["method"] in _READING or _is_same(origin, host):
            return None
        shown = origin.decode("latin-1")[:_SHOWN]
        return CrossSiteRequest(
            f"a page of {shown!r} may not send {scope['method']} to this server: use a page of this server, or "
            "a program that sends no Origin; a proxy in front must pass the Host header on",
            origin=shown,
            host=host.decode("latin-1")[:_SHOWN],
        )

    return check


def _name(host: str) -> str:
    """The host without its port."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_same(origin: bytes, host: bytes) -> bool:
    scheme, _, place = origin.decode("latin-1").lower().partition("://")
    # Browsers leave the default port out; proxies may put it in.
    port = _DEFAULT_PORT.get(scheme, "")
    return place.removesuffix(port) == host.decode("latin-1").lower().removesuffix(port)
