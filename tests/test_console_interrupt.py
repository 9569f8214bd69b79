"""An interrupt that Python dropped inside a callback still ends the command."""

import signal

import pytest

from agssd_core.console import kept_interrupt


def swallow_an_interrupt():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return True  # as a finaliser would
    return False


def test_a_dropped_interrupt_is_raised_again_by_the_next_check():
    before = signal.getsignal(signal.SIGINT)
    with kept_interrupt() as check:
        check()
        assert swallow_an_interrupt()
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before
