"""A small CAE trained in float64 for 50 steps; each process of the training runs it, with torchrun's variables.

Arguments: folder, ddp or fsdp, micro-batches a step, and the step after which rank 1 kills itself (-1: never).
"""

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cae.architecture import Architecture
from cae.config import OptimizationConfig, parse_params
from cae.data.loader import Batch
from cae.model import ContextAutoencoder
from cae.train.device import Hardware
from cae.train.loop import RunFolder, Training
from cae.train.optimizer import adamw, cosine_schedule
from cae.train.parallel import Ranks, joined, share_out, whole_state
from tests.tiny import shipped_params, with_values

STEPS, BATCH, VOCABULARY = 50, 8, 12
CPU = Hardware(torch.device("cpu"), bf16=False)
CONFIG = OptimizationConfig(epochs=1, batch_size=BATCH, lr=0.002, min_lr=0.0, warmup_epochs=0.1, weight_decay=0.05)


def global_batch(step: int) -> Batch:
    """Images, masks and tokens by the step alone."""
    draw = torch.Generator().manual_seed(step)
    order = torch.stack([torch.randperm(16, generator=draw) for _ in range(BATCH)])
    return {
        "images": torch.randn(BATCH, 1, 16, 16, generator=draw, dtype=torch.float64),
        "visible": order[:, 8:].sort().values,
        "masked": order[:, :8].sort().values,
        "tokens": torch.randint(VOCABULARY, (BATCH, 16), generator=draw),
        "labels": torch.zeros(BATCH, dtype=torch.int64),
        "positions": torch.arange(BATCH) + BATCH * step,
    }


def main(folder: Path, parallel: str, accumulate: int, kill_after: int) -> None:
    parallel, _, compiled = parallel.partition(" ")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    architecture = Architecture(
        channels=1,
        grid=(4, 4),
        patch_size=4,
        depth=2,
        width=16,
        num_heads=2,
        layer_scale=0.1,
        predictor_width=8,
        predictor_num_heads=2,
        regressor_depth=2,
        decoder_depth=2,
        num_outputs=VOCABULARY,
        predictor_layer_scale=0.1,
    )
    runtime = parse_params(
        with_values(
            shipped_params(),
            {
                "runtime.parallel": parallel,
                "runtime.activation_checkpointing": parallel == "fsdp",
                "runtime.compile": bool(compiled),
            },
        )
    ).runtime
    ranks = Ranks.from_environment()

    def micro_batches(start: int) -> Iterable[Batch]:
        for step in range(start, STEPS):
            whole, parts = global_batch(step), accumulate * ranks.count
            for number in range(accumulate):
                part = number * ranks.count + ranks.rank
                yield {key: value.chunk(parts)[part] for key, value in whole.items()}

    with joined(CPU.device):
        model = ContextAutoencoder(architecture, drop_path=0.2).double()
        share_out(model, runtime)

        def step(batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
            if number == kill_after and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            output = model(batch["images"], batch["visible"], batch["masked"])
            tokens = batch["tokens"].gather(1, batch["masked"])
            decoding = F.cross_entropy(output.prediction.flatten(0, 1), tokens.flatten())
            alignment = F.mse_loss(output.z_m, output.z_m_target)
            return decoding + 2 * alignment, {"decoding_loss": decoding, "alignment_loss": alignment}

        optimizer = adamw(model, CONFIG)
        Training(
            name="shared",
            module=model,
            step=step,
            optimizer=optimizer,
            schedule=cosine_schedule(optimizer, CONFIG, STEPS),
            total_steps=STEPS,
            batches=micro_batches,
            hardware=CPU,
            seed=0,
            accumulate_steps=accumulate,
            clip_grad=3.0,
            log_every_steps=1,
        ).run(RunFolder(folder, checkpoint_every_steps=10, stamp={}))
        state = whole_state(model)
        if ranks.leads:
            torch.save(state, folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
