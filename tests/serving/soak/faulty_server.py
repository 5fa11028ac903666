"""`python faulty_server.py dies|hangs TRIGGER ...`: the server, whose batch thread fails once TRIGGER exists.

The product has no hook for this, so the encoder is replaced before the server starts.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from serving.__main__ import main
from serving.bundle import Bundle

how, trigger = sys.argv[1], Path(sys.argv[2])
_embed = Bundle.embed


def embed(self: Bundle, *arguments: Any) -> Any:
    if trigger.exists() and how == "dies":
        raise SystemExit("killed by the test")
    if trigger.exists():
        threading.Event().wait()
    return _embed(self, *arguments)


Bundle.embed = embed  # type: ignore[method-assign]
sys.exit(main(sys.argv[3:]))
