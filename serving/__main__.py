"""`python -m serving`: serve a bundle until told to stop. Flags win over CAE_SERVING_ variables, these over a file."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, get_args

from pydantic import ValidationError
from pydantic_settings import SettingsError

from serving import logs
from serving.bundle import Bundle, Device
from serving.bundle_info import BundleError, BundleMissingError
from serving.server import Server
from serving.service import Service
from serving.settings import PREFIX, Settings

FLAGS = {
    "bundle": "folder that `export` wrote (default: models/bundle)",
    "host": "address to listen on (default: 127.0.0.1)",
    "port": "port to listen on (default: 8000)",
    "device": "where to run (default: auto)",
    "config": "TOML file with these and all other settings",
}
EXIT_FAILED = 1
# As argparse: the call, not the program, is at fault.
EXIT_REFUSED = 2
# As `cae-pipe` has it for whatever another command makes first.
EXIT_NOT_READY = 5


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C, finish what was admitted, and return 0; 1 where the batch thread died.

    Everything that can be wrong with the bundle or the device is found before the port is opened. Errors: BundleError.
    """
    logs.configure(settings.log_level, settings.log_format)
    # For the time until the server takes the signals over.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    bundle = Bundle.open(settings.bundle, settings.device, settings.num_threads, settings.precision)
    server = Server(Service(bundle, settings))
    server.run()
    code = EXIT_FAILED if server.failed else 0
    if server.left_behind:
        # At its end the interpreter takes down what a thread in the model still uses, and that crashes or hangs.
        logging.shutdown()
        os._exit(code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `python -m serving`.

    With one line on stderr: 5 if there is no bundle yet, 2 if settings, bundle or device will not do.
    """
    try:
        return serve(_settings(arguments))
    except BundleError as error:
        message, code = str(error), EXIT_NOT_READY if isinstance(error, BundleMissingError) else EXIT_REFUSED
    except ValidationError as error:
        message, code = _wrong(error), EXIT_REFUSED
    except SettingsError as error:
        message, code = str(error), EXIT_REFUSED
    sys.stderr.write(f"error: {message}\n")
    return code


def _wrong(error: ValidationError) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0])
    flag = f"--{key}, " if key in FLAGS else ""
    # A key is not for terminals and logs, not even a bad one.
    given = "" if key == "api_key" else f", got {first['input']!r}"
    return f"{key} ({flag}{PREFIX}{key.upper()}, or in the file of settings): {first['msg']}{given}"


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", help=text, choices=get_args(Device) if name == "device" else None)
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return Settings(**given)


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
