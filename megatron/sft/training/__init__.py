"""A run in its processes: the step, the loop around it, the rows that feed it, and what it saves.

Takes a `RunPlan`, in which everything is decided; decides nothing about settings itself.
"""
