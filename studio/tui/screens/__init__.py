"""Whole screens: each decides what its panels ask for."""
