"""What a run shows while it trains and afterwards: log lines, metrics.jsonl, trackers, loss curves.

A failure of a tracker or a picture is reported once and never stops a run.
"""
