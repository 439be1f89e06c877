"""What watches a run, and what steers it from outside: the best checkpoint, an early end, files that ask, exports meanwhile."""
