"""Weights on disk: identical bytes for identical weights, and refusals that name the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cae.architecture import Architecture
from cae.errors import UserError
from cae.model import ContextAutoencoder
from cae.normalization import Normalization
from cae.storage import load_into, read_weights, save_weights
from cae.targets.dvae import Dvae, DvaeArchitecture
from cae.targets.files import load_target, save_target
from cae.targets.pixels import PixelArchitecture, PixelTarget
from cae.weights import Trained, describe, load_trained, random_encoder, save_trained, trained_encoder

MakeArchitecture = Callable[..., Architecture]
NORMALIZATION = Normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
METADATA = {"kind": "toy", "b": [1, 2.5, None], "a": {"nested": True}}


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_the_same_weights_and_metadata_make_the_same_bytes(tmp_path: Path) -> None:
    save_weights(tmp_path / "one.safetensors", toy(), METADATA)
    save_weights(tmp_path / "two.safetensors", toy(), dict(reversed(METADATA.items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    module = toy()
    save_weights(path, module, METADATA)
    state, metadata = read_weights(path, "toy")
    assert metadata == METADATA
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    # Any other program reads the tensors, too.
    assert load_file(path).keys() == expected.keys()


def test_weights_that_are_views_of_others_are_written(tmp_path: Path) -> None:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.randn(3, 4).T)
    save_weights(tmp_path / "view.safetensors", module, METADATA)
    assert torch.equal(read_weights(tmp_path / "view.safetensors", "toy")[0]["weight"], module.weight)


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_weights(path, nn.Linear(100, 100), METADATA)
    save_weights(path, nn.Linear(2, 1), METADATA)
    assert read_weights(path, "toy")[0]["weight"].shape == (1, 2)


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_weights(path, toy(), METADATA)
    with pytest.raises(UserError, match=r"toy\.safetensors: holds toy weights; expected cae"):
        load_trained(path)
    with pytest.raises(UserError, match=r"toy\.safetensors: holds toy weights; expected target"):
        load_target(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "vit.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(UserError, match=r"vit\.safetensors: holds foreign weights; expected cae .*cae-pipe import"):
        load_trained(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else", b"\x00" * 100, b"{}" * 50])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"broken\.safetensors: not a safetensors file .*expected cae or encoder or classifier weights"
    ):
        load_trained(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_weights(path, toy(), METADATA)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"cut\.safetensors: not a safetensors file"):
        read_weights(path, "toy")


def test_a_missing_file_is_refused_with_what_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "no.safetensors"
    with pytest.raises(UserError, match=rf"{path}: no such file; expected cae or .*, which `dvc repro` makes"):
        load_trained(path)
    with pytest.raises(UserError, match=rf"{tmp_path}: holds none of cae\.safetensors, .*cae-pipe import"):
        load_trained(tmp_path)


@pytest.mark.parametrize("module", [nn.Linear(3, 5), nn.Linear(3, 4, bias=False), toy()])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, module: nn.Module) -> None:
    path = tmp_path / "linear.safetensors"
    save_weights(path, nn.Linear(3, 4), METADATA)
    with pytest.raises(UserError, match=r"linear\.safetensors: written by another version of cae-pipe; make it again"):
        load_into(module, read_weights(path, "toy")[0], path)


@pytest.fixture
def model(make_architecture: MakeArchitecture) -> ContextAutoencoder:
    model = ContextAutoencoder(make_architecture(predictor_width=8), drop_path=0.5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights that no seed gives.
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def loaded(tmp_path: Path, model: ContextAutoencoder, make_architecture: MakeArchitecture) -> Trained:
    save_trained(tmp_path, model, describe(make_architecture(predictor_width=8), NORMALIZATION, 0.9, {"seed": 3}))
    return load_trained(tmp_path)


@pytest.fixture
def inputs(draw_masks: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 8, 10), *draw_masks((4, 5), 10, 2)


def test_a_saved_model_gives_the_same_outputs(
    model: ContextAutoencoder, loaded: Trained, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    assert loaded.cae is not None
    for ours, theirs in zip(loaded.cae(*inputs), model(*inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loaded_model_knows_its_sizes_normalisation_and_origin(
    loaded: Trained, make_architecture: MakeArchitecture
) -> None:
    assert loaded.cae is not None
    assert not loaded.cae.training
    assert loaded.architecture == make_architecture(predictor_width=8)
    assert loaded.normalization == NORMALIZATION
    assert loaded.origin == {"seed": 3}
    assert loaded.eval_crop == 0.9


@pytest.mark.parametrize(
    "change",
    [
        lambda architecture: architecture.pop("depth"),
        lambda architecture: architecture.update(new_option=1),
        lambda architecture: architecture.update(width="wide"),
    ],
)
def test_a_file_of_another_version_is_refused(
    tmp_path: Path, model: ContextAutoencoder, loaded: Trained, change: Callable[[dict[str, Any]], Any]
) -> None:
    path = tmp_path / "other.safetensors"
    metadata = loaded.metadata | {"architecture": dict(loaded.metadata["architecture"])}
    change(metadata["architecture"])
    save_weights(path, model, metadata)
    with pytest.raises(UserError, match=r"other\.safetensors: written by another version of cae-pipe"):
        load_trained(path)


def test_a_file_that_does_not_say_what_its_images_are_is_refused(
    tmp_path: Path, model: ContextAutoencoder, loaded: Trained
) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(path, model, {key: value for key, value in loaded.metadata.items() if key != "eval_crop"})
    with pytest.raises(UserError, match=r"other\.safetensors: written by another version .*eval_crop is missing"):
        load_trained(path)


def test_other_shapes_than_the_file_says_are_refused(
    tmp_path: Path, model: ContextAutoencoder, loaded: Trained
) -> None:
    path = tmp_path / "other.safetensors"
    metadata = loaded.metadata | {"architecture": loaded.metadata["architecture"] | {"num_outputs": 12}}
    save_weights(path, model, metadata)
    with pytest.raises(UserError, match=r"(?s)other\.safetensors: written by another version.*decoder\.head"):
        load_trained(path)


def test_the_trained_encoder_is_a_copy_of_the_models(loaded: Trained) -> None:
    encoder = trained_encoder(loaded, drop_path=0.2)
    images = torch.randn(2, 3, 8, 10)
    assert torch.equal(encoder.eval()(images), loaded.encoder(images))
    assert encoder.blocks[-1].drop_path.rate == pytest.approx(0.2)
    with torch.no_grad():
        encoder.cls_token += 1
    assert not torch.equal(encoder.cls_token, loaded.encoder.cls_token)


def test_a_random_encoder_depends_on_its_seed_and_leaves_the_global_generator_alone(loaded: Trained) -> None:
    before = torch.get_rng_state()
    first, again, other = (random_encoder(loaded, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training
    images = torch.randn(2, 3, 8, 10)
    assert torch.equal(first(images), again(images))
    assert not torch.allclose(first(images), other(images))
    assert not torch.allclose(first(images), loaded.encoder(images))
    assert first.state_dict().keys() == loaded.encoder.state_dict().keys()


def make_target(kind: str) -> Dvae | PixelTarget:
    if kind == "pixels":
        architecture = PixelArchitecture(channels=3, patch_size=4, grid=(2, 3), per_patch=True)
        return PixelTarget(architecture, *NORMALIZATION)
    sizes = {"vocab_size": 8, "code_width": 6, "hidden_width": 8, "num_res_blocks": 1}
    return Dvae(DvaeArchitecture(channels=3, patch_size=4, grid=(2, 3), **sizes), *NORMALIZATION)


@pytest.mark.parametrize("kind", ["dvae", "pixels"])
def test_a_target_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    target = make_target(kind)
    save_target(tmp_path / "target.safetensors", target, {})
    loaded = load_target(tmp_path / "target.safetensors")
    assert type(loaded) is type(target)
    assert not loaded.training
    assert loaded.architecture == target.architecture
    images = torch.rand(2, 3, 8, 12)
    codes = target.encode(images)
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes), target.decode(codes))
    prediction = torch.randn(2, 6, target.num_outputs)
    assert torch.equal(loaded.loss(prediction, codes), target.loss(prediction, codes))
    assert torch.equal(loaded.codes_from(prediction), target.codes_from(prediction))


def test_a_target_is_no_model(tmp_path: Path) -> None:
    save_target(tmp_path / "target.safetensors", make_target("pixels"), {})
    with pytest.raises(UserError, match=r"target\.safetensors: holds target weights; expected cae"):
        load_trained(tmp_path / "target.safetensors")
