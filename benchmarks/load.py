"""The load: so many connections, each sending one prepared request after the other. Cheap, for it shares the cores.

python -m benchmarks.load HOST PORT REQUEST_FILE NUM_CLIENTS WARM_UP_S SECONDS   (prints one line of JSON)
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path


def request(path: str, body: bytes, content_type: str, accept: str) -> bytes:
    """The bytes of one POST over a connection that is kept."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: {content_type}\r\nAccept: {accept}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, content: bytes) -> tuple[int, bytes]:
    """Send one request; the status and the body of its answer."""
    writer.write(content)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


async def connection(
    host: str, port: int, content: bytes, until: float, answers: list[tuple[float, float, int]]
) -> None:
    """Add (when it came, how long it took, status) of every answer."""
    reader, writer = await asyncio.open_connection(host, port)
    while (sent := time.perf_counter()) < until:
        status, _ = await exchange(reader, writer, content)
        came = time.perf_counter()
        answers.append((came, came - sent, status))
    writer.close()


async def measure(
    host: str, port: int, content: bytes, num_clients: int, warm_up_s: float, seconds: float
) -> dict[str, float]:
    """Throughput and latencies of the answers that came within `seconds`, after the warm-up."""
    start, cpu = time.perf_counter() + warm_up_s, time.process_time()
    answers: list[tuple[float, float, int]] = []
    await asyncio.gather(*(connection(host, port, content, start + seconds, answers) for _ in range(num_clients)))
    counted = [(took, status) for came, took, status in answers if start <= came < start + seconds]
    latencies = sorted(took for took, _ in counted) or [float("nan")]
    return {
        "images_per_s": len(counted) / seconds,
        "p50_ms": 1000 * statistics.median(latencies),
        "p99_ms": 1000 * latencies[int(0.99 * len(latencies))],
        "num_failed": float(sum(status != 200 for *_, status in answers)),
        "client_cpu_ms_per_request": 1000 * (time.process_time() - cpu) / max(1, len(answers)),
    }


def main(arguments: list[str]) -> None:
    host, port, file, num_clients, warm_up_s, seconds = arguments
    content = Path(file).read_bytes()
    figures = measure(host, int(port), content, int(num_clients), float(warm_up_s), float(seconds))
    sys.stdout.write(json.dumps(asyncio.run(figures)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
