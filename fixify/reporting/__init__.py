"""What is counted and how it is shown."""

from fixify.reporting.costs import ModelReport, report

__all__ = ["ModelReport", "report"]
