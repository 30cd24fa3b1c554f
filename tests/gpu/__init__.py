"""Checks that need a CUDA card: `make gpu-check`. Not collected by pytest."""
