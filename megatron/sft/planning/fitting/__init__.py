"""What makes a run fit a GPU, recomputation and the cheapest other change, and which precision is fast on it."""
