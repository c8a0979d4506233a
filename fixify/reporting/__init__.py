"""Count what classifiers cost, and show results: tables, the HTML page of runs, the paper's figures."""

from fixify.reporting.costs import ModelReport, report

__all__ = ["ModelReport", "report"]
