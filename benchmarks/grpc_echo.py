"""The reference for gRPC: grpc.aio that answers ModelInfer with a constant. Arguments: port, the answers as hexadecimal JSON."""

import asyncio
import json
import sys
from typing import Any

import grpc
import uvloop


async def main() -> None:
    answers = {name: bytes.fromhex(answer) for name, answer in json.loads(sys.argv[2]).items()}

    def handler(answer: bytes) -> Any:
        async def handle(_: bytes, __: Any) -> bytes:
            return answer

        return grpc.unary_unary_rpc_method_handler(handle)

    server = grpc.aio.server()
    handlers = {name: handler(answer) for name, answer in answers.items()}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),)
    )
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(main())
