"""How a run can end other than by finishing."""

import signal


class UserError(Exception):
    """Bad input. The message names the file, key or value, what was expected and what to do.

    The command line prints it without a traceback.
    """


class NotReady(UserError):  # noqa: N818 (a state of the workspace)
    """Something that another command makes first is not there. The message names that command."""


class WorkerDied(UserError):  # noqa: N818 (a state of the run)
    """A process that reads images died. The message names it and the image."""


class Diverged(UserError):  # noqa: N818 (a state of the run)
    """A training came to nothing: the loss is no longer a number, or the codebook collapsed."""


class Interrupted(Exception):  # noqa: N818 (being asked to stop is no error)
    """A training was asked to stop. `saved` tells whether everything up to this moment is in a checkpoint."""

    def __init__(self, signal_number: int, step: int, saved: bool) -> None:
        outcome = "which is saved; run again to go on from there" if saved else "and starts anew when run again"
        super().__init__(f"stopped by {signal_name(signal_number)} after step {step}, {outcome}")
        # As a shell reports a process that the signal ended.
        self.exit_code = 128 + signal_number


def signal_name(number: int) -> str:
    """Such as SIGKILL; real-time signals have only numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
