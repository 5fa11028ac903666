"""Training curves by DVCLive and, where they are asked for, by TensorBoard."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cae.errors import UserError
from cae.train.log import Row
from cae.train.loop import RunFolder, Sink
from cae.train.parallel import Ranks

logger = logging.getLogger(__name__)


@contextmanager
def curves(folder: RunFolder, publish_to: Path, tensorboard: bool) -> Iterator[Sink | None]:
    """A sink for a training's rows; the curves grow in the run's folder and are copied to `publish_to` at the end.

    The training replays its rows when it goes on from a checkpoint, so both loggers start anew in every process. None
    for a process that does not lead.
    """
    if not Ranks.from_environment().leads:
        yield None
        return
    path = folder.path / "dvclive"
    with _tensorboard(folder.path / "tensorboard", tensorboard) as to_tensorboard, _dvclive(path) as to_dvclive:

        def sink(step: int, row: Row) -> None:
            for name, value in row.items():
                to_tensorboard(name, value, step)
            to_dvclive(step, row)

        yield sink
    shutil.rmtree(publish_to, ignore_errors=True)
    (path / "plots" / "metrics").mkdir(parents=True, exist_ok=True)
    shutil.copytree(path / "plots" / "metrics", publish_to)


@contextmanager
def _dvclive(path: Path) -> Iterator[Sink]:
    """A sink that draws curves; without DVCLive, one that does nothing."""
    try:
        from dvclive import Live
    except ImportError:
        logger.warning("DVCLive is not installed, so no curves are drawn; `pip install dvclive` adds it")
        yield lambda *_: None
        return
    # No experiment of its own and no files outside its folder: DVC runs the stage already.
    with Live(str(path), resume=False, save_dvc_exp=False, dvcyaml=None) as live:

        def sink(step: int, row: Row) -> None:
            live.step = step
            for name, value in row.items():
                live.log_metric(name, value)
            live.make_summary()

        yield sink


@contextmanager
def _tensorboard(path: Path, wanted: bool) -> Iterator[Callable[[str, float, int], Any]]:
    """A function of (name, value, step); one that does nothing where `wanted` is false."""
    if not wanted:
        yield lambda *_: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "runtime.tensorboard: true needs the package tensorboard, which is not installed; run "
            "`pip install tensorboard`, or set it to false"
        ) from None
    shutil.rmtree(path, ignore_errors=True)
    with SummaryWriter(str(path)) as writer:
        yield writer.add_scalar
