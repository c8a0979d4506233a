"""Benchmarks of fixed heads on the machine at hand; `fixify bench` prints them.

Times depend on the machine, so what is compared is a ratio: the time of the learned layer divided by that of the fixed
one, both measured in turns in one run. The names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy

_EXPORTS = {
    "ConvertBenchmark": "fixify.benchmarks.convert",
    "HeadBenchmark": "fixify.benchmarks.head",
    "LossBenchmark": "fixify.benchmarks.loss",
    "Machine": "fixify.benchmarks.machine",
    "StepBenchmark": "fixify.benchmarks.step",
    "benchmark_convert": "fixify.benchmarks.convert",
    "benchmark_head": "fixify.benchmarks.head",
    "benchmark_loss": "fixify.benchmarks.loss",
    "benchmark_step": "fixify.benchmarks.step",
    "this_machine": "fixify.benchmarks.machine",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)

if TYPE_CHECKING:
    from fixify.benchmarks.convert import ConvertBenchmark as ConvertBenchmark
    from fixify.benchmarks.convert import benchmark_convert as benchmark_convert
    from fixify.benchmarks.head import HeadBenchmark as HeadBenchmark
    from fixify.benchmarks.head import benchmark_head as benchmark_head
    from fixify.benchmarks.loss import LossBenchmark as LossBenchmark
    from fixify.benchmarks.loss import benchmark_loss as benchmark_loss
    from fixify.benchmarks.machine import Machine as Machine
    from fixify.benchmarks.machine import this_machine as this_machine
    from fixify.benchmarks.step import StepBenchmark as StepBenchmark
    from fixify.benchmarks.step import benchmark_step as benchmark_step
