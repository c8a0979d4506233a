"""Signals other than Ctrl-C and SIGTERM, several at once, and a terminal that is gone."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixify.training import Event, FinetuneOptions, FinetuneResult, Step, TrainingInterrupted
from fixify.training.interrupt import Stopped, stop_on_signals

Run = Callable[..., FinetuneResult]
PLAIN = FinetuneOptions.create(epochs=2, batch_size=8, lr=0.05, no_aug=True, workers=0, device="cpu")


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Give all four signals their usual actions, whatever started pytest."""
    usual = {signal.SIGINT: signal.default_int_handler}
    before = {
        number: signal.signal(number, usual.get(number, signal.SIG_DFL))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def at_second_step(do: Callable[[], object]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            do()

    return listen


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_hangup_and_slurms_warning_stop_the_run_with_its_state_saved(run: Run, tmp_path: Path, number: int) -> None:
    def send() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a shell and the kernel both send SIGHUP

    with pytest.raises(TrainingInterrupted, match=r"after . of 5 batches") as caught:
        run(tmp_path, PLAIN, on_event=at_second_step(send))
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    assert len(run(tmp_path, PLAIN, resume=True).history) == 2


def test_nohup_is_obeyed() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_two_signals_at_once_are_one_request(second: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped), stop_on_signals() as stop:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, second})
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, second})  # both arrive before any handler runs
        stop.check()
    assert capfd.readouterr().err == ""


def test_the_same_signal_again_acts_as_usual() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    child = os.fork()
    if not child:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_terminal_that_is_gone_stops_the_run_with_its_state_saved(run: Run, tmp_path: Path) -> None:
    def print_() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(TrainingInterrupted) as caught:
        run(tmp_path, PLAIN, on_event=at_second_step(print_))
    assert caught.value.exit_code == 128 + signal.SIGHUP
    assert len(run(tmp_path, PLAIN, resume=True).history) == 2
