"""What is odd about a run that can start: settings without effect, names that are none, and data too small for the settings."""
