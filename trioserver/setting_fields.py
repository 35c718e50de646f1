"""One setting apart from its value: names, kind, default, explanation.

`setting` declares a field of a class of attrs and hangs a `Setting` on it.
"""

from typing import TypeVar

import attrs

from trioserver.setting_kinds import MASK, Kind

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Setting:
    """What is known about one setting, apart from its value."""

    name: str = ""
    """Attribute of the class, and key in the TOML file."""
    group: str
    """Heading on the page of settings."""
    kind: Kind[object]
    default: str
    """As it is printed; a description if it is computed; empty if there is none."""
    optional: bool
    """Whether empty text means "not set"."""
    about: str
    """What it does, for an operator."""
    example: str
    aliases: tuple[str, ...]
    """Other environment names, the strongest first; the canonical name beats them all."""
    secret: bool

    @property
    def env(self) -> str:
        """The canonical name: that of the environment variable."""
        return self.name.upper()

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag, then its aliases."""
        return tuple(flag_name(name) for name in (self.name, *self.aliases))

    def parse(self, text: str) -> object:
        """Return the value that ``text`` means.

        Raises:
            ValueError: With the end of the sentence '"abc" ...'.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8") from None
        return None if self.optional and not text else self.kind.parse(text)

    def show(self, value: object) -> str:
        """Return ``value`` as it may be printed: as one would write it, secrets masked."""
        if value is None:
            return ""
        return MASK if self.secret else self.kind.show(value)


def flag_name(name: str) -> str:
    """Return the flag for a name: ``--ws-port`` for ``WS_PORT``."""
    return "--" + name.lower().replace("_", "-")


def plain_name(name: str) -> str:
    """Return the name without regard to where it is written: ``--WS-Port`` is ``ws_port``."""
    return name.removeprefix("--").replace("-", "_").lower()


def setting(
    group: str,
    kind: Kind[T],
    default: T,
    about: str,
    *,
    example: str = "",
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    shown: str = "",
) -> T:
    """Declare a setting: a field of a class of attrs.

    Args:
        group: Heading on the page of settings.
        kind: How its values are written.
        default: Its value if nobody says anything; None makes the setting optional.
        about: What it does, for an operator.
        example: A good value, for error messages; the default serves if it is printable.
        aliases: Other environment names, the strongest first.
        secret: Never printed.
        shown: The description of a default that is computed.
    """
    printed = shown or ("" if default is None else kind.show(default))
    about_it = Setting(
        group=group,
        kind=kind,
        default=printed,
        optional=default is None,
        about=about,
        example=example or printed,
        aliases=aliases,
        secret=secret,
    )
    # Tracebacks and debuggers print values: the repr must be as safe as every other output.
    field: T = attrs.field(default=default, metadata={"setting": about_it}, repr=about_it.show)
    return field
