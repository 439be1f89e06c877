"""How fast a run will be: the time of a step in a layout, of a whole run, and what fp8 gains."""
