"""A call runs only while its maker waits, and ends when it is abandoned."""

import contextvars
import functools
import threading

import torch

from qzo.nn.streaming.lockstep import Call

VARIABLE = contextvars.ContextVar("variable", default="outside")


def test_calls_take_turns_where_they_pause():
    log = []

    def told(name: str) -> str:
        for step in range(3):
            log.append((name, step))
            calls[name].pause()
        return name

    calls = {name: Call(functools.partial(told, name)) for name in "ab"}
    assert log == [], "nothing runs before it is asked to"
    while not all(call.finished for call in calls.values()):
        for call in calls.values():
            call.go_on()
    assert log == [(name, step) for step in range(3) for name in "ab"]
    assert [call.result for call in calls.values()] == ["a", "b"]


def test_a_call_has_the_context_the_gradient_mode_and_the_autocast_of_its_maker():
    one, token = torch.ones(1, 1), VARIABLE.set("inside")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        call = Call(lambda: (VARIABLE.get(), torch.is_grad_enabled(), (one @ one).dtype))
    VARIABLE.reset(token)
    call.go_on()
    assert call.result == ("inside", False, torch.bfloat16)


def test_what_it_raises_is_kept_and_an_abandoned_one_is_unwound():
    unwound: list[object] = []
    before = threading.active_count()

    def fails():
        raise ValueError("of its own")

    def waits():
        try:
            other.pause()
        finally:
            unwound.append(True)

    call, other, never = Call(fails), Call(waits), Call(lambda: unwound.append("never"))
    call.go_on()
    other.go_on()
    assert call.finished
    assert isinstance(call.error, ValueError)
    for one in (call, other, never):
        one.abandon()
    assert unwound == [True]
    assert threading.active_count() == before
