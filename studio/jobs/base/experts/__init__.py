"""Mixtures of experts whose experts lie in one 3-D tensor: held in 4 bits, multiplied in groups, adapted when asked."""
