"""What a benchmark ran on: the processor, its cores, and the versions of the libraries."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fixify._version import __version__
from fixify.errors import UsageError
from fixify.heads.kernels import instruction_set, is_compiled


@dataclass(frozen=True)
class Machine:
    """What a benchmark ran on.

    Attributes:
        processor: The name of the processor.
        cores: Cores that this process may use.
        system: Operating system and architecture, for example "Linux x86_64".
        versions: Version of Python and of each library, by name, and the instruction set of the compiled kernels.
    """

    processor: str
    cores: int
    system: str
    versions: Mapping[str, str]

    @property
    def line(self) -> str:
        """The machine in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.processor}, {self.cores} core{'s' if self.cores > 1 else ''}, {self.system}; {versions}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def this_machine() -> Machine:
    """Describe the machine at hand."""
    return Machine(
        processor=_processor(),
        cores=cores(),
        system=f"{platform.system()} {platform.machine()}",
        versions={
            "fixify": __version__,
            "kernels": instruction_set() if is_compiled() else "not compiled",
            "torch": str(torch.__version__),
            "timm": metadata.version("timm"),
            "python": platform.python_version(),
        },
    )


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts() -> tuple[int, ...]:
    """Return the numbers of threads to measure with: one, and all cores."""
    return tuple(sorted({1, cores()}))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads within the block.

    Raises:
        UsageError: the count is not positive.
    """
    if count < 1:
        raise UsageError(f"The number of threads must be at least 1, got {count}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
