"""CPU that one read of an entity's 30 features costs the process that asks, at 1 and at 64 callers at once.

    python benchmarks/features.py [--rounds 5] [--reads 6400]

The reference is redis-py as it is usually used: a pooled ``redis.asyncio`` client and an HMGET of the 30 fields,
decoded to floats. Ours answer with more: the times of the features too, or the row as the engine takes it. All
are measured in turn, round after round, in one process on uvloop; the figure is the least of all rounds.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import redis.asyncio
import uvloop
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from servers import RedisServer

from phoenix_ml.domain.features import FeatureType, PackedSignature, packed_signature
from phoenix_ml.domain.rows import Column, ElementType
from phoenix_ml.infrastructure.features.cache import CachedFeatures
from phoenix_ml.infrastructure.features.redis import RedisFeatures
from phoenix_ml.infrastructure.features.sqlite import SqliteFeatures

NAMES = [f"feature_{n}" for n in range(30)]
TYPES = dict.fromkeys(NAMES, FeatureType.FLOAT)
ENTITIES = 5_000
CALLERS = (1, 64)
REFERENCE = "redis-py, pool, HMGET × 30"

Read = Callable[[str], Awaitable[object]]


async def cpu_us(read: Read, callers: int, reads: int) -> float:
    """CPU µs of this process a read."""
    entity_ids = [f"cust_{random.randrange(ENTITIES)}" for _ in range(reads)]

    async def call(mine: list[str]) -> None:
        for entity_id in mine:
            await read(entity_id)
            # Each read is of another request, thus of another tick of the loop where there is one caller.
            await asyncio.sleep(0)

    started = time.process_time()
    await asyncio.gather(*(call(entity_ids[caller::callers]) for caller in range(callers)))
    return (time.process_time() - started) / reads * 1e6


async def measured(folder: Path, url: str, rounds: int, reads: int) -> dict[tuple[str, int], float]:
    signature = packed_signature([Column(name, ElementType.FLOAT32) for name in NAMES])
    assert signature is not None
    unpacked = PackedSignature("no row is stored under this", signature.types)
    rows = {f"cust_{n}": {name: random.gauss(0, 1) for name in NAMES} for n in range(ENTITIES)}
    lane, sqlite = RedisFeatures(url, 1000.0), SqliteFeatures(folder / "features.db")
    cache = CachedFeatures(lane, 3_600_000, ENTITIES, lambda: None, lambda: None)
    usual = redis.asyncio.Redis.from_url(url)
    for store in (lane, sqlite):
        await store.write(rows, time.time_ns() // 1_000_000, [signature])
    for entity_id in rows:
        await cache.read_packed(entity_id, signature)

    async def usual_read(entity_id: str) -> object:
        return [float(value or b"nan") for value in await usual.hmget(f"features:{entity_id}", NAMES)]

    async def empty_read(_: str) -> object:
        return None

    ways: dict[str, Read] = {
        "the loop of this benchmark alone": empty_read,
        REFERENCE: usual_read,
        "Redis, HMGET × 30": lambda entity_id: lane.read(entity_id, TYPES),
        "Redis, HMGET × 30, to a row": lambda entity_id: lane.read_packed(entity_id, unpacked),
        "Redis, packed": lambda entity_id: lane.read_packed(entity_id, signature),
        "cache": lambda entity_id: cache.read_packed(entity_id, signature),
        "SQLite": lambda entity_id: sqlite.read(entity_id, TYPES),
        "SQLite, packed": lambda entity_id: sqlite.read_packed(entity_id, signature),
    }
    least: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for callers in CALLERS:
            for way, read in ways.items():
                took = await cpu_us(read, callers, reads)
                least[way, callers] = min(took, least.get((way, callers), took))
    await usual.aclose()
    await lane.close()
    await sqlite.close()
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", type=int, default=6400)
    given = parser.parse_args()
    with RedisServer() as server, tempfile.TemporaryDirectory() as folder:
        least = uvloop.run(measured(Path(folder), server.url, given.rounds, given.reads))
    table = Table("callers", "way", "CPU µs a read", "× redis-py")
    for (way, callers), took in sorted(least.items(), key=lambda item: item[0][1]):
        table.add_row(str(callers), way, f"{took:.2f}", f"{took / least[REFERENCE, callers]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
