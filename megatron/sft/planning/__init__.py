"""What a run is, before it starts: settings, the plan that follows from them, memory, time and layouts.

Starts nothing and needs no GPU, so that `plan` works on a login node.
"""
