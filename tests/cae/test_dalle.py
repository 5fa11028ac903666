"""The DALL-E tokenizer: the official numbers, the files that it is read from, and the view that it reads."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cae.errors import UserError
from cae.targets import hide, reconstruct, take
from cae.targets.dalle import DalleSizes, DalleTarget, Decoder, Encoder
from cae.targets.dalle_files import ADDRESSES, read_dalle
from cae.targets.files import load_target, save_target
from tests.dalle_files import (
    SMALL,
    States,
    dall_e,
    official_differences,
    published,
    small_target,
    states_of,
    write_published,
)
from tests.official import TOLERANCE

logger = logging.getLogger(__name__)

DATA = Path(__file__).parents[1] / "data"
DrawMasks = Callable[..., tuple[Tensor, Tensor]]


# The official numbers


def test_tokens_logits_and_reconstruction_agree_with_the_official_code() -> None:
    for key, difference in official_differences(torch.device("cpu")).items():
        logger.info("dalle %s: %.1e", key, difference)
        assert difference < TOLERANCE, key


def test_at_full_size_every_parameter_has_its_published_name_and_shape() -> None:
    rows = [line.split("\t") for line in (DATA / "dalle_full_keys.tsv").read_text().splitlines()[1:]]
    sizes = DalleSizes(vocab_size=8192, hidden_width=256, code_width=128, num_res_blocks=2)
    with torch.device("meta"):
        modules = {"encoder": Encoder(sizes), "decoder": Decoder(sizes)}
    ours = [
        [part, key, "x".join(str(side) for side in tensor.shape)]
        for part, module in modules.items()
        for key, tensor in module.state_dict().items()
    ]
    assert sorted(ours) == sorted(rows)


# Files


def plain(states: States, folder: Path, suffix: str) -> tuple[Path, Path]:
    paths = folder / f"encoder{suffix}", folder / f"decoder{suffix}"
    for path, state in zip(paths, states.values(), strict=True):
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({"state_dict": state} if suffix == ".pth" else state, path)
    return paths


@pytest.mark.parametrize("suffix", ["published", ".pt", ".pth", ".pkl", ".safetensors"])
def test_the_published_modules_and_state_dicts_give_the_same_target(suffix: str, tmp_path: Path) -> None:
    target = small_target(grid=(2, 2))
    paths = write_published(tmp_path, target) if suffix == "published" else plain(states_of(target), tmp_path, suffix)
    modules = read_dalle(*paths)
    assert modules.sizes == SMALL
    again = modules.target(target.architecture)
    assert not any(weight.requires_grad for weight in again.parameters())
    for key, tensor in target.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.encode(images), target.encode(images))
    assert torch.equal(again.decode(again.encode(images)), target.decode(target.encode(images)))


def test_weights_stored_with_fewer_bits_become_float32(tmp_path: Path) -> None:
    target = small_target()
    halves = {part: {key: tensor.half() for key, tensor in state.items()} for part, state in states_of(target).items()}
    modules = read_dalle(*plain(halves, tmp_path, ".pt"))
    for key, tensor in modules.encoder.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, target.encoder.state_dict()[key], rtol=1e-3, atol=1e-4)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


def test_a_module_pickle_with_planted_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    target = small_target()
    encoder, decoder = write_published(tmp_path, target)
    module = published("encoder", states_of(target)["encoder"])
    module.extra = Planted(tmp_path / "proof")  # type: ignore[assignment]
    with dall_e():
        torch.save(module, encoder)
    with pytest.raises(UserError, match=r"encoder\.pkl: carries code .*system"):
        read_dalle(encoder, decoder)
    assert not (tmp_path / "proof").exists()
    with dall_e():
        torch.load(encoder, weights_only=False)
    assert (tmp_path / "proof").exists(), "the plant itself must work"


WEIGHT = "blocks.group_2.block_1.res_path.conv_3.w"


def without(state: dict[str, Tensor]) -> None:
    del state[WEIGHT]


def renamed(state: dict[str, Tensor]) -> None:
    state["blocks.other"] = state.pop(WEIGHT)


def reshaped(state: dict[str, Tensor]) -> None:
    state[WEIGHT] = state[WEIGHT][:2]


def integers(state: dict[str, Tensor]) -> None:
    state[WEIGHT] = state[WEIGHT].long()


def headless(state: dict[str, Tensor]) -> None:
    del state["blocks.input.w"]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without, rf"missing: {WEIGHT}\. Expected"),
        (renamed, rf"missing: {WEIGHT}; unknown: blocks\.other\. Expected"),
        (reshaped, rf"of another shape: {WEIGHT} \[2, \d+, 3, 3\] instead of \[4, 4, 3, 3\]|\[8, 8, 3, 3\]"),
        (integers, rf"of another shape: {WEIGHT}"),
        (headless, r"no such tensor for 'blocks\.input\.w'"),
    ],
)
def test_a_tensor_that_is_missing_unknown_or_misshapen_is_named(
    part: str, change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    states = {name: dict(state) for name, state in states_of(small_target()).items()}
    change(states[part])
    with pytest.raises(UserError, match=rf"{part}\.pt: not the {part} of a DALL-E tokenizer.*({said})"):
        read_dalle(*plain(states, tmp_path, ".pt"))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_module_in_the_old_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    encoder, decoder = write_published(tmp_path, small_target())
    with dall_e():
        module = published("encoder", states_of(small_target())["encoder"])
        torch.save(module, encoder, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"encoder\.pkl: a whole module in the format of PyTorch before 1\.6"):
        read_dalle(encoder, decoder)


def test_files_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    encoder, decoder = write_published(tmp_path, small_target())
    with pytest.raises(UserError, match=r"decoder\.pkl: not the encoder"):
        read_dalle(decoder, encoder)


def test_an_absent_file_is_named_with_its_address(tmp_path: Path) -> None:
    encoder, decoder = write_published(tmp_path, small_target())
    decoder.unlink()
    with pytest.raises(UserError, match=rf"decoder\.pkl: no such file.*{ADDRESSES['decoder']}"):
        read_dalle(encoder, decoder)


def test_a_module_without_tensors_is_refused(tmp_path: Path) -> None:
    encoder, decoder = write_published(tmp_path, small_target())
    module = published("encoder", states_of(small_target())["encoder"])
    del module.__dict__["_modules"]
    with dall_e():
        torch.save(module, encoder)
    with pytest.raises(UserError, match=r"encoder\.pkl: its content is no module"):
        read_dalle(encoder, decoder)


def test_a_target_comes_back_from_its_file_with_its_dtype(tmp_path: Path) -> None:
    target = small_target(dtype="bfloat16", channels_last=True)
    save_target(tmp_path / "target.safetensors", target, {"encoder_sha256": "abc"})
    again = load_target(tmp_path / "target.safetensors")
    assert isinstance(again, DalleTarget)
    assert again.architecture == target.architecture
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in target.state_dict().items())


# The view and the pictures


def test_the_view_is_the_mean_of_each_window() -> None:
    images = torch.rand(2, 3, 32, 48)
    view = small_target().view(images)
    assert view.shape == (2, 3, 16, 24)
    torch.testing.assert_close(view[1, 2, 3, 5], images[1, 2, 6:8, 10:12].mean())
    assert torch.equal(small_target(patch_size=8).view(images), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch_size", [8, 16, 24])
def test_pictures_have_the_model_s_size_and_tokens_the_patch_grid(channels: int, patch_size: int) -> None:
    target = small_target(channels=channels, patch_size=patch_size)
    images = torch.rand(2, channels, 2 * patch_size, 3 * patch_size)
    tokens = target.encode(target.view(images))
    assert tokens.shape == (2, 6)
    assert tokens.dtype == torch.int64
    pictures = target.decode(tokens)
    assert pictures.shape == images.shape
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_a_view_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(32, 48\) px was given to a DALL-E tokenizer of \(16, 24\) px"):
        small_target().encode(torch.rand(1, 3, 32, 48))


def test_grey_is_read_as_equal_colours_and_comes_back_as_their_mean() -> None:
    grey, colour = small_target(channels=1), small_target()
    images = torch.rand(2, 1, 16, 24)
    tokens = grey.encode(images)
    assert torch.equal(tokens, colour.encode(images.repeat(1, 3, 1, 1)))
    pictures = colour.decode(tokens)
    assert pictures.std(dim=1).max() > 0.01
    torch.testing.assert_close(grey.decode(tokens), pictures.mean(dim=1, keepdim=True))


def test_a_reconstruction_depends_on_nothing_hidden(draw_masks: DrawMasks) -> None:
    target = small_target(grid=(3, 4))
    images = torch.rand(2, 3, 48, 64)
    visible, masked = draw_masks((3, 4), 6, 2)
    prediction, fill = torch.randn(2, 6, target.num_outputs), torch.tensor([0.2, 0.5, 0.4])
    changed = hide(images, visible, torch.tensor([1.0, 0.0, 1.0]), 16)
    tokens = [take(target.encode(target.view(x)), visible) for x in (images, changed)]
    assert not torch.equal(*tokens), "the tokenizer must look beyond its patch, or this test says nothing"
    results = [reconstruct(target, x, visible, masked, prediction, fill, 16) for x in (images, changed)]
    assert torch.equal(*results)
    other = reconstruct(target, images, visible, masked, torch.randn_like(prediction), fill, 16)
    assert not torch.equal(other, results[0])


def test_tokens_are_float32_until_speeded_up_and_the_last_layer_always_is() -> None:
    target = small_target(dtype="bfloat16", channels_last=True)
    assert {weight.dtype for weight in target.parameters()} == {torch.float32}
    images = torch.rand(16, 3, 16, 24)
    before = target.encode(images)
    target.speed_up()
    dtypes = {key: weight.dtype for key, weight in target.encoder.named_parameters()}
    assert {dtypes.pop("blocks.output.conv.w"), dtypes.pop("blocks.output.conv.b")} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert target.encoder.get_parameter("blocks.group_1.block_1.res_path.conv_1.w").is_contiguous(
        memory_format=torch.channels_last
    )
    assert {weight.dtype for weight in target.decoder.parameters()} == {torch.float32}
    assert target.logits(images).dtype == torch.float32
    assert 0.9 < (target.encode(images) == before).float().mean() <= 1
