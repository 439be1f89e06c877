"""What makes a run fit a GPU: the fewest GPUs, recomputation, the cheapest other change."""
