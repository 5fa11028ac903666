"""A training of a stage: what follows from the parameters and from the prepared images."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from cae.config import OptimizationConfig
from cae.data.loader import Transform
from cae.data.order import Share, total_steps
from cae.train.alarm import Alarm
from cae.train.device import Hardware
from cae.train.loop import Sink, Training
from cae.train.optimizer import cosine_schedule
from cae.train.parallel import Ranks
from cae.train.step import StepFunction
from pipeline.batches import train_batches
from pipeline.workspace import Workspace


def stage_training(
    workspace: Workspace,
    config: OptimizationConfig,
    hardware: Hardware,
    *,
    name: str,
    module: nn.Module,
    step: StepFunction,
    optimizer: Optimizer,
    transform: Transform,
    sink: Sink | None,
    clip_grad: float | None = None,
    log_every_steps: int = Training.log_every_steps,
    alarms: tuple[Alarm, ...] = (),
    before_step: Callable[[int], None] | None = None,
) -> Training:
    """This process's share of a training on the prepared images, for the epochs of the stage's section `config`.

    Raises UserError when the images do not fill one batch.
    """
    params, shards = workspace.params, workspace.shards("train")
    num_train = workspace.index.count["train"]
    num_steps = total_steps(num_train, config.batch_size, config.epochs)
    ranks = Ranks.from_environment()
    share = Share(ranks.rank, ranks.count, params.runtime.accumulate_steps)
    return Training(
        name=name,
        module=module,
        step=step,
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config, num_train),
        total_steps=num_steps,
        batches=train_batches(
            workspace,
            transform,
            batch_size=config.batch_size,
            total_steps=num_steps,
            share=share,
            hardware=hardware,
        ),
        hardware=hardware,
        seed=params.seed,
        accumulate_steps=params.runtime.accumulate_steps,
        max_skipped_steps=params.runtime.max_skipped_steps,
        clip_grad=clip_grad,
        log_every_steps=log_every_steps,
        alarms=alarms,
        before_step=before_step,
        sink=sink,
        keys_of=lambda positions: [shards.key(position) for position in positions.tolist()],
    )
