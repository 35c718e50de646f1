"""The crowd: who gets a place on the internal port, and who loses one."""

import attrs

from trioserver.gateway.crowd import Crowd


@attrs.define(eq=False)
class Guest:
    """Somebody who is connected."""

    resting_since: float | None = None
    address: int | None = None
    aborted: bool = False

    def abort(self) -> None:
        """Be gone."""
        self.aborted = True


def crowd(*guests: Guest, places: int) -> Crowd[Guest]:
    """Return a crowd that has taken all of them in."""
    made: Crowd[Guest] = Crowd(places)
    assert all(made.admit(guest) for guest in guests)
    return made


def test_while_there_is_room_nobody_goes() -> None:
    """All that there are places for are let in, and who has left makes room."""
    guests = [Guest(0.0) for _ in range(3)]
    full = crowd(*guests[:2], places=2)

    was_full = full.is_full
    full.leave(guests[0])
    full.leave(guests[0])

    assert (True, False) == (was_full, full.is_full)
    assert full.admit(guests[2])
    assert {guests[1], guests[2]} == set(full)
    assert not any(guest.aborted for guest in guests)


def test_who_has_rested_longest_goes() -> None:
    """Not who came first, and nobody who has a request under way."""
    guests = [Guest(3.0), Guest(None), Guest(1.0), Guest(2.0)]
    full = crowd(*guests, places=4)
    newcomers = [Guest(9.0), Guest(9.0)]

    assert full.admit(newcomers[0])
    assert [False, False, True, False] == [guest.aborted for guest in guests]
    assert full.admit(newcomers[1])
    assert [False, False, True, True] == [guest.aborted for guest in guests]

    assert {*guests[:2], *newcomers} == set(full)


def test_if_all_are_busy_nobody_can_come() -> None:
    """What is under way goes on, and who is turned away takes no place."""
    guests = [Guest(None) for _ in range(2)]
    full = crowd(*guests, places=2)

    assert not full.admit(Guest(0.0))
    assert set(guests) == set(full)
    assert not any(guest.aborted for guest in guests)


def test_an_address_has_a_quarter() -> None:
    """With one more it loses its own, or is turned away; nobody else notices."""
    stranger = Guest(0.0, address=2)
    mine = [Guest(None, address=1), Guest(5.0, address=1)]
    some = crowd(stranger, *mine, places=8)

    third = Guest(None, address=1)
    assert some.admit(third)
    assert [False, True] == [guest.aborted for guest in mine]
    assert not some.admit(Guest(6.0, address=1))
    assert some.admit(Guest(6.0, address=2))

    assert not stranger.aborted
    assert not third.aborted


def test_who_has_no_address_is_not_counted() -> None:
    """One may have all places."""
    assert 8 == len(crowd(*(Guest(None) for _ in range(8)), places=8))


def test_a_small_crowd_has_room_for_every_address() -> None:
    """A quarter of very few is one."""
    assert 2 == len(crowd(Guest(None, address=1), Guest(None, address=2), places=2))
