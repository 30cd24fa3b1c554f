"""Weights as they lie in files, and as peft adds to them: one tensor, one layer at a time, never the whole model."""
