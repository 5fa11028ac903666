"""POST /reconstruct: an image completed from some of its patches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving import masks, openapi, preprocess
from serving.answers import JSON, NPY, PNG, SAFETENSORS, negotiate, written
from serving.bodies import Body, ReconstructBody
from serving.masks import Mask
from serving.service import Admitted, Pixels, ReconstructItem, Service, unless_gone


class ReconstructQuery(BaseModel):
    """The query of /reconstruct."""

    model_config = ConfigDict(extra="forbid")

    mask_ratio: float | None = Field(
        None, gt=0, lt=1, description="share of the patches to hide; the bundle's own by default", examples=[0.5]
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="which patches are hidden; the same seed hides the same; 0 by default"
    )
    mask_kind: masks.MaskKind | None = Field(
        None, description="patches hidden each by itself, or in rectangles as in pretraining; random by default"
    )
    masked: str | None = Field(
        None,
        description="indices of the patches to hide, row by row and comma-separated, as X-Masked-Patches gives them",
        examples=["0,1,7"],
    )
    skip_regressor: bool = Field(
        False, description="hide nothing: the whole image through encoder and decoder, without the regressor"
    )
    view: masks.View = Field(
        "pasted",
        description="the PNG: the reconstruction alone; the hidden patches pasted into the image; or image, image with "
        "hidden patches in grey, and pasted side by side (without regressor: image and completion)",
    )

    @field_validator("masked")
    @classmethod
    def _are_indices(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", value, re.ASCII):
            raise ValueError("expected indices of patches, comma-separated, as in 0,1,7")
        return value

    @model_validator(mode="after")
    def _one_mask(self) -> ReconstructQuery:
        drawn = self._drawn()
        if self.masked is not None and drawn:
            raise ValueError(f"masked says which patches are hidden; leave out {' and '.join(drawn)}")
        if self.skip_regressor and (drawn or self.masked is not None):
            raise ValueError("skip_regressor=true hides no patch; leave out mask_ratio, seed, mask_kind and masked")
        return self

    def says_mask(self) -> bool:
        """Whether it leaves no choice of the mask to the body."""
        return self.skip_regressor or self.masked is not None or bool(self._drawn())

    def _drawn(self) -> list[str]:
        return [name for name in ("mask_ratio", "seed", "mask_kind") if getattr(self, name) is not None]


class Hidden(NamedTuple):
    """The mask of one request and where it comes from; ratio and seed where it was drawn."""

    mask: Mask
    kind: str
    ratio: float | None = None
    seed: int | None = None


def router(service: Service) -> APIRouter:
    """The call over `service`."""
    routes = APIRouter()

    @routes.post("/reconstruct", response_class=Response, **openapi.reconstruct(service.bundle))
    async def reconstruct(request: Request, query: Annotated[ReconstructQuery, Query()]) -> Response:
        """The image completed from some of its patches: drawn at random, named, or painted as a mask.

        PNG is the `view`; JSON, npy and safetensors hold the whole reconstruction, float32 [1, C, H, W] in 0-1.
        X-Masked-Patches says what was hidden; sent back as `masked` it repeats the call exactly.
        """
        offered = [PNG, JSON, NPY, SAFETENSORS]
        form = negotiate(request.headers.get("accept"), offered, f"leave Accept out to get {PNG}")
        service.bundle.check_capability("skip_reconstruct" if query.skip_regressor else "reconstruct")
        admitted = await service.admit(service.reconstruction, request, ReconstructBody)
        return await unless_gone(request, _answer(service, admitted, query, form))

    return routes


async def _answer(service: Service, admitted: Admitted, query: ReconstructQuery, form: str) -> Response:
    hidden = await service.in_thread(_hidden, service, query, admitted.body)
    with admitted.stages.timed("decode"):
        (image,) = await service.decode(service.reconstruction, admitted.body.images)
    item = ReconstructItem(image, hidden.mask if hidden else None)
    (reconstruction,) = await service.run(service.reconstruction, [item], admitted.stages)
    with admitted.stages.timed("encode"):
        data = await service.in_thread(_write, service, admitted.request, query, image, hidden, reconstruction, form)
    return service.response(admitted, data, form, _echo(hidden))


def _hidden(service: Service, query: ReconstructQuery, body: Body) -> Hidden | None:
    """Errors: RequestValidationError, ImageError for a mask that is no image."""
    # Of what the query alone says there is only one; see `_one_mask`.
    if query.says_mask() + (body.masked is not None) + (body.mask is not None) > 1:
        raise _bad("mask", "the mask is given twice; send one of masked, a mask image, a ratio with seed, or none")
    if query.skip_regressor:
        return None
    named = body.masked if query.masked is None else [int(text) for text in query.masked.split(",")]
    if named is not None:
        num_patches = service.bundle.info.model.num_patches
        return Hidden(_valid("masked", lambda: masks.given_mask(num_patches, named)), "given")
    if body.mask is not None:
        painting = body.mask
        return Hidden(_valid("mask", lambda: service.read_mask(painting)), "image")
    kind, seed = query.mask_kind or "random", query.seed or 0
    ratio, mask = service.bundle.draw_mask(kind, query.mask_ratio, seed)
    return Hidden(mask, kind, ratio, seed)


def _write(
    service: Service,
    request: Request,
    query: ReconstructQuery,
    image: Pixels,
    hidden: Hidden | None,
    reconstruction: NDArray[np.float32],
    form: str,
) -> bytes:
    model = service.bundle.info.model
    if form == PNG:
        masked = hidden.mask.masked if hidden else None
        return masks.png(masks.draw(query.view, image, reconstruction, masked, model.patch_size))
    about = service.about(request)
    arrays: dict[str, NDArray[Any]] = {"reconstruction": reconstruction[None]}
    described: dict[str, Any] = {"grid": model.grid, "shape": [1, *image.shape]}
    if hidden:
        arrays |= hidden.mask._asdict()
        about |= {"mask_kind": hidden.kind}
        described |= {"mask_ratio": hidden.ratio, "seed": hidden.seed}
        if hidden.ratio is not None:
            about |= {"mask_ratio": str(hidden.ratio), "seed": str(hidden.seed)}
    return written(form, arrays, about, described)


def _echo(hidden: Hidden | None) -> dict[str, str]:
    """The headers that say what was hidden."""
    if hidden is None:
        return {}
    headers = {"X-Mask-Kind": hidden.kind, "X-Masked-Patches": ",".join(map(str, hidden.mask.masked))}
    if hidden.ratio is not None:
        headers |= {"X-Mask-Ratio": str(hidden.ratio), "X-Mask-Seed": str(hidden.seed)}
    return headers


def _valid(field: str, make: Callable[[], Mask]) -> Mask:
    try:
        return make()
    except preprocess.ImageError as error:
        raise preprocess.ImageError(error.reason, f"{field}: {error}") from None
    except ValueError as error:
        raise _bad(field, str(error)) from None


def _bad(field: str, problem: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", field), "msg": problem}])
