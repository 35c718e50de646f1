"""Who is on the other side, as the handshake described it."""

from trioserver.caller import MAX_AGENT, caller
from trioserver.peers import UNIX, address_of


def test_what_a_client_says_of_itself_is_made_harmless() -> None:
    """Cut, and without characters that nobody sees."""
    found = caller(UNIX, None, b"a\x1b[2J\x85\xe9" + b"x" * 1000, "web")
    assert "a?[2J?é" == found.agent[:7]
    assert MAX_AGENT == len(found.agent)
    assert ("unix", "web", None) == (found.address, found.client_type, found.key)


def test_addresses_are_shown_as_people_write_them() -> None:
    """IPv4 with dots, IPv6 in the usual form."""
    for text in ("192.0.2.1", "2001:db8::1"):
        address = address_of(text)
        assert address is not None
        assert text == caller(address, 1, b"", "").address


def test_the_same_caller_is_one_object() -> None:
    """Thousands come with the same program from the same proxy."""
    assert caller(7, 1, b"agent", "web") is caller(7, 1, b"agent", "web")


def test_what_is_remembered_is_cut_first() -> None:
    """Thousands of long programs' names are not kept whole for their sake."""
    assert caller(7, 1, b"x" * 8000, "") is caller(7, 1, b"x" * MAX_AGENT + b"y" * 8000, "")
