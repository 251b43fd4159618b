"""OpenAI's error shape, the body of every answer that is not a success."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "service_unavailable_error",
    "timeout_error",
    "server_error",
]


class ErrorDetail(BaseModel):
    """`param` is the path of the field at fault (`fusion.experts.qa`, `messages[0].content`), if one field is."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail
