"""The reference: an empty raw-ASGI echo on stock uvicorn (httptools, uvloop). Argument: port."""

import sys
from typing import Any

import uvicorn


async def app(_scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    body = message.get("body", b"")
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        http="httptools",
        loop="uvloop",
        log_level="warning",
        access_log=False,
        lifespan="off",
    )
