"""What a request gets that cannot be served: problem details (RFC 9457), and small JSON answers."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from trioserver import health

_NO_HEADERS: Final[Mapping[str, str]] = {}


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """A request that is refused: raised anywhere below a route, answered by `answer_problem`."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        """Say what is wrong.

        Args:
            status: HTTP status.
            detail: A sentence or two for the developer of the client; no secrets.
            headers: Further headers of the answer.
        """
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def answer_headers(content_type: str) -> dict[str, str]:
    """Return the headers of a small answer."""
    return {"Content-Type": content_type, **health.SMALL_HEADERS}


def json_response(body: bytes, status: int = HTTPStatus.OK) -> Response:
    """Return a response with JSON that is true at this moment."""
    return Response(body, status_code=status, headers=answer_headers(health.JSON))


def problem_response(
    status: int, detail: str = "", headers: Mapping[str, str] = _NO_HEADERS
) -> Response:
    """Return a response with problem details; without ``detail`` the status says it all."""
    body = health.problem_body(status, detail)
    together = {**answer_headers(health.PROBLEM_JSON), **headers}
    return Response(body, status_code=status, headers=together)


async def answer_problem(_request: Request, error: Exception) -> Response:
    """Answer a `Problem` or Starlette's own refusals; to be registered for both."""
    if isinstance(error, Problem):
        return problem_response(error.status, error.detail, error.headers)
    if isinstance(error, HTTPException):
        return problem_response(error.status_code, headers=error.headers or {})
    raise error  # cannot be: it is registered for nothing else


async def answer_bug(_request: Request, _error: Exception) -> Response:
    """Answer what should not have been raised."""
    # Starlette raises the error once more after this, and `front` logs it.
    return problem_response(HTTPStatus.INTERNAL_SERVER_ERROR)
