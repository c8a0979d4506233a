"""Count what classifiers cost, and show results: tables, the HTML page of runs, the paper's figures.

The names are imported when they are first used: the table of a header needs no torch.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy

_EXPORTS = {"ModelReport": "fixify.reporting.costs", "report": "fixify.reporting.costs"}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)

if TYPE_CHECKING:
    from fixify.reporting.costs import ModelReport as ModelReport
    from fixify.reporting.costs import report as report
