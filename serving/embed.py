"""POST /embed: features of images."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from serving import openapi
from serving.answers import JSON, NPY, SAFETENSORS, negotiate, written
from serving.bodies import EmbedBody
from serving.bundle_info import Output
from serving.service import Admitted, EmbedItem, Features, Service, unless_gone

# The names callers use, and the arrays of the bundle they stand for.
OUTPUTS: dict[str, Output] = {
    "pooled": "pooled",
    "class": "class_token",
    "patches": "patches",
    "attention": "class_attention",
}
_LARGE_BYTES = 2**20


class EmbedQuery(BaseModel):
    """The query of /embed."""

    model_config = ConfigDict(extra="forbid")

    outputs: str = Field(
        "pooled",
        description=f"comma-separated, of {', '.join(OUTPUTS)}: mean of the patch features [B, D], class token "
        "[B, D], patch features [B, h*w, D], attention of the class token in the last layer [B, heads, h*w]",
        examples=["pooled,class"],
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="type of the numbers in the answer")
    normalize: bool = Field(
        False, description="scale each feature vector to length 1, so that dot products are cosines; not the attention"
    )

    @field_validator("outputs")
    @classmethod
    def _are_known(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        unknown = [name for name in names if name not in OUTPUTS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not an output; expected some of {', '.join(OUTPUTS)}")
        return ",".join(dict.fromkeys(names))

    def names(self) -> list[str]:
        return self.outputs.split(",")


def router(service: Service) -> APIRouter:
    """The call over `service`."""
    routes = APIRouter()

    @routes.post("/embed", response_class=Response, **openapi.embed(service.bundle))
    async def embed(request: Request, query: Annotated[EmbedQuery, Query()]) -> Response:
        """Features of one or several images.

        Every output has a first axis of as many entries as there are images. `application/x-npy` is one array, so it
        takes one output; `application/x-safetensors` takes any number.
        """
        offered, hint = [JSON, NPY, SAFETENSORS], "leave Accept out to get JSON"
        if len(query.names()) > 1:
            offered, hint = [JSON, SAFETENSORS], f"{NPY} holds one array: ask for one output, or for {SAFETENSORS}"
        form = negotiate(request.headers.get("accept"), offered, hint)
        outputs = tuple(OUTPUTS[name] for name in query.names())
        service.bundle.check_outputs(outputs)
        admitted = await service.admit(service.embedding, request, EmbedBody)
        return await unless_gone(request, _answer(service, admitted, query, form))

    return routes


async def _answer(service: Service, admitted: Admitted, query: EmbedQuery, form: str) -> Response:
    with admitted.stages.timed("decode"):
        images = await service.decode(service.embedding, admitted.body.images)
    outputs = tuple(OUTPUTS[name] for name in query.names())
    results = await service.run(service.embedding, [EmbedItem(image, outputs) for image in images], admitted.stages)
    num_bytes = sum(array.nbytes for result in results for array in result.values())
    write = functools.partial(_write, service, admitted.request, query, results, form)
    with admitted.stages.timed("encode"):
        # What is long would hold up others.
        data = await service.in_thread(write) if form == JSON or num_bytes > _LARGE_BYTES else write()
    return service.response(admitted, data, form)


def _write(service: Service, request: Request, query: EmbedQuery, results: list[Features], form: str) -> bytes:
    arrays = {name: _formed(name, [result[OUTPUTS[name]] for result in results], query) for name in query.names()}
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    return written(form, arrays, service.about(request), {"grid": service.bundle.info.model.grid, "shapes": shapes})


def _formed(name: str, rows: list[NDArray[np.float32]], query: EmbedQuery) -> NDArray[Any]:
    array: NDArray[Any] = np.stack(rows)
    if query.normalize and name != "attention":
        # A vector of zeros has no direction, and stays.
        array = array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return array.astype(query.dtype)
