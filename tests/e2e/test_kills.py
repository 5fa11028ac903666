"""`kill -9` at random moments of one pretraining, again and again: nothing is lost and the weights are the same bytes.

Three kills in `make test`, twenty in `make soak`.
"""

import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cae.train.checkpoint import CheckpointStore, load_checkpoint
from tests.e2e.conftest import TIMEOUT_S, Clone

NUM_KILLS = 20 if os.environ.get("CAE_SOAK") else 3
# Importing torch takes some seconds; a kill then says little, so most come later.
SHARE_BEFORE_TRAINING = 0.2
START_S, LATEST_S = 4.0, 0.4

logger = logging.getLogger(__name__)


def saved_step(clone: Clone) -> int:
    """The step of the newest checkpoint that is whole; 0 for none."""
    folders = list(clone.root.glob("scratch/pretrain-*/checkpoints"))
    path = CheckpointStore(folders[0], 1, None).newest() if folders else None
    return load_checkpoint(path)["step"] if path else 0


def kill_at_random(clone: Clone, rng: random.Random) -> bool:
    """Start pretraining and kill it and all below it; whether it had ended before."""
    before = saved_step(clone)
    process = clone.start("cae-pipe", "pretrain")
    if rng.random() < SHARE_BEFORE_TRAINING:
        time.sleep(rng.uniform(0, START_S))
    else:
        deadline = time.monotonic() + TIMEOUT_S
        while saved_step(clone) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, LATEST_S))
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    return ended


def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    reproduced: Clone, make_clone: Callable[[Path], Clone], tmp_path: Path
) -> None:
    clone = make_clone(tmp_path / "clone")
    for made in ("data/prepared", "models/tokenizer"):
        shutil.copytree(reproduced.root / made, clone.root / made)
    rng = random.Random(0)
    kills, newest = 0, 0
    while kills < NUM_KILLS:
        ended = kill_at_random(clone, rng)
        kills += not ended
        step = saved_step(clone)
        logger.info("kill %d: the newest whole checkpoint is of step %d", kills, step)
        assert step >= newest, "a checkpoint was lost"
        newest = step
        if ended:
            # It was faster than the kills; the rest of them fall on a new run.
            assert_same_outcome(clone, reproduced)
            shutil.rmtree(clone.root / "scratch")
            newest = 0
    clone.run("cae-pipe", "pretrain")
    assert_same_outcome(clone, reproduced)


def assert_same_outcome(clone: Clone, uninterrupted: Clone) -> None:
    for made in ("models/pretrain/cae.safetensors", "metrics/pretrain.json"):
        assert (clone.root / made).read_bytes() == (uninterrupted.root / made).read_bytes()
    rows = [_rows(place) for place in (clone, uninterrupted)]
    assert rows[0] == rows[1]


def _rows(clone: Clone) -> list[dict[str, float]]:
    """The log, without what differs from run to run."""
    path = next(clone.root.glob("scratch/pretrain-*/log.jsonl"))
    kept = ("step", "loss", "decoding_loss", "alignment_loss", "grad_norm", "lr")
    return [{key: row[key] for key in kept} for row in map(json.loads, path.read_text().splitlines())]
