"""What is counted and how it is shown."""

from fixify.reporting.models import ModelReport, report

__all__ = ["ModelReport", "report"]
