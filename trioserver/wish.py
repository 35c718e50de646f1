"""Where a client wants to go on, as it says itself: in its handshake's query, or in ``auth``."""

from collections.abc import Mapping
from typing import Final

import attrs
import msgspec

from trioserver import messages
from trioserver.errors import ClientError


@attrs.frozen(kw_only=True)
class Wish:
    """What a client says about itself beside who its user is."""

    device: str = ""
    """What it calls itself; empty if it has no name."""

    position: str = ""
    """Where it stopped, in words that only the server understands; empty if it does not say."""

    ack: bool = False
    """Whether it will acknowledge, and wants again what it has not acknowledged."""

    client_type: str = ""
    """What kind of client it says it is (``web``, ``ios``); empty if it does not say."""


NO_WISH: Final = Wish()


def of_query(parameters: Mapping[str, str]) -> Wish:
    """Return the wish in the query parameters of a handshake.

    Raises:
        ClientError: ``bad_message``; says which parameter cannot be.
    """
    device = parameters.get("device", "")
    position = parameters.get("position", "")
    ack = parameters.get("ack", "")
    kind = parameters.get("client_type", "")
    if not (device or position or ack or kind):
        return NO_WISH
    if device:
        try:
            msgspec.convert(device, messages.Device)
        except msgspec.ValidationError:
            problem = f"device is 1 to {messages.MAX_DEVICE} visible ASCII characters"
            raise ClientError("bad_message", problem) from None
    if len(position) > messages.MAX_POSITION:
        raise ClientError("bad_message", f"position is longer than {messages.MAX_POSITION}")
    if kind:
        try:
            msgspec.convert(kind, messages.ClientType)
        except msgspec.ValidationError:
            problem = f"client_type is 1 to {messages.MAX_CLIENT_TYPE} of a-z A-Z 0-9 . _ -"
            raise ClientError("bad_message", problem) from None
    if ack not in {"", "0", "1", "false", "true"}:
        raise ClientError("bad_message", "ack is 1 or 0")
    wanted = ack in {"1", "true"}
    return Wish(device=device, position=position, ack=wanted, client_type=kind)


def of_auth(message: messages.Auth) -> Wish:
    """Return the wish in a first message."""
    return Wish(
        device=message.device or "",
        position=message.position or "",
        ack=message.ack,
        client_type=message.client_type or "",
    )
