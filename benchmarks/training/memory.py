"""Peak memory of one contender, in a process of its own: `python -m benchmarks.training.memory NAME THREADS SETTING`.

Counted from just before the model is built to the end of the third step. CUDA: what torch allocated at most. CPU: the
peak of resident memory, less what was resident before.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.training.contenders import Batch, build
from benchmarks.training.setting import Setting

STEPS = 3  # the moments are there from the first on, and gradients of one step meet the next one's activations
KIB = 1024


def main() -> None:
    name, threads, fields = sys.argv[1:]
    values = json.loads(fields)
    torch.set_num_threads(int(threads))
    setting = Setting(**{**values, "device": torch.device(values["device"])})
    batch = Batch.draw(setting)
    # What is imported or set up at first use is no memory of the step.
    (torch.randn(64, 64, device=setting.device) @ torch.randn(64, 64, device=setting.device)).sum().item()
    if name in ("beit", "mae"):
        import transformers.models.beit.modeling_beit
        import transformers.models.vit_mae.modeling_vit_mae  # noqa: F401
    else:
        import benchmarks.training.ours  # noqa: F401
    before = _start(setting.device)
    step = build(name, batch)
    for _ in range(STEPS):
        step()
    sys.stdout.write(f"{_peak(setting.device) - before}\n")


def _start(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return KIB * int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    main()
