"""When the process decides to end. What a running one does is in soak/test_end.py."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import pytest

from serving.bundle import Bundle
from serving.server import Server
from serving.service import Service
from serving.settings import Settings


@pytest.mark.parametrize(("since_last_tick_s", "ends"), [(0.1, True), (100.0, False)])
def test_silence_counts_only_where_the_process_itself_was_awake(
    tiny_bundle: Path, since_last_tick_s: float, ends: bool
) -> None:
    """After a pause of the whole process, by `docker pause` say, nobody has shown that he lives."""
    server = Server(Service(Bundle.open(tiny_bundle, "cpu"), Settings(bundle=tiny_bundle)))

    async def tick() -> None:
        # The batch thread is not started: to the server it is silent for ever.
        server._last_tick = time.monotonic() - since_last_tick_s
        await server.on_tick(1)
        assert server.failed is ends
        # Once it was awake for a while it is not excused any more.
        server._trusted_until = 0.0
        await server.on_tick(2)
        assert server.failed

    anyio.run(tick)
    server._warming.join()
