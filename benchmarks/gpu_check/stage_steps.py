"""The training of every stage, built as the stage builds it but not run, by the stage's name."""

from collections.abc import Callable

from torch.optim import SGD

from cae.heads import AttentiveHead
from cae.normalization import Normalization
from cae.train.device import Hardware
from cae.train.loop import Training
from cae.weights import for_finetuning, load_trained, trained_encoder
from pipeline import finetune, pretrain, probe, tokenizer
from pipeline.frozen_features import MOMENTUM
from pipeline.workspace import Workspace


def _tokenizer(workspace: Workspace, hardware: Hardware) -> Training:
    normalization = Normalization(workspace.index.mean, workspace.index.std)
    dvae = tokenizer.build(workspace.params, normalization).to(hardware.device)
    return tokenizer.dvae_training(workspace, dvae, hardware)


def _pretrain(workspace: Workspace, hardware: Hardware) -> Training:
    return pretrain.build(workspace, hardware).training


def _finetune(workspace: Workspace, hardware: Hardware) -> Training:
    trained, config = load_trained(workspace.pretrained), workspace.params.finetune
    encoder, _ = for_finetuning(trained, config.drop_path, config.relative_position_bias, seed=None)
    return finetune.build(workspace, encoder, trained, hardware)[0]


def _linear(workspace: Workspace, hardware: Hardware) -> Training:
    frozen, config = _frozen(workspace, hardware), workspace.params.probe.linear
    head, optimizer = probe.linear_probe(frozen.width, len(workspace.index.classes), config)
    return probe.probe_training(workspace, frozen, head, optimizer, config, probe.class_token)


def _attentive(workspace: Workspace, hardware: Hardware) -> Training:
    frozen, config = _frozen(workspace, hardware), workspace.params.probe.attentive
    head = AttentiveHead(frozen.width, frozen.trained.architecture.num_heads, len(workspace.index.classes))
    optimizer = SGD(head.parameters(), config.lr, MOMENTUM, weight_decay=config.weight_decay)
    return probe.probe_training(workspace, frozen, head, optimizer, config, probe.patches)


def _frozen(workspace: Workspace, hardware: Hardware) -> probe.FrozenEncoder:
    trained = load_trained(workspace.pretrained)
    return probe.FrozenEncoder("pretrained", trained_encoder(trained), trained, hardware)


BUILDERS: dict[str, Callable[[Workspace, Hardware], Training]] = {
    "tokenizer": _tokenizer,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "probe_linear": _linear,
    "probe_attentive": _attentive,
}
