"""The run directory, the only state that the terminal and its jobs share."""
