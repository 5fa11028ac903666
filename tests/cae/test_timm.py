"""Our encoder is a timm model and back without loss; timm's own models work behind the same methods."""

from typing import Any

import pytest
import timm
import torch

from cae.architecture import EncoderArchitecture, TimmSource
from cae.errors import UserError
from cae.heads import Classifier
from cae.model import Encoder, build_encoder
from cae.timm_encoder import TimmEncoder, architecture_of, create
from cae.timm_weights import from_timm, to_timm
from cae.train.optimizer import adamw
from tests.cae.test_train import optimization

SIZES = {"channels": 13, "grid": (6, 10), "patch_size": 4, "depth": 3, "width": 32, "num_heads": 4, "layer_scale": 0.1}
# Kinds of model: a class token; registers as well; registers and the mean of the patches, no class token; a fresh norm
# on the mean; rotary positions; relative positions.
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "registers": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 4}),
    "average": ("vit_tiny_patch16_224", {**SMALL, "class_token": False, "reg_tokens": 3, "global_pool": "avg"}),
    "norm of the mean": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "fc_norm": True}),
    "rotary": ("eva02_tiny_patch14_224", SMALL),
    "relative": ("beit_base_patch16_224", SMALL),
}


def moved(module: Any) -> Any:
    """Weights that no initialisation gives, so that every one of them shows."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


def make(kind: str) -> tuple[TimmEncoder, EncoderArchitecture]:
    name, args = KINDS[kind]
    source = TimmSource(name=name, args=args)
    architecture = architecture_of(create(source), source)
    encoder = build_encoder(architecture)
    assert isinstance(encoder, TimmEncoder)
    return moved(encoder), architecture


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("final_norm", ["tokens", "pooled"])
def test_our_encoder_is_a_timm_model_and_back(relative: bool, final_norm: str) -> None:
    architecture = EncoderArchitecture.model_validate(
        {**SIZES, "final_norm": final_norm, "relative_position_bias": relative}
    )
    encoder = moved(Encoder(architecture))
    source, state = to_timm(encoder, architecture)
    model = timm.create_model(source.name, num_classes=0, **source.args).eval()
    model.load_state_dict(state, strict=True)
    images = torch.randn(2, 13, 24, 40)
    with torch.no_grad():
        ours, theirs = encoder(images), model.forward_features(images)
        assert (ours - theirs).abs().max() < 1e-5
        if final_norm == "pooled":
            assert (encoder.pool(ours[:, 1:]) - model(images)).abs().max() < 1e-5
    back = from_timm(source, model.state_dict())
    assert back is not None
    assert back[1] == architecture
    assert all(torch.equal(value, back[0].state_dict()[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("key", ["pos_embed", "blocks.1.attn.qkv.bias"])
def test_a_timm_model_that_ours_could_not_give_back_is_left_to_timm(key: str) -> None:
    architecture = EncoderArchitecture.model_validate(SIZES)
    source, state = to_timm(moved(Encoder(architecture)), architecture)
    state[key] = state[key] + 1e-3
    assert from_timm(source, state) is None
    plain = TimmSource(name="vit_tiny_patch16_224", args=SMALL)
    assert from_timm(plain, create(plain).state_dict()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_timm(kind: str) -> None:
    encoder, architecture = make(kind)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, attention = encoder.forward_with_attention(images)
        theirs = encoder.model.forward_features(images)
    assert architecture.grid == (4, 4)
    prefix = encoder.model.num_prefix_tokens
    assert torch.allclose(tokens[:, encoder.num_prefix :], theirs[:, prefix:], atol=1e-5)
    if kind == "average":
        assert encoder.num_prefix == 0
        assert attention is None
        return
    assert torch.allclose(tokens[:, 0], theirs[:, 0], atol=1e-5)
    assert attention is not None
    assert attention.shape == (2, 2, 16)
    assert (attention > 0).all()
    assert (attention.sum(-1) < 1).all()


def test_the_pooled_feature_is_what_timms_own_head_reads() -> None:
    encoder, architecture = make("norm of the mean")
    assert architecture.final_norm == "pooled"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder.pool(encoder(images)[:, 1:]), encoder.model(images), atol=1e-6)


@pytest.mark.parametrize("kind", ["class token", "registers", "average"])
def test_a_plain_vision_transformer_encodes_a_part_of_the_patches(kind: str) -> None:
    encoder, _ = make(kind)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embedded = encoder.embed(images)
        assert torch.allclose(encoder.encode(embedded), encoder(images), atol=1e-5)
        part = encoder.encode(embedded[:, [0, 5, 9]])
        other = images.clone()
        other[:, :, 8:16, 24:] += 1  # patch 7, which is not shown
        assert torch.equal(encoder.encode(encoder.embed(other)[:, [0, 5, 9]]), part)
    assert part.shape == (2, encoder.num_prefix + 3, 32)


def test_other_models_say_that_they_cannot_be_shown_a_part() -> None:
    encoder, _ = make("rotary")
    with pytest.raises(UserError, match=r"Eva: only timm's plain VisionTransformer of a fixed size can be pretrained"):
        encoder.embed(torch.randn(1, 3, 32, 32))


def test_the_target_pass_goes_without_drop_path() -> None:
    name, args = KINDS["class token"]
    source = TimmSource(name=name, args=args)
    encoder = TimmEncoder(architecture_of(create(source), source), drop_path=0.9).train()
    embedded = encoder.embed(torch.randn(8, 3, 32, 32))
    assert torch.equal(encoder.encode(embedded, False), encoder.encode(embedded, False))
    assert not torch.equal(encoder.encode(embedded), encoder.encode(embedded))
    assert encoder.model.blocks.training


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_timm_learn_slower_the_deeper_they_lie(kind: str) -> None:
    _, architecture = make(kind)
    encoder = build_encoder(architecture.model_copy(update={"final_norm": "pooled"}))
    classifier = Classifier(encoder, 32, 4)
    optimizer = adamw(classifier, optimization(weight_decay=0.05), layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in classifier.named_parameters():
        block = name.split(".")[3] if ".blocks." in name else None
        layer = int(block) + 1 if block else 3 if name.startswith(("head", "encoder.model.fc_norm")) else 0
        assert scales[id(parameter)] == 0.5 ** (3 - layer), name


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224"])
def test_what_gives_no_token_a_patch_is_refused(name: str) -> None:
    source = TimmSource(name=name, args={})
    with pytest.raises(UserError, match=rf"{name}: no Vision Transformer with one token for each square patch"):
        architecture_of(create(source), source)


def test_what_timm_cannot_build_is_named() -> None:
    with pytest.raises(UserError, match=r"timm .* cannot build vit_tiny_patch16_224 with .*'depht'"):
        create(TimmSource(name="vit_tiny_patch16_224", args={"depht": 3}))
