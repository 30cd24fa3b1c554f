"""Measures what 4 bits cost: of a base, of an adapter on every base that it can be put on, of two trainings."""
