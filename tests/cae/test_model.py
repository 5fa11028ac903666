"""The Context Autoencoder: what depends on what, where gradients go, how it starts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.architecture import Architecture
from cae.blocks import Attention, Block, RegressorBlock
from cae.model import ContextAutoencoder, Encoder, alignment_loss, drop_path_rates, gather_patches
from cae.targets import hide, patchify, unpatchify

MakeArchitecture = Callable[..., Architecture]
DrawMasks = Callable[..., tuple[Tensor, Tensor]]
BATCH = 2
NUM_MASKED = 9


def images_for(architecture: Architecture, batch: int = BATCH) -> Tensor:
    rows, columns = architecture.grid
    side = architecture.patch_size
    return torch.randn(batch, architecture.channels, rows * side, columns * side)


def stir(module: nn.Module) -> None:
    """Random values everywhere, also in biases, norms and gains that start at constants."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)


class Case:
    """A model in eval mode with images and masks that fit it."""

    def __init__(self, make: MakeArchitecture, draw: DrawMasks, changes: dict[str, Any], **options: Any) -> None:
        self.architecture = make(**changes)
        self.model = ContextAutoencoder(self.architecture, **options).eval()
        stir(self.model)
        self.images = images_for(self.architecture)
        num_patches = self.architecture.grid[0] * self.architecture.grid[1]
        self.visible, self.masked = draw(self.architecture.grid, min(NUM_MASKED, num_patches - 1), BATCH)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.visible, self.masked


@pytest.fixture
def make_case(make_architecture: MakeArchitecture, draw_masks: DrawMasks) -> Callable[..., Case]:
    return lambda options=None, **changes: Case(make_architecture, draw_masks, changes, **(options or {}))


MakeCase = Callable[..., Case]


@pytest.mark.parametrize("predictor_width", [16, 8])
def test_masked_pixels_change_nothing_of_the_prediction(make_case: MakeCase, predictor_width: int) -> None:
    case = make_case(predictor_width=predictor_width)
    changed = hide(case.images, case.visible, torch.tensor([5.0, -3.0, 8.0]), case.architecture.patch_size)
    assert not torch.equal(changed, case.images)
    before, after = case.model(*case.inputs), case.model(changed, case.visible, case.masked)
    assert torch.equal(before.z_m, after.z_m)
    assert torch.equal(before.prediction, after.prediction)
    assert not torch.allclose(before.z_m_target, after.z_m_target)


def test_visible_pixels_change_the_prediction_and_not_the_alignment_target(make_case: MakeCase) -> None:
    case = make_case()
    changed = hide(case.images, case.masked, torch.tensor([5.0, -3.0, 8.0]), case.architecture.patch_size)
    before, after = case.model(*case.inputs), case.model(changed, case.visible, case.masked)
    assert not torch.allclose(before.z_m, after.z_m)
    assert not torch.allclose(before.prediction, after.prediction)
    assert torch.equal(before.z_m_target, after.z_m_target)


def test_the_alignment_target_is_the_encoder_on_the_masked_patches_without_class_token(make_case: MakeCase) -> None:
    case = make_case()
    target = case.model(*case.inputs).z_m_target
    encoder = case.model.encoder
    expected = encoder.encode(gather_patches(encoder.embed(case.images), case.masked))[:, 1:]
    assert not target.requires_grad
    assert target.shape == (BATCH, NUM_MASKED, 16)
    assert torch.equal(target, expected)


def test_the_alignment_loss_trains_regressor_and_encoder_and_not_the_decoder(make_case: MakeCase) -> None:
    model = (case := make_case(predictor_width=8)).model
    output = model(*case.inputs)
    alignment_loss(output.z_m, output.z_m_target).backward()
    for part in (model.encoder, model.projection, model.regressor):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_the_alignment_gradient_comes_through_the_visible_branch_alone(make_case: MakeCase) -> None:
    case = make_case()
    case.images.requires_grad_()
    output = case.model(*case.inputs)
    alignment_loss(output.z_m, output.z_m_target).backward()
    assert case.images.grad is not None
    patch = case.architecture.patch_size
    gradient = F.unfold(case.images.grad, patch, stride=patch).abs().sum(1)
    assert (gradient.gather(1, case.masked) == 0).all()
    assert (gradient.gather(1, case.visible) > 0).all()


def test_the_alignment_loss_is_a_mean_squared_error_in_float32_that_cuts_the_target_off() -> None:
    z_m, target = (torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    loss = alignment_loss(z_m, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((z_m.float() - target.float()).square().mean().item(), rel=1e-6)
    assert z_m.grad is not None
    assert target.grad is None


def test_gradients_reach_every_parameter_under_bf16_autocast(make_case: MakeCase) -> None:
    # Copies of the weights that autocast makes under no_grad would cut the encoder off.
    case = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        output = case.model(*case.inputs)
        loss = output.prediction.float().square().mean() + alignment_loss(output.z_m, output.z_m_target)
    loss.backward()
    for name, parameter in case.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_decoder_knows_where_a_patch_is(make_case: MakeCase) -> None:
    case = make_case()
    z_m = torch.randn(BATCH, NUM_MASKED, 16)
    elsewhere = case.masked.flip(1)
    assert not torch.allclose(case.model.decode(z_m, case.masked), case.model.decode(z_m, elsewhere))


def test_the_decoder_attends_among_masked_patches(make_case: MakeCase) -> None:
    case = make_case()
    z_m = torch.randn(BATCH, NUM_MASKED, 16)
    changed = z_m.clone()
    changed[:, 0] = torch.randn(16)
    before, after = case.model.decode(z_m, case.masked), case.model.decode(changed, case.masked)
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_mask_queries_tell_their_positions_apart(make_case: MakeCase) -> None:
    case = make_case()
    z_m = case.model(*case.inputs).z_m
    distances = torch.cdist(z_m, z_m)[0] + 10 * torch.eye(NUM_MASKED)
    assert distances.min() > 1e-3


def test_the_order_of_visible_patches_does_not_matter_where_positions_go_along(make_case: MakeCase) -> None:
    case = make_case()
    order = torch.randperm(case.visible.shape[1])
    shuffled = case.model.predict(case.images, case.visible[:, order], case.masked)
    torch.testing.assert_close(shuffled, case.model.predict(*case.inputs), rtol=1e-4, atol=1e-5)


def test_the_same_patches_in_another_order_are_another_image(make_case: MakeCase) -> None:
    case = make_case()
    shuffled = unpatchify(patchify(case.images, 2)[:, torch.randperm(20)], (4, 5), 2)
    assert not torch.allclose(case.model.encoder(case.images)[:, 0], case.model.encoder(shuffled)[:, 0])
    # In a picture of one colour nothing but positions tells patches apart.
    plain = case.model.encoder.embed(torch.ones(1, 3, 8, 10))
    positions = case.model.encoder.positions[1:]
    torch.testing.assert_close(plain[0] - plain[0, 0], positions - positions[0], rtol=0, atol=1e-5)


def test_the_alignment_target_has_no_drop_path_unless_asked(make_case: MakeCase) -> None:
    case = make_case({"drop_path": 0.8})
    quiet = case.model(*case.inputs)
    case.model.train()
    torch.manual_seed(1)
    noisy = case.model(*case.inputs)
    assert torch.equal(noisy.z_m_target, quiet.z_m_target)
    assert not torch.allclose(noisy.z_m, quiet.z_m)

    case.model.alignment_drop_path = True
    torch.manual_seed(1)
    official = case.model(*case.inputs)
    assert not torch.allclose(official.z_m_target, quiet.z_m_target)


def test_drop_path_skips_attention_and_mlp_of_whole_images() -> None:
    block = Block(16, 2, layer_scale=0.5, drop_path=0.9)
    regressor_block = RegressorBlock(16, 2, layer_scale=0.5, drop_path=0.9)
    x, z_v, positions_m, positions_v = (torch.randn(400, n, 16) for n in (3, 5, 3, 5))
    for output, skipped in (
        (block(x), x),
        (regressor_block(x, z_v, positions_m, positions_v), regressor_block.norm2(x)),
    ):
        untouched = (output == skipped).all(dim=(1, 2)).sum().item()
        # 400 draws in which both branches go, with probability 0.81: five standard deviations are 39.
        assert abs(untouched - 324) < 39
    assert not (block(x, use_drop_path=False) == x).all(dim=(1, 2)).any()


def test_the_switch_for_drop_path_on_the_target_is_passed_on(make_architecture: MakeArchitecture) -> None:
    assert not ContextAutoencoder(make_architecture()).alignment_drop_path
    assert ContextAutoencoder(make_architecture(), 0.1, True).alignment_drop_path


def test_drop_path_grows_from_block_to_block_in_all_three_parts(make_architecture: MakeArchitecture) -> None:
    architecture = make_architecture(depth=3, regressor_depth=2, decoder_depth=2)
    model = ContextAutoencoder(architecture, drop_path=0.4)
    rates = {
        name: [block.drop_path.rate for block in part.blocks]
        for name, part in {"F": model.encoder, "H": model.regressor, "G": model.decoder}.items()
    }
    assert rates["F"] == pytest.approx([0, 0.2, 0.4])
    assert rates["H"] == rates["G"] == pytest.approx([0, 0.4])
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_the_projection_exists_where_widths_differ_and_nowhere_else(make_architecture: MakeArchitecture) -> None:
    same = ContextAutoencoder(make_architecture(predictor_width=16))
    other = ContextAutoencoder(make_architecture(predictor_width=8))
    assert not list(same.projection.parameters())
    linear, norm = other.projection
    assert linear.weight.shape == (8, 16)
    assert norm.eps == 1e-6


def test_the_projection_maps_both_the_visible_and_the_target(make_case: MakeCase) -> None:
    case = make_case(predictor_width=8, predictor_num_heads=1)
    model = case.model
    output = model(*case.inputs)
    encoder, embedded = model.encoder, model.encoder.embed(case.images)
    z_v, target = (
        model.projection(encoder.encode(gather_patches(embedded, index))[:, 1:])
        for index in (case.visible, case.masked)
    )
    assert output.z_m.shape == output.z_m_target.shape == (BATCH, NUM_MASKED, 8)
    assert torch.equal(output.z_m_target, target)
    positions = model.positions[1:]
    assert torch.equal(output.z_m, model.regressor(z_v, positions[case.masked], positions[case.visible]))


@pytest.mark.parametrize("predictor_width", [16, 8])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("grid", [(4, 5), (5, 4), (1, 6), (3, 3)])
def test_predict_equals_forward(
    make_case: MakeCase, grid: tuple[int, int], channels: int, predictor_width: int
) -> None:
    case = make_case(grid=grid, channels=channels, predictor_width=predictor_width)
    prediction = case.model.predict(*case.inputs)
    assert prediction.shape == (*case.masked.shape, 11)
    assert prediction.isfinite().all()
    assert torch.equal(prediction, case.model(*case.inputs).prediction)


@pytest.mark.parametrize("predictor_width", [16, 8])
def test_without_regressor_every_patch_is_decoded_from_its_own_representation(
    make_case: MakeCase, predictor_width: int
) -> None:
    case = make_case(predictor_width=predictor_width)
    prediction = case.model.predict_without_regressor(case.images)
    assert prediction.shape == (BATCH, 20, 11)
    z = case.model.projection(case.model.encoder(case.images)[:, 1:])
    every = torch.arange(20).expand(BATCH, -1)
    torch.testing.assert_close(prediction, case.model.decode(z, every))


def test_the_class_token_comes_first_and_sees_the_patches(make_case: MakeCase) -> None:
    case = make_case()
    before = case.model.encoder(case.images)
    assert before.shape == (BATCH, 21, 16)
    with torch.no_grad():
        case.model.encoder.cls_token += torch.randn(16)
    moved = (case.model.encoder(case.images) - before).abs().mean(dim=(0, 2))
    assert moved.argmax() == 0


def test_class_attention_is_that_of_the_last_block_and_changes_nothing_of_the_output(make_case: MakeCase) -> None:
    case = make_case()
    encoder = case.model.encoder
    tokens, attention = encoder.forward_with_attention(case.images)
    torch.testing.assert_close(tokens, encoder(case.images))
    assert attention.shape == (BATCH, 2, 20)

    x = torch.cat([encoder.cls_token.expand(BATCH, -1, -1), encoder.embed(case.images)], dim=1)
    for block in encoder.blocks[:-1]:
        x = block(x)
    last = encoder.blocks[-1]
    x = last.norm1(x)
    q_weight, k_weight, _ = last.attn.qkv.weight.chunk(3)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        query = x[:, 0] @ q_weight[part].T + last.attn.q_bias[part]
        scores = torch.einsum("be,bne->bn", query, x @ k_weight[part].T) / math.sqrt(8)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        torch.testing.assert_close(attention[:, head], weights[:, 1:], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(attention[:, head].sum(1) + weights[:, 0], torch.ones(BATCH))


def reference_attention(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one head after another, in float64, from the equations."""
    weights = [weight.double() for weight in attention.qkv.weight.chunk(3)]
    q = query.double() @ weights[0].T + attention.q_bias.double()
    k = key.double() @ weights[1].T
    v = value.double() @ weights[2].T + attention.v_bias.double()
    size = q.shape[-1] // attention.num_heads
    mixed = [
        ((q[..., i : i + size] @ k[..., i : i + size].mT) / math.sqrt(size)).softmax(-1) @ v[..., i : i + size]
        for i in range(0, q.shape[-1], size)
    ]
    return torch.cat(mixed, dim=-1) @ attention.proj.weight.double().T + attention.proj.bias.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_follows_its_equations_in_both_precisions(dtype: torch.dtype, tolerance: float) -> None:
    attention = Attention(16, 4)
    stir(attention)
    x, query, key, value = (torch.randn(2, n, 16) for n in (7, 3, 5, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        alone, cross = attention(x), attention.cross(query, key, value)
    assert alone.dtype == cross.dtype == dtype
    for ours, expected in (
        (alone, reference_attention(attention, x, x, x)),
        (cross, reference_attention(attention, query, key, value)),
    ):
        assert (ours.double() - expected).norm() / expected.norm() < tolerance


def test_attention_in_bf16_on_a_cpu_agrees_with_the_fused_kernel() -> None:
    attention = Attention(32, 4)
    projected = [torch.randn(2, 9, 32, dtype=torch.bfloat16) for _ in range(3)]
    fused = F.scaled_dot_product_attention(*attention._all_heads(*projected))
    expected = fused.transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention._attend(*projected), expected, rtol=2e-2, atol=2e-2)


def test_visible_representations_are_the_same_for_every_regressor_block(make_case: MakeCase) -> None:
    case = make_case()
    seen = []
    for block in case.model.regressor.blocks:
        block.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1].clone()))
    case.model.predict(*case.inputs)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def is_xavier(weight: Tensor, fan_in: int, fan_out: int) -> bool:
    """Uniform up to the bound: nothing beyond it, something near it, and a uniform's variance."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    fits = 0.97 * bound < weight.abs().max() <= bound
    return bool(fits) and abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.1


def test_every_linear_starts_xavier_uniform_with_zero_bias(make_architecture: MakeArchitecture) -> None:
    model = ContextAutoencoder(make_architecture(width=32, predictor_width=24))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 4 * 3 + 4 * 2 + 4 * 2 + 1 + 1
    for name, linear in linears.items():
        separate = name.startswith("regressor.") and name.endswith("qkv")
        # Self-attention has one matrix of three projections, cross-attention three of one, as officially.
        for weight in linear.weight.chunk(3) if separate else [linear.weight]:
            assert is_xavier(weight, weight.shape[1], weight.shape[0]), name
        assert linear.bias is None or (linear.bias == 0).all(), name


def test_tokens_and_patch_embedding_start_as_truncated_normals(make_architecture: MakeArchitecture) -> None:
    model = ContextAutoencoder(make_architecture(width=256, predictor_width=256))
    embedding = model.encoder.patch_embed.proj
    for weight in (model.encoder.cls_token, model.regressor.mask_query, embedding.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert embedding.bias is not None
    assert (embedding.bias == 0).all()


def test_keys_have_no_bias_and_those_of_queries_and_values_start_at_zero(make_architecture: MakeArchitecture) -> None:
    model = ContextAutoencoder(make_architecture())
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(attentions) == 7
    for attention in attentions:
        names = {name for name, _ in attention.named_parameters()}
        assert names == {"qkv.weight", "q_bias", "v_bias", "proj.weight", "proj.bias"}
        assert (attention.q_bias == 0).all()
        assert (attention.v_bias == 0).all()


@pytest.mark.parametrize(("encoder_scale", "predictor_scale"), [(0.1, 0.1), (1e-5, 0.1)])
def test_layer_scales_start_as_configured_and_norms_have_the_official_epsilon(
    make_architecture: MakeArchitecture, encoder_scale: float, predictor_scale: float
) -> None:
    model = ContextAutoencoder(
        make_architecture(layer_scale=encoder_scale, predictor_layer_scale=predictor_scale, predictor_width=8)
    )
    gains = {name: p for name, p in model.named_parameters() if name.endswith("gamma")}
    assert len(gains) == 2 * 7
    for name, gain in gains.items():
        expected = encoder_scale if name.startswith("encoder.") else predictor_scale
        torch.testing.assert_close(gain.detach(), torch.full_like(gain, expected), msg=name)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    # Two a block, four a regressor block, one at the end of each of three parts, one in the projection.
    assert len(norms) == 2 * 3 + 4 * 2 + 2 * 2 + 3 + 1
    assert {norm.eps for norm in norms} == {1e-6}


def test_the_encoder_is_stored_once_and_positions_not_at_all(make_architecture: MakeArchitecture) -> None:
    model = ContextAutoencoder(make_architecture())
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"encoder", "regressor", "decoder"}
    assert not [name for name in model.state_dict() if "positions" in name]


def test_another_grid_takes_the_same_weights(make_architecture: MakeArchitecture) -> None:
    small, large = (Encoder(make_architecture(grid=grid)).eval() for grid in ((4, 5), (7, 6)))
    large.load_state_dict(small.state_dict())
    tokens = large(images_for(make_architecture(grid=(7, 6))))
    assert tokens.shape == (BATCH, 43, 16)
    # The same patches at the same places are encoded the same, whatever the grid around them.
    image = images_for(make_architecture(grid=(7, 6)))
    inner = small.embed(image[:, :, :8, :10])
    torch.testing.assert_close(large.embed(image).unflatten(1, (7, 6))[:, :4, :5].flatten(1, 2), inner)
