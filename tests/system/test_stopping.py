"""Signals that stop a command: raised where it is, an exit status each, and the handlers of before afterwards."""

import os
import signal
import threading

import pytest

from qzo.system.stopping import STATUS, Interrupted, Stopped, status_of, stopping

NUMBERS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_raised_and_every_finally_runs(number):
    ended = []

    def work():
        with stopping():
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            finally:
                ended.append(True)

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value, Stopped)
    assert (status_of(caught.value), ended) == (STATUS[number], [True])


def test_statuses_are_those_of_shells_but_for_the_schedulers_warning():
    assert STATUS == {signal.SIGINT: 128 + 2, signal.SIGTERM: 128 + 15, signal.SIGUSR1: 0}
    assert status_of(KeyboardInterrupt()) == 130
    assert (Interrupted(3).steps, Interrupted(3).status, Interrupted(3, 0).status) == (3, 130, 0)


def test_handlers_of_before_are_back_afterwards():
    def mine(*_):
        raise AssertionError

    before = {number: signal.signal(number, mine) for number in NUMBERS}
    try:
        with stopping():
            assert all(signal.getsignal(number) is not mine for number in NUMBERS)
        assert all(signal.getsignal(number) is mine for number in NUMBERS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_changes_nothing():
    seen = []

    def inside():
        with stopping():
            seen.append([signal.getsignal(number) for number in NUMBERS])

    before = [signal.getsignal(number) for number in NUMBERS]
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
