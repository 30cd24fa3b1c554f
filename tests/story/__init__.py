"""The main story as a user lives it: real processes, a real model, a real terminal. Slow."""
