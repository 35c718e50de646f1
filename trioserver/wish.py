"""Where a client wants to go on, as it says itself: in its handshake, or in ``auth``."""

from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

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

    batch: bool = False
    """Whether it takes several messages in one frame, as an array."""

    chat: bool = False
    """Whether it has come to a chat path."""

    label: str = ""
    """What it calls its chat connection; empty if it has no name for it."""

    session_id: str = ""
    """The chat session that it wants to go on with; empty for a new one."""

    def after(self, handshake: "Wish") -> "Wish":
        """Return the wish of a client whose handshake has said that much already."""
        if handshake is NO_WISH:
            return self
        return Wish(
            device=self.device or handshake.device,
            position=self.position or handshake.position,
            ack=self.ack or handshake.ack,
            client_type=self.client_type or handshake.client_type,
            batch=self.batch or handshake.batch,
            chat=handshake.chat,
            label=handshake.label,
            session_id=self.session_id or handshake.session_id,
        )


NO_WISH: Final = Wish()

PATH: Final = "/ws"
CHAT_PATH: Final = "/ws/chat"


def is_path(path: str) -> bool:
    """Return whether WebSockets are opened on this path."""
    if path in {PATH, CHAT_PATH}:
        return True
    # One more part, the label, may follow.
    return path.startswith("/ws/chat/") and path.find("/", len("/ws/chat/")) < 0


def of_request(path: str, parameters: Mapping[str, str]) -> Wish:
    """Return the wish in the path and the query parameters of a handshake.

    Args:
        path: One of which `is_path` holds.
        parameters: Unquoted.

    Raises:
        ClientError: ``bad_message``; says what cannot be.
    """
    wish = of_query(parameters)
    if path == PATH:
        return wish
    label = unquote(path[len("/ws/chat/") :])
    if label:
        _check(label, messages.Label, "connection_id is 1 to 64 visible ASCII characters")
    session_id = parameters.get("session_id", "")
    if session_id:
        _check(session_id, messages.SessionId, "session_id is a UUID")
    return attrs.evolve(wish, chat=True, label=label, session_id=session_id.lower())


def _check(value: str, kind: object, problem: str) -> None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise ClientError("bad_message", problem) from None


def _is_set(parameters: Mapping[str, str], name: str) -> bool:
    value = parameters.get(name, "")
    if value not in {"", "0", "1", "false", "true"}:
        raise ClientError("bad_message", f"{name} is 1 or 0")
    return value in {"1", "true"}


def of_query(parameters: Mapping[str, str]) -> Wish:
    """Return the wish in the query parameters of a handshake on `PATH`.

    Raises:
        ClientError: ``bad_message``; says which parameter cannot be.
    """
    if not parameters:
        return NO_WISH
    device = parameters.get("device", "")
    position = parameters.get("position", "")
    kind = parameters.get("client_type", "")
    ack, batch = _is_set(parameters, "ack"), _is_set(parameters, "batch")
    if not (device or position or ack or kind or batch):
        return NO_WISH
    if device:
        problem = f"device is 1 to {messages.MAX_DEVICE} visible ASCII characters"
        _check(device, messages.Device, problem)
    if len(position) > messages.MAX_POSITION:
        raise ClientError("bad_message", f"position is longer than {messages.MAX_POSITION}")
    if kind:
        problem = f"client_type is 1 to {messages.MAX_CLIENT_TYPE} of a-z A-Z 0-9 . _ -"
        _check(kind, messages.ClientType, problem)
    return Wish(device=device, position=position, ack=ack, client_type=kind, batch=batch)


def of_auth(message: messages.Auth) -> Wish:
    """Return the wish in a first message; what its path has said is `Wish.after` it."""
    return Wish(
        device=message.device or "",
        position=message.position or "",
        ack=message.ack,
        client_type=message.client_type or "",
        batch=message.batch,
        session_id=(message.session_id or "").lower(),
    )
