"""Figures and one page about trained runs (extra `plots`)."""

from tarflowlm.report.build import write_report

__all__ = ["write_report"]
