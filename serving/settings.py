"""What the operator can set: by environment variables that begin with CAE_SERVING_ (CAE_SERVING_PORT=8080), or a file.

The file is TOML with the same names in lower case (`port = 8080`); CAE_SERVING_CONFIG or `--config` names it. Flags win
over variables, variables over the file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from serving.bundle import Device
from serving.bundle_info import WantedPrecision
from serving.preprocess import PILLOW_MAX_PIXELS

PREFIX = "CAE_SERVING_"


class Settings(BaseSettings):
    """Settings of one server process. Values given to the constructor win over the environment."""

    # A misspelt key in the file must not be passed over.
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    config: Path | None = Field(None, description="TOML file with settings; none by default")
    bundle: Path = Field(Path("models/bundle"), description="folder of the bundle that `export` wrote")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every network interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    root_path: str = Field(
        "", pattern="^(/.*[^/])?$", description="path under which a proxy shows the server, /cae for example"
    )
    device: Device = Field("auto", description="cpu, cuda (refuse to start without it), or auto (CUDA where it works)")
    precision: WantedPrecision = Field(
        "auto",
        description="float32, int8, float16, or auto: the variant for the device, where the bundle has one that passed",
    )
    num_threads: int | None = Field(None, ge=1, description="threads of one inference; unset: the CPUs of this process")
    max_batch_size: int | None = Field(
        None,
        ge=1,
        description="images in one inference at most; unset: 8 on the CPU, 32 on CUDA",
    )
    batch_delay_ms: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="longest wait for a fuller batch; unset: 0 on the CPU, where batches gain little, 2 on CUDA",
    )
    max_queued_images: int = Field(128, ge=1, description="images of a call, admitted at once")
    max_queued_bytes: int = Field(256 * 2**20, ge=1, description="bytes of bodies of a call, admitted at once")
    max_images: int = Field(64, ge=1, description="images in one request")
    max_body_bytes: int = Field(20 * 2**20, ge=1, description="largest request body, in bytes")
    max_pixels: int = Field(
        50_000_000, ge=1, le=PILLOW_MAX_PIXELS, description="most pixels of an image, width x height"
    )
    body_timeout_s: float = Field(
        30,
        gt=0,
        description="longest time for a head or a body to arrive, and for a caller to take no more of its answer",
    )
    request_timeout_s: float = Field(60, gt=0, description="longest time in the queue; what is older is dropped")
    grace_s: float = Field(25, gt=0, description="time to finish what was admitted after SIGTERM")
    heartbeat_timeout_s: float = Field(
        60, ge=2, description="silence of the batch thread after which the server is not live; longer than any batch"
    )
    api_key: SecretStr | None = Field(
        None, min_length=8, description="key that callers must send; none by default: everybody may call"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description='origins whose pages may call, as JSON: ["https://example.org"]; "*" for all'
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity to log")
    log_format: Literal["json", "text"] = Field("json", description="of an entry: a JSON object or a line of text")

    @field_validator("api_key")
    @classmethod
    def _can_be_sent(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().isascii():
            raise ValueError("only ASCII characters can be sent in a header")
        return value

    @property
    def images_per_request(self) -> int:
        """More would never be admitted."""
        return min(self.max_images, self.max_queued_images)

    @property
    def bytes_per_request(self) -> int:
        """More would never be admitted."""
        return min(self.max_body_bytes, self.max_queued_bytes)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = init_settings().get("config") or env_settings().get("config")
        if not file:
            return init_settings, env_settings
        if not Path(file).is_file():
            # Or a mistyped name would mean the defaults.
            raise SettingsError(f"{file}: there is no such file of settings (--config or {PREFIX}CONFIG names it)")
        try:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(file))
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{file}: not TOML ({error})") from None
