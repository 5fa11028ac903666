"""How a run can end other than by finishing."""

import signal


class UserError(Exception):
    """Bad input. The message names the file, key or value, what was expected and what to do.

    The command line prints it without a traceback.
    """


class Diverged(UserError):  # noqa: N818 (a state of the run)
    """The loss is no longer a number."""


class Interrupted(Exception):  # noqa: N818 (being asked to stop is no error)
    """A training was asked to stop; everything up to this moment is in a checkpoint."""

    def __init__(self, signal_number: int, step: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved; run again to go on from there")
        # As a shell reports a process that the signal ended.
        self.exit_code = 128 + signal_number
