"""What makes a run fit a GPU: phases of its memory, recomputation, the cheapest change."""
