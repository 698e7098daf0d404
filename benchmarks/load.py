"""The load that our own benchmarks put on servers: the generator of ``phoenix-ml bench``."""

from phoenix_ml.bench import Load, Target, cpu_seconds, run_load

__all__ = ["LOCAL", "Load", "Target", "cpu_seconds", "local", "post", "run_load"]

LOCAL = "127.0.0.1"


def local(port: int) -> Target:
    """A server of ours on this machine."""
    return Target(LOCAL, port)


def post(path: str, body: bytes) -> bytes:
    """An HTTP/1.1 request as bytes."""
    return local(80).post(path, body)
