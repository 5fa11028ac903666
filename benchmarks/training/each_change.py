"""What each change of our step brings: the step again with one of them undone, in turn.

`python -m benchmarks.training.each_change`; optional arguments: fp32 or bf16, and rounds.
"""

import statistics
import sys
from contextlib import ExitStack

import torch

from benchmarks.training import alone, contest
from benchmarks.training.changes import UNDONE
from benchmarks.training.setting import Setting

MIB = 2**20


def main() -> None:
    precision, rounds = [*sys.argv[1:], *("fp32", "7")[len(sys.argv) - 1 :]]
    num_rounds = int(rounds)
    setting = Setting("vit_small", 224, 16, 16, torch.device("cpu"), precision, compile=False)
    with ExitStack() as stack:
        threads = torch.get_num_threads()
        running = [stack.enter_context(alone.started(name, setting, threads)) for name in ("cae", *UNDONE)]
        times = contest.interleaved(running, num_rounds)
    for contender in running:
        values = times[contender.name]
        ratio = statistics.median(value / base for value, base in zip(values, times["cae"], strict=True))
        sys.stdout.write(
            f"{contender.name}: {statistics.median(values):.2f} s, {ratio:.3f} times ours, "
            f"{contender.peak_bytes / MIB:,.0f} MiB\n"
        )


if __name__ == "__main__":
    main()
