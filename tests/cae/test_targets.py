"""Targets: patches in and out, the discrete VAE, pixels, and what a reconstruction may depend on."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cae.targets import hide, patchify, put, reconstruct, take, unpatchify
from cae.targets.dvae import Dvae, DvaeArchitecture, prime_factors
from cae.targets.pixels import PixelArchitecture, PixelTarget

DrawMasks = Callable[..., tuple[Tensor, Tensor]]
MEAN, STD = [0.2, 0.5, 0.4], [0.3, 0.2, 0.25]


def make_dvae(patch_size: int = 4, grid: tuple[int, int] = (2, 3), vocab_size: int = 8) -> Dvae:
    architecture = DvaeArchitecture(
        channels=3,
        patch_size=patch_size,
        grid=grid,
        vocab_size=vocab_size,
        code_width=6,
        hidden_width=8,
        num_res_blocks=1,
    )
    return Dvae(architecture, MEAN, STD).eval()


def make_lively_dvae(grid: tuple[int, int] = (2, 3)) -> Dvae:
    """As after training: tokens differ from patch to patch and pixels leave the range of 0-1."""
    dvae = make_dvae(grid=grid)
    with torch.no_grad():
        for parameter in dvae.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return dvae


def make_pixels(per_patch: bool = False, patch_size: int = 2, grid: tuple[int, int] = (3, 4)) -> PixelTarget:
    architecture = PixelArchitecture(channels=3, patch_size=patch_size, grid=grid, per_patch=per_patch)
    return PixelTarget(architecture, MEAN, STD)


def images_of(grid: tuple[int, int], patch_size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, grid[0] * patch_size, grid[1] * patch_size)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_unpatchify_undoes_patchify(grid: tuple[int, int], patch_size: int, channels: int) -> None:
    images = torch.rand(2, channels, grid[0] * patch_size, grid[1] * patch_size)
    patches = patchify(images, patch_size)
    assert patches.shape == (2, grid[0] * grid[1], patch_size**2 * channels)
    assert torch.equal(unpatchify(patches, grid, patch_size), images)


def test_a_patch_is_laid_out_row_column_channel_and_patches_row_major() -> None:
    images = torch.rand(1, 3, 4, 6)
    patches = patchify(images, 2)
    for number in range(6):
        top, left = 2 * (number // 3), 2 * (number % 3)
        expected = [images[0, c, top + y, left + x].item() for y in range(2) for x in range(2) for c in range(3)]
        assert patches[0, number].tolist() == expected


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3)])
def test_take_and_put_address_the_patches_that_the_index_names(shape: tuple[int, ...]) -> None:
    codes = torch.arange(math.prod(shape)).view(shape)
    index = torch.tensor([[0, 3], [4, 1]])
    taken = take(codes, index)
    assert torch.equal(taken, torch.stack([codes[0, [0, 3]], codes[1, [4, 1]]]))
    result = put(codes, index, -taken - 1)
    assert torch.equal(take(result, index), -taken - 1)
    rest = torch.tensor([[1, 2, 4], [0, 2, 3]])
    assert torch.equal(take(result, rest), take(codes, rest))
    assert (codes >= 0).all()


def test_hide_fills_what_is_not_visible_with_one_colour_and_keeps_the_rest() -> None:
    images = torch.rand(2, 3, 4, 6)
    visible = torch.tensor([[0, 5], [1, 2]])
    hidden = hide(images, visible, torch.tensor([0.1, 0.2, 0.3]), 2)
    for i in range(2):
        for number in range(6):
            top, left = 2 * (number // 3), 2 * (number % 3)
            patch = hidden[i, :, top : top + 2, left : left + 2]
            if number in visible[i]:
                assert torch.equal(patch, images[i, :, top : top + 2, left : left + 2])
            else:
                assert torch.equal(patch, torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(3, 2, 2))


@pytest.mark.parametrize(
    ("number", "factors"), [(1, []), (2, [2]), (6, [2, 3]), (14, [2, 7]), (16, [2] * 4), (49, [7, 7])]
)
def test_prime_factors_multiply_to_the_number(number: int, factors: list[int]) -> None:
    assert prime_factors(number) == factors


@pytest.mark.parametrize("patch_size", [1, 4, 6, 14, 16])
@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (3, 1)])
def test_the_token_grid_is_the_patch_grid_and_decoding_gives_the_image_size(
    patch_size: int, grid: tuple[int, int]
) -> None:
    dvae = make_dvae(patch_size, grid)
    images = images_of(grid, patch_size)
    assert dvae.logits(images).shape == (2, 8, *grid)
    tokens = dvae.encode(images)
    assert tokens.shape == (2, grid[0] * grid[1])
    assert tokens.dtype == torch.int64
    assert dvae.decode(tokens).shape == images.shape


def test_tokens_are_row_major() -> None:
    dvae = make_lively_dvae()
    images = images_of((2, 3), 4)
    assert len(dvae.encode(images).unique()) > 1
    assert torch.equal(dvae.encode(images).unflatten(1, (2, 3)), dvae.logits(images).argmax(1))


def test_a_token_shows_in_its_own_patch() -> None:
    dvae = make_dvae()
    codes = torch.tensor([[0, 1, 2, 3, 4, 5]])
    changed = codes.clone()
    changed[0, 2] = 7
    # The decoder sees a little beyond a patch; the change is strongest in the patch itself, the top right one.
    difference = (dvae.decode(codes) - dvae.decode(changed)).abs().sum(1)[0]
    by_patch = difference.unflatten(0, (2, 4)).unflatten(2, (3, 4)).sum(dim=(1, 3))
    assert by_patch.flatten().argmax() == 2


def test_encode_has_no_gradient() -> None:
    dvae = make_dvae()
    recorded: list[bool] = []
    dvae.to_logits.register_forward_hook(lambda _module, _inputs, output: recorded.append(output.requires_grad))
    images = images_of((2, 3), 4)
    dvae.logits(images)
    dvae.encode(images)
    assert recorded == [True, False]


def test_pixels_are_normalised_by_the_data_set_before_encoding_and_back_after_decoding() -> None:
    dvae = make_dvae()
    seen: list[Tensor] = []
    dvae.encoder[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    images = images_of((2, 3), 4)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    tokens = dvae.encode(images)
    torch.testing.assert_close(seen[0], (images - mean) / std)
    with torch.no_grad():
        for parameter in dvae.decoder[-1].parameters():
            parameter.zero_()
    torch.testing.assert_close(dvae.decode(tokens), mean.expand_as(images))


def test_the_training_loss_falls_on_a_tiny_set() -> None:
    dvae = make_dvae().train()
    # Black and white patches: two codes are enough.
    images = torch.rand(4, 3, 2, 3).round().repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = dvae.training_loss(images, temperature=1.0)
        (loss.reconstruction + 0.1 * loss.unused).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.reconstruction.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_training_loss_trains_every_part_of_the_tokenizer() -> None:
    dvae = make_dvae().train()
    dvae.training_loss(images_of((2, 3), 4), temperature=1.0).reconstruction.backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_constant_image_at_the_mean_has_nothing_left_to_reconstruct() -> None:
    dvae = make_dvae()
    with torch.no_grad():
        for parameter in dvae.decoder[-1].parameters():
            parameter.zero_()
    images = torch.tensor(MEAN).view(1, 3, 1, 1).expand(2, 3, 8, 12)
    assert dvae.training_loss(images, 1.0).reconstruction == 0
    # One standard deviation away everything is left.
    away = images + torch.tensor(STD).view(1, 3, 1, 1)
    assert dvae.training_loss(away, 1.0).reconstruction.item() == pytest.approx(1, abs=1e-5)


def test_a_lower_temperature_makes_harder_codes() -> None:
    dvae = make_dvae()
    mixed: list[Tensor] = []
    dvae.decoder[0].register_forward_pre_hook(lambda _module, inputs: mixed.append(inputs[0]))
    images = images_of((2, 3), 4)
    dvae.training_loss(images, 100.0)
    dvae.training_loss(images, 0.01)
    soft, hard = (torch.cdist(m.movedim(1, -1).flatten(0, 2), dvae.codebook).amin(1) for m in mixed)
    assert hard.median() < 0.05
    assert soft.median() > 0.5


def test_the_training_loss_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = make_dvae().training_loss(images_of((2, 3), 4), 1.0)
    assert loss.reconstruction.dtype == loss.unused.dtype == torch.float32


def test_unused_is_zero_for_uniform_usage_and_log_k_for_one_code() -> None:
    dvae = make_dvae(vocab_size=8)
    assert dvae.to_logits.bias is not None
    with torch.no_grad():
        dvae.to_logits.weight.zero_()
        dvae.to_logits.bias.zero_()
    assert dvae.training_loss(images_of((2, 3), 4), 1.0).unused.item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        dvae.to_logits.bias[3] = 100
    assert dvae.training_loss(images_of((2, 3), 4), 1.0).unused.item() == pytest.approx(math.log(8), abs=1e-5)


def test_usage_is_counted_over_the_batch_and_not_in_every_patch() -> None:
    # Sharp codes for each patch, yet all of them used alike: nothing is unused.
    dvae = make_dvae(patch_size=1, grid=(1, 4), vocab_size=4)
    dvae.logits = lambda images: 100 * torch.eye(4).view(1, 4, 1, 4).expand(len(images), -1, -1, -1)  # type: ignore[method-assign]
    assert dvae.training_loss(torch.rand(2, 3, 1, 4), 1.0).unused.item() == pytest.approx(0, abs=1e-5)


def test_a_replaced_code_is_a_noisy_copy_and_the_others_stay() -> None:
    dvae = make_dvae()
    before = {name: value.clone() for name, value in dvae.state_dict().items()}
    dvae.replace_code(2, 5, noise=0.1, generator=torch.Generator().manual_seed(0))
    for name in ("to_logits.weight", "codebook"):
        after = dvae.state_dict()[name]
        assert not torch.equal(after[2], after[5])
        # Noise of a tenth of the spread, not a new draw.
        assert (after[2] - after[5]).std() < 0.3 * after[5].std()
        kept = [0, 1, 3, 4, 5, 6, 7]
        assert torch.equal(after[kept], before[name][kept])
    assert dvae.to_logits.bias is not None
    assert dvae.to_logits.bias[2] == dvae.to_logits.bias[5] == before["to_logits.bias"][5]
    dvae.replace_code(2, 5, noise=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dvae.codebook[2], dvae.codebook[5])


def test_the_dvae_loss_is_the_cross_entropy_of_its_tokens() -> None:
    dvae = make_dvae()
    codes = torch.tensor([[1, 0, 7], [3, 3, 2]])
    prediction = torch.randn(2, 3, 8)
    expected = -prediction.log_softmax(-1).gather(2, codes.unsqueeze(2)).mean()
    torch.testing.assert_close(dvae.loss(prediction, codes), expected)
    assert torch.equal(dvae.codes_from(prediction), prediction.argmax(-1))
    right = torch.nn.functional.one_hot(codes, 8).float()
    right[0, 0] = right[0, 0].roll(1)
    assert dvae.scores(right, codes)["token_accuracy"].item() == pytest.approx(5 / 6)


def normalized(codes: Tensor, per_patch: bool) -> Tensor:
    if per_patch:
        return (codes - codes.mean(-1, keepdim=True)) / (codes.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    return ((codes.unflatten(-1, (-1, 3)) - torch.tensor(MEAN)) / torch.tensor(STD)).flatten(2)


@pytest.mark.parametrize("per_patch", [False, True])
def test_the_pixel_loss_is_zero_for_the_perfect_prediction_and_a_mean_square_otherwise(per_patch: bool) -> None:
    target = make_pixels(per_patch)
    codes = target.encode(images_of((3, 4), 2))
    perfect = normalized(codes, per_patch)
    assert target.loss(perfect, codes).item() == pytest.approx(0, abs=1e-10)
    assert target.loss(perfect + 2, codes).item() == pytest.approx(4, rel=1e-5)


def test_per_patch_normalisation_ignores_brightness_and_contrast() -> None:
    target = make_pixels(per_patch=True)
    codes = target.encode(images_of((3, 4), 2))
    prediction = torch.randn_like(codes)
    torch.testing.assert_close(
        target.loss(prediction, 0.5 * codes + 0.2), target.loss(prediction, codes), rtol=1e-3, atol=1e-4
    )
    plain = make_pixels(per_patch=False)
    assert not torch.isclose(plain.loss(prediction, 0.5 * codes + 0.2), plain.loss(prediction, codes), rtol=1e-3)


def test_a_flat_patch_has_a_finite_loss() -> None:
    target = make_pixels(per_patch=True)
    codes = torch.full((1, 12, 12), 0.5)
    assert target.loss(torch.zeros(1, 12, 12), codes) == 0


def test_codes_from_a_prediction_undo_the_normalisation_and_stay_in_range() -> None:
    target = make_pixels()
    codes = target.encode(images_of((3, 4), 2))
    torch.testing.assert_close(target.codes_from(normalized(codes, per_patch=False)), codes)
    extreme = target.codes_from(torch.full((1, 2, 12), 1000.0))
    assert (extreme == 1).all()
    assert (target.codes_from(torch.full((1, 2, 12), -1000.0)) == 0).all()


def test_pixels_decode_to_the_image_they_came_from() -> None:
    target = make_pixels()
    images = images_of((3, 4), 2)
    assert target.num_outputs == 12
    assert torch.equal(target.decode(target.encode(images)), images)


def test_masked_psnr_is_in_decibels_of_the_pixel_range() -> None:
    target = make_pixels()
    codes = torch.full((1, 2, 12), 0.5)
    off_by_a_tenth = normalized(codes + 0.1, per_patch=False)
    assert target.scores(off_by_a_tenth, codes)["masked_psnr_db"].item() == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("kind", ["pixels", "dvae"])
def test_a_reconstruction_depends_on_nothing_hidden(kind: str, draw_masks: DrawMasks) -> None:
    target = make_pixels(grid=(3, 4), patch_size=4) if kind == "pixels" else make_lively_dvae(grid=(3, 4))
    images = images_of((3, 4), 4)
    visible, masked = draw_masks((3, 4), 6, 2)
    prediction = torch.randn(2, 6, target.num_outputs)
    fill = torch.tensor(MEAN)
    if kind == "dvae":
        assert ((raw := target.decode(target.encode(images))) < 0).any()
        assert (raw > 1).any()
    changed = hide(images, visible, torch.tensor([1.0, 0.0, 1.0]), 4)
    assert not torch.equal(changed, images)
    # Other hidden pixels must not reach the tokens of visible patches through a tokenizer's wide view.
    results = [reconstruct(target, x, visible, masked, prediction, fill, 4) for x in (images, changed)]
    assert torch.equal(*results)
    other = reconstruct(target, images, visible, masked, torch.randn_like(prediction), fill, 4)
    assert not torch.equal(other, results[0])
    assert results[0].shape == images.shape
    assert results[0].min() >= 0
    assert results[0].max() <= 1


def test_a_dvae_would_see_hidden_pixels_were_they_not_blanked(draw_masks: DrawMasks) -> None:
    # Without this the test above could not fail.
    dvae = make_lively_dvae(grid=(3, 4))
    images = images_of((3, 4), 4)
    visible, _ = draw_masks((3, 4), 6, 2)
    changed = hide(images, visible, torch.tensor([1.0, 0.0, 1.0]), 4)
    assert not torch.equal(take(dvae.encode(images), visible), take(dvae.encode(changed), visible))


def test_a_reconstruction_from_pixels_keeps_the_visible_ones_and_paints_the_predicted(draw_masks: DrawMasks) -> None:
    target = make_pixels()
    images = images_of((3, 4), 2)
    visible, masked = draw_masks((3, 4), 6, 2)
    prediction = torch.randn(2, 6, 12)
    patches = patchify(reconstruct(target, images, visible, masked, prediction, torch.tensor(MEAN), 2), 2)
    assert torch.equal(take(patches, visible), take(patchify(images, 2), visible))
    assert torch.equal(take(patches, masked), target.codes_from(prediction))


def test_a_code_of_one_channel_is_restarted_as_a_number() -> None:
    architecture = make_dvae().architecture.model_copy(update={"code_width": 1})
    dvae = Dvae(architecture, MEAN, STD)
    dvae.replace_code(0, 1, noise=0.1, generator=torch.Generator().manual_seed(0))
    assert dvae.codebook.isfinite().all()
