"""What every process needs, whatever it does: errors, manifests, devices, ranks, signals, the watchdog.

Imports nothing of this package but itself.
"""
