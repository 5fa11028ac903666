"""The optional key that callers send."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from serving.errors import ApiError

_bearer = HTTPBearer(auto_error=False)
_header = APIKeyHeader(name="X-Api-Key", auto_error=False)


def key_check(key: SecretStr) -> Callable[..., Awaitable[None]]:
    """A dependency that lets pass who sends `key`, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`."""
    expected = key.get_secret_value().encode()

    # Asynchronous, or each check would cost a change of thread.
    async def check(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
        header: Annotated[str | None, Security(_header)],
    ) -> None:
        """Errors: ApiError 401."""
        given = [bearer.credentials if bearer else "", header or ""]
        # In constant time: how long it takes tells nothing about the key. A proxy may send a bearer of its own.
        if not any(secrets.compare_digest(text.encode(), expected) for text in given):
            raise ApiError(
                401,
                "unauthorized",
                "the key is missing or wrong",
                "send it as Authorization: Bearer KEY, or as X-Api-Key: KEY",
                {"WWW-Authenticate": "Bearer"},
            )

    return check
