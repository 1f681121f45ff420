"""Self-contained HTML reports of a run, or of several runs side by side."""

from lazarus.report.write import compare_reports, write_report

__all__ = ["compare_reports", "write_report"]
