"""What the operator can set, by environment variables that begin with CAE_SERVING_ (CAE_SERVING_PORT=8080)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from serving.bundle import Device
from serving.preprocess import PILLOW_MAX_PIXELS


class Settings(BaseSettings):
    """Settings of one server process. Values given to the constructor win over the environment."""

    model_config = SettingsConfigDict(env_prefix="CAE_SERVING_", frozen=True)

    bundle: Path = Field(Path("models/bundle"), description="folder of the bundle that `export` wrote")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every network interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    device: Device = Field("auto", description="cpu, cuda (refuse to start without it), or auto (CUDA where it works)")
    num_threads: int | None = Field(None, ge=1, description="threads of one inference; unset: the CPUs of this process")
    max_body_bytes: int = Field(20 * 2**20, ge=1, description="largest request body, in bytes")
    max_pixels: int = Field(
        50_000_000, ge=1, le=PILLOW_MAX_PIXELS, description="most pixels of an image, width x height"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
