"""One module per verb of the command line: `add_parser` declares it, `run` does it and returns the exit code."""
