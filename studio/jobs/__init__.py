"""Child processes that do the heavy work. They never draw; they write a run directory."""
