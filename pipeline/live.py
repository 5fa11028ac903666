"""Training curves by DVCLive."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dvclive import Live

from cae.train.log import Row
from cae.train.loop import RunFolder


@contextmanager
def curves(folder: RunFolder, publish_to: Path) -> Iterator[Callable[[int, Row], None]]:
    """A sink for a training's rows; the curves grow in the run's folder and are copied to `publish_to` at the end.

    The training replays its rows when it goes on from a checkpoint, so DVCLive starts anew in every process.
    """
    path = folder.path / "dvclive"
    # No experiment of its own and no files outside its folder: DVC runs the stage already.
    with Live(str(path), resume=False, save_dvc_exp=False, dvcyaml=None) as live:

        def sink(step: int, row: Row) -> None:
            live.step = step
            for name, value in row.items():
                live.log_metric(name, value)
            live.make_summary()

        yield sink
    shutil.rmtree(publish_to, ignore_errors=True)
    (path / "plots" / "metrics").mkdir(parents=True, exist_ok=True)
    shutil.copytree(path / "plots" / "metrics", publish_to)
