"""What a run shows while it goes and afterwards: log lines, metrics.jsonl, trackers, curves.

Nothing here may stop a run.
"""
