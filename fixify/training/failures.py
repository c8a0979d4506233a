"""Recognise what the machine does to a run: a loader process is lost, memory or file handles run out."""

from __future__ import annotations

from dataclasses import dataclass

from fixify.errors import LoaderError, ResourceError, resource_problem


@dataclass(frozen=True)
class Failure:
    """What the machine did.

    Attributes:
        what: It as a sentence, without the full stop.
        hint: What may help, as a sentence.
    """

    what: str
    hint: str


def machine_failure(error: BaseException) -> Failure | None:
    """Recognise a failure of the machine in an error or in what caused it; None for any other error.

    >>> machine_failure(LoaderError("A loader process was killed (SIGKILL).", hint="Try fewer --workers."))
    Failure(what='A loader process was killed (SIGKILL)', hint='Try fewer --workers.')
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (LoaderError, ResourceError)):
            return Failure(seen.message.rstrip("."), seen.hint or "")
        if (problem := resource_problem(seen)) is not None:
            return Failure(problem.what[0].upper() + problem.what[1:], problem.hint)
        seen = seen.__cause__
    return None
