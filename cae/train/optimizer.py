"""AdamW as the paper uses it, with layer decay for fine-tuning; the schedule beside it."""

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer

from cae.config import OptimizationConfig
from cae.data.order import steps_in, total_steps

BETAS = (0.9, 0.999)
EPS = 1e-8


def adamw(module: nn.Module, config: OptimizationConfig, layer_decay: float | None = None) -> AdamW:
    """Fused AdamW; biases, norms, gains and the learned tokens are not decayed.

    `layer_decay` needs `module.group_matcher`, as timm's models have it; each group then carries its `lr_scale`,
    which timm's schedules multiply in.
    """
    tokens = ("cls_token", "mask_query", "reg_token", "pos_embed")
    no_decay = [name for name, _ in module.named_parameters() if name.endswith(tokens)]
    if layer_decay is None:
        groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(
            module, config.weight_decay, no_weight_decay_list=no_decay, layer_decay=layer_decay
        )
    return AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=True)


def cosine_schedule(optimizer: Optimizer, config: OptimizationConfig, num_samples: int) -> CosineLRScheduler:
    """Linear warm-up, then cosine to `min_lr` at the last step; advanced by step, not by epoch."""
    total = total_steps(num_samples, config.batch_size, config.epochs)
    warmup = min(steps_in(config.warmup_epochs, num_samples, config.batch_size), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
