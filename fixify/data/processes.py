"""Loader processes: what each of them is reading, how they end, and what to say when one is lost.

Torch notices a lost process, but not a hanging one, and it cannot say which image was being read. Here each process
writes that into shared memory, and ends itself if reading one image takes too long.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.sharedctypes import RawArray
from typing import Any, Protocol

from torch.utils.data import get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from fixify.errors import LoaderError, resource_problem

PATIENCE = 60.0
"""Seconds that a loader process may spend on one image; $FIXIFY_IMAGE_SECONDS changes it."""

BROKEN = (ConnectionError, FileNotFoundError, EOFError, pickle.UnpicklingError)
"""What receiving a batch raises if its sender is killed meanwhile."""

_HUNG = 75  # exit code of a process that gives up
_NOTHING = -1
_GRACE = 3.0  # seconds for an orderly end
_KILLED = "The system does this when memory runs out. Try fewer --workers or a smaller --batch-size."
_CRASHED = "A damaged file can crash its decoder. Open it with another program, and move it away if that fails."


class Reading:
    """What each loader process is reading, in memory that they share with the process that started them.

    Args:
        workers: Number of loader processes; 0 makes every method do nothing.
    """

    def __init__(self, workers: int) -> None:
        self._indices = RawArray(ctypes.c_int64, [_NOTHING] * workers) if workers else None

    @contextlib.contextmanager
    def image(self, index: int) -> Iterator[None]:
        """Say, within the block, that this process reads image `index`."""
        worker = get_worker_info()
        if self._indices is None or worker is None:
            yield
            return
        self._indices[worker.id] = index
        try:
            yield
        finally:
            self._indices[worker.id] = _NOTHING

    def of(self, worker: int) -> int | None:
        """Return the image that a process is reading, or was reading when it ended; None for no image."""
        found = _NOTHING if self._indices is None else int(self._indices[worker])
        return None if found == _NOTHING else found


def start_worker(reading: Reading, worker: int) -> None:
    """Prepare a loader process: it ignores the signals that stop a run, and ends if one image takes too long.

    Ctrl-C reaches the whole process group, and so does torchrun's SIGTERM. The training loop chooses the step at which
    it stops, and it needs its batches until then; `ImageLoader.close` ends the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    seconds = float(os.environ.get("FIXIFY_IMAGE_SECONDS") or PATIENCE)
    threading.Thread(target=_give_up, args=(reading, worker, seconds), daemon=True).start()


def _give_up(reading: Reading, worker: int, seconds: float) -> None:
    """End this process once it has read one image for so long.

    Time is counted in ticks of this thread, not by a clock: a process that is stopped for an hour (SIGSTOP, a laptop
    that sleeps) has not been reading for an hour.
    """
    tick = min(1.0, seconds / 4)
    before, ticks = None, 0
    while True:
        time.sleep(tick)
        now = reading.of(worker)
        ticks = ticks + 1 if now is not None and now == before else 0
        before = now
        if ticks * tick >= seconds:
            os._exit(_HUNG)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Wrap the start of loader processes: their death must not raise an error in whatever the main thread is doing.

    Torch handles SIGCHLD for this; the error then appears anywhere, for example while a file is written. Without that
    handler it notices a lost process within 5 s, in the call that waits for a batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


class _Source(Protocol):
    def where(self, index: int) -> str: ...


def explain(error: Exception, workers: Sequence[Any], reading: Reading, images: _Source) -> LoaderError | None:
    """Say why loading ended, in the words of a user; None if the error is not about loader processes or memory.

    Args:
        error: What torch raised.
        workers: The loader processes (`multiprocessing.Process`), in order.
        reading: What they read.
        images: Names the images.
    """
    if str(error).startswith("Caught "):  # an exception in a worker, which is alive; its traceback is in the message
        problem = resource_problem(error)
        return None if problem is None else LoaderError(f"A loader process failed: {problem.what}.", hint=problem.hint)
    if isinstance(error, BROKEN):
        # The connection breaks a moment before the process counts as ended.
        ended = multiprocessing.connection.wait([process.sentinel for process in workers], timeout=_GRACE)
        for process in workers:
            if process.sentinel in ended:
                process.join(_GRACE)
    for number, process in enumerate(workers):
        if process.exitcode not in (None, 0):
            index = reading.of(number)
            return _lost(process.exitcode, None if index is None else images.where(index))
    problem = resource_problem(error)
    if problem is not None:
        return LoaderError(f"Cannot load images: {problem.what}.", hint=problem.hint)
    if "DataLoader worker" in str(error):
        return LoaderError(f"A loader process ended unexpectedly: {str(error).splitlines()[0]}", hint=_KILLED)
    return None


def _lost(code: int, where: str | None) -> LoaderError:
    """Make the error for a process that ended with this exit code while it read an image, or none."""
    while_reading = "" if where is None else f" while it read the image {where}"
    if code == _HUNG:
        return LoaderError(
            f"A loader process hangs: it did not finish the image {where or 'it read'} in time.",
            hint="Move the file away. If the disk is that slow, allow more seconds: FIXIFY_IMAGE_SECONDS=600",
        )
    if code > 0:
        return LoaderError(f"A loader process ended with exit code {code}{while_reading}.", hint="Try --workers 0.")
    name = signal.Signals(-code).name if -code in {int(each) for each in signal.Signals} else f"signal {-code}"
    if name == "SIGKILL":
        return LoaderError(f"A loader process was killed (SIGKILL){while_reading}.", hint=_KILLED)
    if name == "SIGBUS":
        problem = resource_problem(RuntimeError("bus error"))
        hint = None if problem is None else f"Usually the shared memory (/dev/shm) is full. {problem.hint}"
        return LoaderError(f"A loader process crashed (SIGBUS){while_reading}.", hint=hint)
    return LoaderError(f"A loader process crashed ({name}){while_reading}.", hint=None if where is None else _CRASHED)


def workers_of(loader: Any) -> list[Any]:
    """Return the loader processes of a torch `DataLoader`; [] if it has none."""
    return list(getattr(loader._iterator, "_workers", ()))


def end_workers(loader: Any) -> None:
    """End the loader processes of a torch `DataLoader`, which ignore SIGTERM. It can be iterated again afterwards."""
    iterator, loader._iterator = loader._iterator, None
    workers = list(getattr(iterator, "_workers", ()))
    if not workers:
        return
    if any(process.exitcode for process in workers):
        # A process that was killed may have held a lock that an orderly end waits for.
        iterator._shutdown = True
        if hasattr(iterator, "_pin_memory_thread_done_event"):
            iterator._pin_memory_thread_done_event.set()
        _kill(workers)
        # Torch lists the processes by the iterator's id, and refuses a later iterator that gets the same one.
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    else:
        late = threading.Timer(_GRACE, _kill, args=[workers])
        late.daemon = True
        late.start()
        try:
            iterator._shutdown_workers()
        finally:
            late.cancel()
            _kill(workers)
    for process in workers:
        process.join(_GRACE)


def _kill(workers: Sequence[Any]) -> None:
    for process in workers:
        if process.is_alive():
            process.kill()


class _Closes(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(loader: _Closes) -> None:
    """Close a loader when the program ends, if that was not done before; otherwise the program would never end.

    At exit `multiprocessing` sends SIGTERM to its daemons, which they ignore, and waits for them.
    """
    _open.add(loader)


def _close_all() -> None:
    for loader in list(_open):
        loader.close()


# Functions that are registered later run earlier, so this runs before those of `multiprocessing` and torch.
atexit.register(_close_all)
