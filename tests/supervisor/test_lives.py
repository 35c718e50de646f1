"""Names of lives, and who is over."""

import re

from supervisor.lives import Lives


def test_each_spawn_gets_a_name_of_its_own() -> None:
    """Also if nothing came of the one before; short enough for people to read it."""
    lives = Lives("0a1b2c3d.19aa3f21c4e", slots=2)
    names = [lives.next_name() for _ in range(200)]

    assert "0a1b2c3d.19aa3f21c4e.1" == names[0]
    assert 200 == len(set(names))
    assert all(re.fullmatch(r"[0-9a-z.-]{1,26}", name) for name in names)


def test_who_was_reaped_is_over() -> None:
    """In the order of reaping; processes without a name, and those who live, are not."""
    lives = Lives("s.1", slots=2)
    for pid in (10, 11, 12):
        lives.began(pid, lives.next_name())

    assert [True, False, True, False] == [lives.ended(pid) for pid in (12, 99, 10, 10)]
    assert ("s.1.3", "s.1.1") == lives.over


def test_a_pid_that_comes_again_is_somebody_else() -> None:
    """The kernel may give a successor the number of a life that is over."""
    lives = Lives("s.1", slots=2)
    for _ in range(2):
        lives.began(10, lives.next_name())
        assert lives.ended(10)

    assert ("s.1.1", "s.1.2") == lives.over


def over(slots: int, ended: int) -> tuple[str, ...]:
    """Return who is remembered after so many ends."""
    lives = Lives("s.1", slots=slots)
    for pid in range(ended):
        lives.began(pid, lives.next_name())
        lives.ended(pid)
    return lives.over


def test_the_latest_are_remembered() -> None:
    """Sixteen, however often a worker crashes: they are passed on in an argument."""
    assert tuple(f"s.1.{n}" for n in range(85, 101)) == over(slots=2, ended=100)


def test_a_server_whose_workers_all_died_at_once_names_them_all() -> None:
    """And their predecessors."""
    assert tuple(f"s.1.{n}" for n in range(1, 101)) == over(slots=50, ended=100)
