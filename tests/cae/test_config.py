"""params.yaml: what is accepted, and that every refusal names the key, what was expected and what is near."""

import copy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cae.config import ENCODER_SIZES, Params, load_params, parse_params
from cae.errors import UserError

SHIPPED = Path(__file__).parents[2] / "params.yaml"
REMOVED = object()


def changed(raw: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with the values at dotted paths (written with __) set, or removed."""
    raw = copy.deepcopy(raw)
    for path, value in values.items():
        *sections, key = path.split("__")
        section = raw
        for name in sections:
            section = section[name]
        if value is REMOVED:
            del section[key]
        else:
            section[key] = value
    return raw


def refusal(raw: dict[str, Any], **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_params(changed(raw, **values), "p.yaml")
    return str(caught.value)


def test_the_shipped_file_loads_with_the_values_that_it_shows() -> None:
    params = load_params(SHIPPED)
    shown = YAML(typ="safe", pure=True).load(SHIPPED)
    model = shown["model"]
    assert params.model.size_px == (model["image_size"], model["image_size"])
    assert params.model.grid == (model["image_size"] // model["patch_size"],) * 2
    assert params.pretrain.mask.ratio == shown["pretrain"]["mask"]["ratio"]
    assert params.tokenizer.crop_scale == tuple(shown["tokenizer"]["crop_scale"])
    depth, width, heads = ENCODER_SIZES[model["name"]]
    assert (params.model.encoder_depth, params.model.encoder_width, params.model.encoder_num_heads) == (
        model["depth"] or depth,
        model["width"] or width,
        model["num_heads"] or heads,
    )


@pytest.mark.parametrize(
    ("path", "nearest", "sibling"),
    [
        ("pretain", "pretrain", "tokenizer"),
        ("pretrain__epoch", "pretrain.epochs", "batch_size"),
        ("model__patchsize", "model.patch_size", "image_size"),
        ("pretrain__mask__ration", "pretrain.mask.ratio", "min_block"),
        ("probe__linear__eopchs", "probe.linear.epochs", "warmup_epochs"),
        ("probe__knn__temprature", "probe.knn.temperature", "feature"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_all_known_ones(
    raw_params: dict[str, Any], path: str, nearest: str, sibling: str
) -> None:
    message = refusal(raw_params, **{path: 1})
    assert message.startswith(f"p.yaml: {path.replace('__', '.')}: unknown key; did you mean `{nearest}`?")
    assert sibling in message


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("pretrain__lr", "fast", "pretrain.lr: input should be a valid number, found 'fast'"),
        ("pretrain__lr", "0.001", "pretrain.lr: input should be a valid number, found '0.001'"),
        ("pretrain__epochs", 6.0, "pretrain.epochs: input should be a valid integer, found 6.0"),
        ("pretrain__epochs", True, "pretrain.epochs: input should be a valid integer, found True"),
        ("pretrain__flip", True, "pretrain.flip: input should be a valid number, found True"),
        ("probe__cache_features", 1, "probe.cache_features: input should be a valid boolean, found 1"),
        ("pretrain__epochs", 0, "pretrain.epochs: input should be greater than or equal to 1, found 0"),
        ("pretrain__lr", 0.0, "pretrain.lr: input should be greater than 0, found 0.0"),
        ("pretrain__flip", 1.5, "pretrain.flip: input should be less than or equal to 1, found 1.5"),
        ("finetune__drop_path", 1.0, "finetune.drop_path: input should be less than 1, found 1.0"),
        ("export__opset", 17, "export.opset: input should be greater than or equal to 18, found 17"),
        ("tokenizer__kind", "dall", "tokenizer.kind: input should be 'dvae', 'pixels' or 'dalle', found 'dall'"),
        ("pretrain__mask__kind", "blok", "pretrain.mask.kind: input should be 'block' or 'random', found 'blok'"),
        (
            "prepare__channels",
            17,
            "prepare.channels: input should be 'auto', 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, ",
        ),
        ("pretrain__mask", 3, "pretrain.mask: input should be a valid dictionary"),
        ("pretrain__crop_scale", 0.5, "pretrain.crop_scale: input should be a valid tuple, found 0.5"),
        ("pretrain__crop_scale", ["a", 1], "pretrain.crop_scale.0: input should be a valid number, found 'a'"),
        ("model__image_size", "x", "model.image_size: input should be a valid integer, found 'x'"),
        ("model__image_size", [28, "x"], "model.image_size.1: input should be a valid integer, found 'x'"),
        ("pretrain__epochs", REMOVED, "pretrain.epochs: missing; add it"),
        ("probe__knn__k", REMOVED, "probe.knn.k: missing; add it"),
        ("model", REMOVED, "model: missing; add it"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_was_expected(
    raw_params: dict[str, Any], path: str, value: Any, expected: str
) -> None:
    assert f"p.yaml: {expected}" in refusal(raw_params, **{path: value})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model__image_size": 30}, "model.patch_size: 4 does not divide image_size 30; .* fits is 32"),
        ({"model__image_size": [28, 33]}, "model.patch_size: 4 does not divide image_size 33; .* fits is 32"),
        ({"model__num_heads": 5}, "model.num_heads: 5 heads do not divide the width 128; the nearest is 4"),
        ({"model__width": 126, "model__num_heads": 3}, "model.width: 126 is not a multiple of 4"),
        (
            {"pretrain__predictor_num_heads": 7},
            "pretrain.predictor_num_heads: 7 heads do not divide the pretrain.predictor_width 128; the nearest is 8",
        ),
        (
            {"pretrain__predictor_width": 6, "pretrain__predictor_num_heads": 2},
            "pretrain.predictor_width: 6 is not a multiple of 4",
        ),
        ({"pretrain__mask__ratio": 1.0}, "pretrain.mask.ratio: 1.0 masks 49 of 49 patches; at least one"),
        ({"pretrain__mask__ratio": 0.001}, "pretrain.mask.ratio: 0.001 masks 0 of 49 patches; at least one"),
        ({"pretrain__epochs": 14, "pretrain__warmup_epochs": 14}, "pretrain.warmup_epochs: 14.0 must be below .* 14"),
        ({"finetune__epochs": 2, "finetune__warmup_epochs": 3}, "finetune.warmup_epochs: 3.0 must be below epochs 2"),
        ({"probe__linear__lr": 0.1, "probe__linear__min_lr": 0.2}, "probe.linear.min_lr: 0.2 is above lr 0.1"),
        ({"finetune__crop_scale": [1.0, 0.5]}, r"finetune.crop_scale: \[1.0, 0.5\] must be \[smallest, largest\]"),
        ({"tokenizer__vocab_size": 16, "tokenizer__min_perplexity": 17}, "tokenizer.min_perplexity: 17.0 .* of 16"),
        (
            {"tokenizer__kind": "dalle", "model__patch_size": 7},
            "model.patch_size: 7 does not fit tokenizer.kind dalle.* multiple of 8, the nearest is 8",
        ),
        (
            {"tokenizer__kind": "dalle", "model__image_size": 60, "model__patch_size": 20},
            "model.patch_size: 20 does not fit tokenizer.kind dalle.* the nearest is 16",
        ),
        ({"tokenizer__temperature_end": 2.0}, "tokenizer.temperature_end: 2.0 is above temperature_start 1.0"),
    ],
)
def test_values_that_do_not_go_together_are_refused_by_key(
    raw_params: dict[str, Any], values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=rf"^p.yaml: {expected}"):
        parse_params(changed(raw_params, **values), "p.yaml")


def test_everything_wrong_is_reported_at_once(raw_params: dict[str, Any]) -> None:
    message = refusal(
        raw_params, model__num_heads=5, pretrain__epochs="x", finetune__lr=-1, probe__knn__k=0, sead=1, export=REMOVED
    )
    lines = message.splitlines()
    keys = {line.split(": ")[1] for line in lines}
    assert keys == {"model.num_heads", "pretrain.epochs", "finetune.lr", "probe.knn.k", "sead", "export"}
    assert all(line.startswith("p.yaml: ") for line in lines)


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(SHIPPED.read_text() + "\nseed: 1\n")
    with pytest.raises(UserError, match=r'(?s)twice\.yaml: not valid YAML.*duplicate key "seed"'):
        load_params(path)


@pytest.mark.parametrize("text", ["a: [1", "\ta: 1", "a: b: c", "x: !!python/object:os.system echo"])
def test_what_is_not_yaml_is_an_error_with_a_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"(?s)broken\.yaml: not valid YAML.*line \d"):
        load_params(path)


@pytest.mark.parametrize(("text", "found"), [("", "NoneType"), ("- 1\n", "list"), ("hello\n", "str")])
def test_a_file_without_sections_is_an_error(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"odd\.yaml: expected sections .* found {found}"):
        load_params(path)


def test_a_missing_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read.*root of the project"):
        load_params(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("number", ["3e-3", "3.0e-3", "3E-03"])
def test_scientific_notation_is_a_number(tmp_path: Path, number: str) -> None:
    path = tmp_path / "params.yaml"
    text = SHIPPED.read_text()
    lines = [f"  lr: {number}" if line.startswith("  lr: ") else line for line in text.splitlines()]
    path.write_text("\n".join(lines))
    assert load_params(path).pretrain.lr == 0.003


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("path", ["model__layer_scale", "pretrain__lr", "pretrain__mask__ratio"])
def test_infinity_and_nan_are_no_numbers_to_train_with(raw_params: dict[str, Any], path: str, value: float) -> None:
    message = refusal(raw_params, **{path: value})
    assert message.startswith(f"p.yaml: {path.replace('__', '.')}: input should be ")
    assert message.endswith(f"found {value}")


def test_parameters_do_not_change_after_loading(raw_params: dict[str, Any]) -> None:
    params = parse_params(raw_params)
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 3  # type: ignore[misc]


def parsed(raw: dict[str, Any], **values: Any) -> Params:
    return parse_params(changed(raw, **values))


def test_sizes_given_override_those_of_the_name(raw_params: dict[str, Any]) -> None:
    params = parsed(raw_params, model__name="vit_base", model__depth=2, model__width=24, model__num_heads=3)
    architecture = params.architecture(channels=1, num_outputs=7)
    assert (architecture.depth, architecture.width, architecture.num_heads) == (2, 24, 3)
    named = parsed(raw_params, model__name="vit_small").architecture(3, 7)
    assert (named.depth, named.width, named.num_heads) == (12, 384, 6)


def test_the_predictor_has_the_encoders_sizes_unless_given_its_own(raw_params: dict[str, Any]) -> None:
    same = parsed(raw_params, pretrain__regressor_depth=3, pretrain__decoder_depth=5).architecture(3, 9)
    assert (same.predictor_width, same.predictor_num_heads) == (same.width, same.num_heads)
    assert (same.regressor_depth, same.decoder_depth, same.num_outputs, same.channels) == (3, 5, 9, 3)
    other = parsed(raw_params, pretrain__predictor_width=64, pretrain__predictor_num_heads=2).architecture(3, 9)
    assert (other.predictor_width, other.predictor_num_heads) == (64, 2)


def test_the_predictor_has_the_encoders_layer_scale_unless_given_its_own(raw_params: dict[str, Any]) -> None:
    same = parsed(raw_params, model__layer_scale=0.3).architecture(3, 9)
    assert (same.layer_scale, same.predictor_layer_scale) == (0.3, 0.3)
    other = parsed(raw_params, model__layer_scale=1e-5, pretrain__predictor_layer_scale=0.1).architecture(3, 9)
    assert (other.layer_scale, other.predictor_layer_scale) == (1e-5, 0.1)


def test_an_image_size_may_have_two_sides_height_first(raw_params: dict[str, Any]) -> None:
    params = parsed(raw_params, model__image_size=[24, 40])
    assert params.model.size_px == (24, 40)
    assert params.model.grid == (6, 10)
    assert params.model.num_patches == 60
    assert params.architecture(1, 2).grid == (6, 10)


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 98), (0.4, 78), (0.75, 147)])
def test_the_mask_ratio_gives_a_count(raw_params: dict[str, Any], ratio: float, count: int) -> None:
    params = parsed(raw_params, model__image_size=224, model__patch_size=16, pretrain__mask__ratio=ratio)
    assert params.num_masked == count
