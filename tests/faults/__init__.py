"""Faults made for real, on real workers: what the user is told, how soon, and how the run ends."""
