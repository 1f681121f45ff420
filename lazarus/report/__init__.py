"""One self-contained ``report.html`` for a run, or for several side by side."""

from lazarus.report.write import compare_reports, write_report

__all__ = ["compare_reports", "write_report"]
