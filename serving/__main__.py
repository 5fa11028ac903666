"""`python -m serving`: open a bundle and serve it until told to stop. Flags win over CAE_SERVING_ variables."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, get_args

import uvicorn
from pydantic import ValidationError

from serving.app import create_app
from serving.bundle import Bundle, Device
from serving.bundle_info import BundleError, BundleMissingError
from serving.settings import Settings

# As argparse: the call, not the program, is at fault.
EXIT_REFUSED = 2
# As `cae-pipe` has it for whatever another command makes first.
EXIT_NOT_READY = 5


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, finish what was begun, and return or exit with code 0.

    Everything that can be wrong with the bundle or the device is found before the port is opened. Errors: BundleError.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    # uvicorn raises the signal again after its graceful stop, which would end the process as killed by it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    bundle = Bundle.open(settings.bundle, settings.device, settings.num_threads)
    uvicorn.run(create_app(settings, bundle), host=settings.host, port=settings.port, log_config=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `python -m serving`.

    With one line on stderr: 5 if there is no bundle yet, 2 if settings, bundle or device will not do.
    """
    try:
        serve(_settings(arguments))
    except BundleError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_NOT_READY if isinstance(error, BundleMissingError) else EXIT_REFUSED
    except ValidationError as error:
        first = error.errors()[0]
        key = "_".join(map(str, first["loc"]))
        sys.stderr.write(
            f"error: {key} (--{key} or CAE_SERVING_{key.upper()}): {first['msg']}, got {first['input']!r}\n"
        )
        return EXIT_REFUSED
    return 0


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--bundle", metavar="DIR", help="folder that `export` wrote (default: models/bundle)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (default: 8000)")
    parser.add_argument("--device", choices=get_args(Device), help="default: auto")
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return Settings(**given)


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
