"""Mixtures of experts: the router's choice, rows sorted by expert, and the experts' products over them."""
