"""Requests to servers of others, which may be slow without end, and may answer without end."""

import asyncio
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used
    import httpx


def request_within(
    limit_s: float, most_bytes: int, method: str, url: "httpx.URL | str", **request: Any
) -> tuple[int, bytes]:
    """The status and the body, of which what is beyond ``most_bytes`` is not read; ``request`` is what httpx takes.

    Raises httpx.HTTPError, a ReadTimeout where the whole takes longer than ``limit_s``, and httpx.InvalidURL.
    """
    import httpx

    # The library's own limits are for one read each: a byte a second keeps them all.
    async def ask() -> tuple[int, bytes]:
        # Not packed: a few bytes could become many.
        plain = {"accept-encoding": "identity"}
        async with (
            asyncio.timeout(limit_s),
            httpx.AsyncClient(timeout=limit_s, headers=plain) as client,
            client.stream(method, url, **request) as response,
        ):
            body = b""
            async for part in response.aiter_raw():
                body += part
                if len(body) >= most_bytes:
                    break
            return response.status_code, body[:most_bytes]

    try:
        return asyncio.run(ask())
    except TimeoutError as exc:
        raise httpx.ReadTimeout(f"no whole answer within {limit_s:g} s") from exc
    except httpx.ConnectError as exc:
        raise httpx.ConnectError(_why(exc)) from exc


def _why(exc: BaseException) -> str:
    """What lies beneath: the error itself says no more than that all attempts have failed."""
    while beneath := (
        exc.exceptions[-1] if isinstance(exc, BaseExceptionGroup) else exc.__cause__ or exc.__context__
    ):
        exc = beneath
    if isinstance(exc, ConnectionError) and exc.errno:
        return os.strerror(exc.errno)  # else it has words of asyncio's
    return str(exc)
