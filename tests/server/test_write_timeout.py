"""Whom the write timeout gives up, told from the bytes that were taken between two looks."""

from collections.abc import Callable
from typing import Any

import pytest

from server.write_timeout import LEAST_BYTES, WriteTimeout


class Clock:
    """An event loop with one timer, which goes off when it is told to."""

    due: Callable[[], None] | None = None

    def call_later(self, _: float, call: Callable[..., None], *arguments: Any) -> "Clock":
        self.due = lambda: call(*arguments)
        return self

    def go_off(self) -> None:
        due, self.due = self.due, None
        if due is not None:
            due()


class Transport:
    held, aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.held

    def abort(self) -> None:
        self.aborted = True


LOOK = 0  # among bytes that are written, and below 0 bytes that are taken
KEPT = {
    "it takes all at once": [1000, -1000, LOOK],
    "it takes enough": [10 * LEAST_BYTES, *[-LEAST_BYTES, LOOK] * 10],
    "it took all, and a new answer is there": [1000, -1000, 50, LOOK, -50, LOOK],
    "as much is held as ever, of new bytes": [1000, *[1000, -1000, LOOK] * 3],
}
GIVEN_UP = {
    "nothing is taken": [1000, LOOK],
    "a byte at a time": [10 * LEAST_BYTES, -1, LOOK],
    "few bytes are left": [1000, -990, LOOK],
    "it takes no more": [3 * LEAST_BYTES, -LEAST_BYTES, LOOK, LOOK],
}


def is_given_up(events: list[int]) -> bool:
    transport, clock = Transport(), Clock()
    timeout = WriteTimeout(transport, clock)  # type: ignore[arg-type]
    for event in events:
        transport.held += event
        if event > 0:
            timeout.wrote(event)
        elif event == LOOK:
            clock.go_off()
    return transport.aborted


@pytest.mark.parametrize("case", KEPT)
def test_a_client_that_takes_its_answer_is_kept(case: str) -> None:
    assert not is_given_up(KEPT[case])


@pytest.mark.parametrize("case", GIVEN_UP)
def test_a_client_that_does_not_is_given_up(case: str) -> None:
    assert is_given_up(GIVEN_UP[case])
