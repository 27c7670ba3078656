from __future__ import annotations

import os
import signal
import threading

import pytest

from palimpsest.core.interrupt import Interrupt


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_asks_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        press_ctrl_c()
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_touched():
    seen = []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.append((interrupt.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            press_ctrl_c()
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGINT, before)
