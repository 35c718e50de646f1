"""What every HTTP answer of both ports says in its head beside its content. Pure.

Most answers are JSON, for which a browser may do nothing at all: run nothing, load nothing, show it
in no frame, hand it to no other site. A page that needs more brings its own policy: what a caller
adds under the same name counts.

``Strict-Transport-Security`` is only said where we speak TLS ourselves. What stands in front of us
otherwise knows its own names, and a browser remembers it for a year.

An answer has the caller's ``X-Request-ID`` if that is a decent one, else a new one. Decent is what
can go into a log line and a header as it is: 1-128 visible ASCII characters, and only one such
header.
"""

import re
import secrets
from collections.abc import Sequence
from typing import Final

POLICY: Final = "Content-Security-Policy"
REQUEST_ID: Final = "X-Request-ID"

NOTHING: Final = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""The policy of what is no page."""

HEADERS: Final = {
    # Small answers say how things are at this moment, or are about secrets: nobody may keep them.
    "Cache-Control": "no-store",
    POLICY: NOTHING,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Says less than frame-ancestors, to browsers that do not know that.
    "X-Frame-Options": "DENY",
}
"""On every answer, TLS or not, unless the caller brings its own."""

TLS_HEADERS: Final = {**HEADERS, "Strict-Transport-Security": "max-age=31536000"}
"""On every answer that goes out through our own TLS."""

MAX_REQUEST_ID: Final = 128

_DECENT: Final = re.compile(rb"[!-~]{1,%d}" % MAX_REQUEST_ID)
# One quantifier: with more, a line full of spaces takes minutes.
_ID_LINES: Final = re.compile(rb"(?im)^x-request-id:([^\r\n]*)\r?$")
_BLANK_LINE: Final = re.compile(rb"\n\r?\n")


def request_id(given: Sequence[bytes]) -> str:
    """Return the caller's id if it is a decent one, else a new one.

    Args:
        given: The values of all its ``X-Request-ID``.
    """
    if len(given) == 1 and _DECENT.fullmatch(given[0]):
        return given[0].decode("ascii")
    return new_request_id()


def request_id_in(head: bytes | bytearray) -> str:
    """Return the same of the bytes of a head, which may be malformed, or end anywhere.

    Args:
        head: What comes behind its blank line, a body or somebody's next request, does not count.
    """
    blank = _BLANK_LINE.search(head)
    end = len(head) if blank is None else blank.end()
    return request_id([value.strip(b" \t") for value in _ID_LINES.findall(head, 0, end)])


def new_request_id() -> str:
    """Return an id that nobody else has: 16 hexadecimal digits."""
    return secrets.token_hex(8)
