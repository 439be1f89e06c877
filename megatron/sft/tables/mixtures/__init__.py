"""Families with mixtures of experts, and their dense relatives where one file has both."""
