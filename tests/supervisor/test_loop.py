"""The supervisor as a process, with children that are processes."""

from collections.abc import Callable

from tests.supervisor.harness import Server


def test_it_says_when_everything_is_ready(start: Callable[..., Server]) -> None:
    """One friendly line on standard output; status agrees; SIGTERM ends it with 0."""
    server = start()
    line = server.wait_ready()
    print(line, server.status(), server.log())
    assert server.verdict("stop").ok
    assert server.wait() == 0
    print(server.log())
    assert 0
