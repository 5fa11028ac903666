"""POST /reconstruct as its callers meet it: a real process, real HTTP, a real bundle."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from http_answers import JSON, NPY, SAFETENSORS, array, encoded, npy, picture, refused, tensors
from numpy.typing import NDArray
from PIL import Image
from running_server import Server, running
from tiny_bundle import DEFAULT_MASK_RATIO, expected_features, expected_reconstruction, expected_skip, write_tiny_bundle

from serving.masks import block_mask, given_mask, paste, random_mask

Pixels = Callable[..., NDArray[np.uint8]]


def test_reconstruct_pastes_the_hidden_patches_by_default(
    http: httpx.Client, png: bytes, image: NDArray[np.uint8]
) -> None:
    response = http.post("/reconstruct", content=png)
    visible, masked = random_mask(16, DEFAULT_MASK_RATIO, 0)
    reconstruction = expected_reconstruction(image[None], visible[None], masked[None])[0].astype(np.float32)
    got = picture(response).astype(int)
    np.testing.assert_allclose(got, paste(image, reconstruction, masked, 8).astype(int), atol=1)
    shown = np.isin(np.arange(16), visible).reshape(4, 4).repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(got[:, shown], image[:, shown])


def test_arrays_and_mask_come_as_json_and_npy(http: httpx.Client, png: bytes, image: NDArray[np.uint8]) -> None:
    query = {"mask_ratio": "0.75", "seed": "3"}
    body = http.post("/reconstruct", content=png, params=query, headers=JSON).json()
    visible, masked = random_mask(16, 0.75, 3)
    assert (body["visible"], body["masked"]) == (visible.tolist(), masked.tolist())
    assert (body["mask_ratio"], body["seed"], body["shape"]) == (0.75, 3, [1, 3, 32, 32])
    got = np.asarray(body["reconstruction"], np.float32)
    np.testing.assert_allclose(got, expected_reconstruction(image[None], visible[None], masked[None]), atol=1e-6)
    binary = array(http.post("/reconstruct", content=png, params=query, headers=NPY))
    np.testing.assert_array_equal(binary, got)


@pytest.mark.parametrize(
    "query", [{}, {"seed": "5"}, {"mask_ratio": "0.3", "seed": "4294967295"}, {"mask_ratio": "1e-3"}]
)
def test_the_echoed_mask_repeats_the_same_picture(http: httpx.Client, png: bytes, query: dict[str, str]) -> None:
    first = http.post("/reconstruct", content=png, params=query)
    echoed = {"mask_ratio": first.headers["x-mask-ratio"], "seed": first.headers["x-mask-seed"]}
    again = http.post("/reconstruct", content=png, params=echoed)
    assert again.content == first.content
    masked = [int(index) for index in first.headers["x-masked-patches"].split(",")]
    assert masked == random_mask(16, float(echoed["mask_ratio"]), int(echoed["seed"]))[1].tolist()


def test_another_seed_hides_other_patches(http: httpx.Client, png: bytes) -> None:
    masks = {
        http.post("/reconstruct", content=png, params={"seed": seed}).headers["x-masked-patches"] for seed in range(4)
    }
    assert len(masks) == 4


def test_every_view_is_drawn(http: httpx.Client, png: bytes, image: NDArray[np.uint8]) -> None:
    views = {
        view: picture(http.post("/reconstruct", content=png, params={"view": view}))
        for view in ("completion", "pasted", "side_by_side")
    }
    assert views["completion"].shape == (3, 32, 32)
    assert views["side_by_side"].shape == (3, 32, 96)
    np.testing.assert_array_equal(views["side_by_side"][:, :, :32], image)
    np.testing.assert_array_equal(views["side_by_side"][:, :, 64:], views["pasted"])
    assert (views["completion"] != views["pasted"]).any()


def test_the_path_without_regressor_hides_nothing(http: httpx.Client, png: bytes, image: NDArray[np.uint8]) -> None:
    skip = {"skip_regressor": "true"}
    response = http.post("/reconstruct", content=png, params=skip)
    assert not any(name.startswith("x-mask") for name in response.headers)
    np.testing.assert_array_equal(picture(response), 255 - image)
    body = http.post("/reconstruct", content=png, params=skip, headers=JSON).json()
    assert "masked" not in body
    assert "seed" not in body
    np.testing.assert_allclose(body["reconstruction"], expected_skip(image[None]), atol=1e-6)


def test_grey_bundles_take_and_give_grey(tmp_path: Path, random_pixels: Pixels) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle", channels=1, size=(16, 24), reconstructors=False)
    grey = random_pixels(1, 16, 24)
    buffer = io.BytesIO()
    Image.fromarray(grey[0]).save(buffer, "PNG")
    with running(folder, tmp_path / "log", {}) as server:
        pooled = array(httpx.post(server.url + "/embed", content=buffer.getvalue(), headers=NPY))
        np.testing.assert_allclose(pooled, expected_features(grey[None])["pooled"], atol=1e-6)
        for query in ("", "?skip_regressor=true"):
            response = httpx.post(server.url + "/reconstruct" + query, content=buffer.getvalue())
            assert "capabilities" in refused(response, 404, "capability_absent")["message"]


def test_any_number_of_channels_comes_as_a_numpy_file(tmp_path: Path, random_pixels: Pixels, png: bytes) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle", channels=13, size=(24, 32))
    pixels = random_pixels(13, 24, 32)
    body = npy(pixels)
    visible, masked = random_mask(12, DEFAULT_MASK_RATIO, 0)
    reconstruction = expected_reconstruction(pixels[None], visible[None], masked[None])
    with running(folder, tmp_path / "log", {}) as server, httpx.Client(base_url=server.url) as client:
        # 16 bits, channels last, any type of body: the same pixels.
        deep = npy(pixels.transpose(1, 2, 0).astype(np.uint16) * 257)
        for content, content_type in ((body, NPY["Accept"]), (deep, NPY["Accept"]), (body, "image/x-anything")):
            headers = {**NPY, "Content-Type": content_type}
            patches = array(client.post("/embed", content=content, params={"outputs": "patches"}, headers=headers))
            np.testing.assert_allclose(patches, expected_features(pixels[None])["patches"], atol=1e-6)
        got = array(client.post("/reconstruct", content=body, headers=NPY))
        np.testing.assert_allclose(got, reconstruction, atol=1e-6)
        drawn = picture(client.post("/reconstruct", content=body, params={"view": "side_by_side"}))
        assert drawn.shape == (3, 24, 96)
        np.testing.assert_array_equal(drawn[..., :32], pixels[:3])
        error = refused(client.post("/embed", content=png), 415, "image_unsupported")
        assert "3 channels, expected 13" in error["message"]
        assert ".npy" in error["hint"]
        refused(client.post("/embed", content=body[:-1]), 415, "image_truncated")
        refused(client.post("/embed", content=npy(pixels.astype(np.float32))), 415, "image_unsupported")
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_numpy_file_of_three_channels_is_a_colour_image(http: httpx.Client, image: NDArray[np.uint8]) -> None:
    answer = array(http.post("/embed", content=npy(image), headers={**NPY, "Content-Type": "application/x-npy"}))
    np.testing.assert_allclose(answer, expected_features(image[None])["pooled"], atol=1e-6)
    error = refused(http.post("/embed", content=npy(image[:2])), 415, "image_unsupported")
    assert "2 channels, expected 3" in error["message"]


# Masks


def hidden(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [int(index) for index in response.headers["x-masked-patches"].split(",")]


@pytest.mark.parametrize("query", [{}, {"mask_ratio": "0.25", "seed": "9"}])
def test_blocks_are_hidden_as_the_module_draws_them(http: httpx.Client, png: bytes, query: dict[str, str]) -> None:
    response = http.post("/reconstruct", content=png, params={"mask_kind": "block", **query})
    ratio, seed = float(query.get("mask_ratio", DEFAULT_MASK_RATIO)), int(query.get("seed", 0))
    assert hidden(response) == block_mask((4, 4), ratio, seed).masked.tolist()
    assert response.headers["x-mask-kind"] == "block"
    assert (float(response.headers["x-mask-ratio"]), int(response.headers["x-mask-seed"])) == (ratio, seed)


def test_the_patches_that_are_named_are_hidden(http: httpx.Client, png: bytes, image: NDArray[np.uint8]) -> None:
    visible, masked = given_mask(16, [3, 0, 9])
    expected = expected_reconstruction(image[None], visible[None], masked[None])
    coded = base64.b64encode(png).decode()
    for request in (
        {"content": png, "params": {"masked": "9,0, 3"}},
        {"json": {"images": [coded], "masked": [9, 0, 3]}},
        {"files": {"images": ("a.png", png)}, "params": {"masked": "0,3,9"}},
    ):
        arrays = tensors(http.post("/reconstruct", headers=SAFETENSORS, **request))
        assert arrays["masked"].tolist() == [0, 3, 9]
        assert arrays["visible"].tolist() == visible.tolist()
        np.testing.assert_allclose(arrays["reconstruction"], expected, atol=1e-6)


@pytest.mark.parametrize("query", [{"mask_kind": "block", "seed": "4"}, {"mask_ratio": "0.7"}])
def test_the_patches_sent_back_repeat_the_call_exactly(http: httpx.Client, png: bytes, query: dict[str, str]) -> None:
    first = http.post("/reconstruct", content=png, params=query)
    again = http.post("/reconstruct", content=png, params={"masked": first.headers["x-masked-patches"]})
    assert again.content == first.content
    assert again.headers["x-mask-kind"] == "given"


def test_a_painted_mask_hides_where_it_is_white(http: httpx.Client, png: bytes) -> None:
    paint = np.zeros((3, 64, 64), np.uint8)
    paint[:, :32, 48:] = 255
    # Of the patch in the last row and column just less than half is white.
    paint[:, 48:55, 48:] = 255
    mask = encoded(paint)
    form = http.post("/reconstruct", files={"images": ("a", png), "mask": ("m", mask)})
    listed = {"images": [base64.b64encode(png).decode()], "mask": base64.b64encode(mask).decode()}
    body = http.post("/reconstruct", json=listed, headers=JSON).json()
    assert hidden(form) == body["masked"] == [3, 7]
    assert form.headers["x-mask-kind"] == body["mask_kind"] == "image"
    assert body["seed"] is body["mask_ratio"] is None


def test_a_painted_mask_may_have_one_pixel_for_each_patch(http: httpx.Client, png: bytes) -> None:
    paint = np.zeros((3, 4, 4), np.uint8)
    paint[:, 1, 2] = 255
    assert hidden(http.post("/reconstruct", files={"images": ("a", png), "mask": ("m", encoded(paint))})) == [6]


def test_a_safetensors_answer_tells_how_its_mask_was_drawn(http: httpx.Client, png: bytes) -> None:
    response = http.post("/reconstruct?mask_kind=block&seed=3", content=png, headers=SAFETENSORS)
    head = json.loads(response.content[8 : 8 + int.from_bytes(response.content[:8], "little")])["__metadata__"]
    assert (head["mask_kind"], head["mask_ratio"], head["seed"]) == ("block", str(DEFAULT_MASK_RATIO), "3")


@pytest.mark.parametrize(
    ("body", "query", "text"),
    [
        ({"masked": [16]}, "", "masked: 16 is not a patch"),
        ({"masked": [-1]}, "", "masked: -1 is not a patch"),
        ({"masked": []}, "", "masked: 0 of 16"),
        ({"masked": ["3", True]}, "", "masked.0"),
        ({"masked": [1], "mask": "white"}, "", "given twice"),
        ({"masked": [1]}, "masked=2", "given twice"),
        ({"masked": [1]}, "seed=2", "given twice"),
        ({"mask": "white"}, "skip_regressor=true", "given twice"),
        ({"mask": "white"}, "", "mask: 16 of 16"),
    ],
)
def test_a_mask_that_will_not_do_is_named(
    http: httpx.Client, png: bytes, body: dict[str, Any], query: str, text: str
) -> None:
    white = base64.b64encode(encoded(np.full((3, 8, 8), 255, np.uint8))).decode()
    body = {"images": [base64.b64encode(png).decode()], **body}
    if "mask" in body:
        body["mask"] = white
    assert text in refused(http.post(f"/reconstruct?{query}", json=body), 422, "bad_field")["message"]


def test_a_mask_that_is_no_image_is_refused(http: httpx.Client, png: bytes) -> None:
    form = {"images": ("a", png), "mask": ("m", b"hello")}
    assert "mask: " in refused(http.post("/reconstruct", files=form), 415, "image_unsupported")["message"]


def test_one_image_at_a_time(http: httpx.Client, png: bytes) -> None:
    form = [("images", ("a", png)), ("images", ("b", png))]
    assert "images: 2 files" in refused(http.post("/reconstruct", files=form), 422, "bad_field")["message"]
    coded = base64.b64encode(png).decode()
    assert "images" in refused(http.post("/reconstruct", json={"images": [coded, coded]}), 422, "bad_field")["message"]


def test_masks_of_one_batch_keep_to_their_images(server: Server, random_pixels: Pixels) -> None:
    """Many at once, of equal and of other sizes: each answer is that of its own image and mask."""
    images = random_pixels(48, 3, 32, 32)
    ratios = [(0.25, 0.5, 0.75)[index % 3] for index in range(48)]

    def ask(index: int) -> NDArray[Any]:
        query = {"mask_ratio": ratios[index], "seed": index}
        return array(client.post("/reconstruct", content=encoded(images[index]), params=query, headers=NPY))

    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(16) as pool:
        for index, got in enumerate(pool.map(ask, range(48))):
            visible, masked = random_mask(16, ratios[index], index)
            expected = expected_reconstruction(images[index : index + 1], visible[None], masked[None])
            np.testing.assert_allclose(got, expected, atol=1e-6)
