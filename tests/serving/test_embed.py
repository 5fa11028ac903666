"""POST /embed as its callers meet it: a real process, real HTTP, a real bundle."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from http_answers import JSON, NPY, SAFETENSORS, array, encoded, refused, tensors
from numpy.typing import NDArray
from PIL import Image
from tiny_bundle import expected_features

from serving.bundle import Bundle

Pixels = Callable[..., NDArray[np.uint8]]


def test_embed_answers_the_pooled_features_as_json(
    http: httpx.Client, png: bytes, image: NDArray[np.uint8], tiny_bundle: Path
) -> None:
    response = http.post("/embed", content=png)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert {"pooled", "class", "patches", "attention"} & set(body) == {"pooled"}
    assert body["shapes"] == {"pooled": [1, 3]}
    np.testing.assert_allclose(body["pooled"], expected_features(image[None])["pooled"], atol=1e-6)
    assert body["grid"] == [4, 4]
    assert response.headers["x-patch-grid"] == "4x4"
    assert body["bundle_sha256"] == response.headers["x-bundle-sha256"] == Bundle.open(tiny_bundle, "cpu").sha256
    assert body["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("asked", "name"),
    [("pooled", "pooled"), ("class", "class_token"), ("patches", "patches"), ("attention", "class_attention")],
)
def test_each_output_has_its_name_and_values(
    http: httpx.Client, png: bytes, image: NDArray[np.uint8], asked: str, name: str
) -> None:
    expected = expected_features(image[None])[name]
    binary = array(http.post("/embed", content=png, params={"outputs": asked}, headers=NPY))
    text = http.post("/embed", content=png, params={"outputs": asked}).json()
    assert binary.dtype == np.float32
    np.testing.assert_allclose(binary, expected, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(text[asked], np.float32), binary)
    assert text["shapes"][asked] == list(expected.shape)


def test_several_outputs_come_in_one_json_and_not_in_one_npy(http: httpx.Client, png: bytes) -> None:
    several = {"outputs": "patches,class,patches"}
    body = http.post("/embed", content=png, params=several).json()
    assert {"pooled", "class", "patches", "attention"} & set(body) == {"patches", "class"}
    assert list(body["shapes"]) == ["patches", "class"]
    error = refused(http.post("/embed", content=png, params=several, headers=NPY), 406, "not_acceptable")
    assert "one output" in error["hint"]
    either = {"Accept": "application/x-npy, application/json;q=0.1"}
    assert (
        http.post("/embed", content=png, params=several, headers=either).headers["content-type"] == "application/json"
    )


def test_the_image_is_turned_upright(http: httpx.Client, image: NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = http.post("/embed", content=encoded(image, exif=exif), params={"outputs": "patches"}, headers=NPY)
    upright = np.rot90(image, -1, axes=(1, 2))
    np.testing.assert_allclose(array(turned), expected_features(upright[None])["patches"], atol=1e-6)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})],
)
def test_every_format_is_read(http: httpx.Client, format: str, options: dict[str, Any]) -> None:
    smooth = np.stack([np.add.outer(np.arange(32) * k, np.arange(32) * 2) for k in (1, 2, 3)]).astype(np.uint8)
    got = array(
        http.post("/embed", content=encoded(smooth, format, **options), params={"outputs": "patches"}, headers=NPY)
    )
    tolerance = 0.02 if format == "JPEG" else 1e-6
    np.testing.assert_allclose(got, expected_features(smooth[None])["patches"], atol=tolerance)


@pytest.mark.parametrize(
    "content_type", ["image/png", "image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
def test_the_bytes_decide_and_not_the_content_type(http: httpx.Client, png: bytes, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert http.post("/embed", content=png, headers=headers).status_code == 200


# Several images, other forms


def test_several_images_come_as_a_form_or_as_json(http: httpx.Client, random_pixels: Pixels) -> None:
    images = random_pixels(3, 3, 32, 32)
    files = [encoded(pixels, format) for pixels, format in zip(images, ("PNG", "BMP", "TIFF"), strict=True)]
    form = [("images", (f"{index}.bin", file)) for index, file in enumerate(files)]
    listed = {"images": [base64.b64encode(file).decode() for file in files]}
    expected = expected_features(images)
    for request in ({"files": form}, {"json": listed}):
        np.testing.assert_allclose(array(http.post("/embed", headers=NPY, **request)), expected["pooled"], atol=1e-6)
        both = http.post("/embed", params={"outputs": "class,patches"}, headers=SAFETENSORS, **request)
        arrays = tensors(both)
        assert set(arrays) == {"class", "patches"}
        np.testing.assert_allclose(arrays["class"], expected["class_token"], atol=1e-6)
        np.testing.assert_allclose(arrays["patches"], expected["patches"], atol=1e-6)


def test_a_safetensors_answer_says_where_it_comes_from(http: httpx.Client, png: bytes) -> None:
    response = http.post("/embed", content=png, headers=SAFETENSORS)
    header = json.loads(response.content[8 : 8 + int.from_bytes(response.content[:8], "little")])
    assert header["__metadata__"] == {
        "request_id": response.headers["x-request-id"],
        "bundle_sha256": response.headers["x-bundle-sha256"],
        "grid": "4x4",
        "precision": "float32",
    }


@pytest.mark.parametrize("form", [NPY, JSON, SAFETENSORS])
def test_numbers_come_in_the_type_that_was_asked_for(http: httpx.Client, png: bytes, form: dict[str, str]) -> None:
    query = {"outputs": "patches", "dtype": "float16"}
    full = array(http.post("/embed", content=png, params={"outputs": "patches"}, headers=NPY))
    response = http.post("/embed", content=png, params=query, headers=form)
    if form is JSON:
        half = np.asarray(response.json()["patches"], np.float16)
    else:
        half = array(response) if form is NPY else tensors(response)["patches"]
        assert half.dtype == np.float16
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_normalized_vectors_have_length_one_and_the_attention_is_left_alone(http: httpx.Client, png: bytes) -> None:
    query = {"outputs": "pooled,class,patches,attention"}
    plain = tensors(http.post("/embed", content=png, params=query, headers=SAFETENSORS))
    scaled = tensors(http.post("/embed", content=png, params={**query, "normalize": "true"}, headers=SAFETENSORS))
    for name in ("pooled", "class", "patches"):
        np.testing.assert_allclose(np.linalg.norm(scaled[name], axis=-1), 1, atol=1e-6)
        lengths = np.linalg.norm(plain[name], axis=-1, keepdims=True)
        np.testing.assert_allclose(scaled[name] * lengths, plain[name], atol=1e-6)
    np.testing.assert_array_equal(scaled["attention"], plain["attention"])


def test_a_black_image_has_no_direction_and_stays_zero(http: httpx.Client) -> None:
    black = encoded(np.zeros((3, 32, 32), np.uint8))
    np.testing.assert_array_equal(array(http.post("/embed?normalize=true", content=black, headers=NPY)), 0)


def test_the_image_at_fault_among_several_is_named(http: httpx.Client, png: bytes) -> None:
    form = [("images", ("a", png)), ("images", ("b", png[:200])), ("images", ("c", png))]
    assert "image 1: " in refused(http.post("/embed", files=form), 415, "image_truncated")["message"]


def test_more_images_than_a_request_may_have_are_refused(http: httpx.Client, png: bytes) -> None:
    form = [("images", ("a", png))] * 9
    assert "9 images; at most 8" in refused(http.post("/embed", files=form), 422, "too_many_images")["message"]
    assert array(http.post("/embed", files=form[:8], headers=NPY)).shape == (8, 3)


def test_the_answer_tells_what_took_how_long(http: httpx.Client, png: bytes) -> None:
    timing = http.post("/embed", content=png).headers["server-timing"]
    stages = {part.split(";dur=")[0]: float(part.split(";dur=")[1]) for part in timing.split(", ")}
    assert list(stages) == ["read", "decode", "queue", "inference", "encode"]
    assert all(0 <= value < 30_000 for value in stages.values())


@pytest.mark.parametrize(
    ("json_body", "field"),
    [
        ({}, "images"),
        ({"images": []}, "images"),
        ({"images": ["not base64!"]}, "images.0"),
        ({"images": [7]}, "images.0"),
        ({"images": ["aGVsbG8="], "mask": "aGVsbG8="}, "mask"),
        ([], "body"),
    ],
)
def test_a_bad_field_of_a_json_body_is_named(http: httpx.Client, json_body: Any, field: str) -> None:
    assert refused(http.post("/embed", json=json_body), 422, "bad_field")["message"].startswith(field)


def test_what_an_image_holds_is_not_repeated_in_an_error(http: httpx.Client) -> None:
    error = refused(http.post("/embed", json={"images": ["secret pixels"]}), 422, "bad_field")
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("files", "status", "text"),
    [
        ([("image", ("a", b"x"))], 422, "image: not a part of this form; expected images"),
        ([("mask", ("a", b"x"))], 422, "mask"),
        ([("images", (None, b"x"))], 400, "Every part must be a file"),
        ([("images", ("a", b""))], 400, "image 0 is empty"),
    ],
)
def test_a_bad_part_of_a_form_is_named(http: httpx.Client, files: Any, status: int, text: str) -> None:
    response = http.post("/embed", files=files)
    assert response.status_code == status
    assert text in response.json()["error"]["message"]


def test_a_form_without_its_end_is_refused(http: httpx.Client) -> None:
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(http.post("/embed", content=b"--x\r\nContent-Dispo", headers=head), 400, "bad_body")
    refused(http.post("/embed", content=b"nothing of a form", headers=head), 400, "bad_body")
    refused(http.post("/embed", content=b"--x--", headers={"Content-Type": "multipart/form-data"}), 400, "bad_body")
