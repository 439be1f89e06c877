"""Imported, it keeps runs from drawing loss.png: two starts of matplotlib, seconds of CPU time, at the end of every run.

tests/unit/reporting/test_metrics.py and the quickstart's test draw it.
"""

from megatron.sft.reporting.live_plot import LivePlot


def _draws_nothing(_: LivePlot) -> None:
    pass


LivePlot.redraw = LivePlot.close = _draws_nothing  # type: ignore[method-assign]
