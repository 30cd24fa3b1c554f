"""Rows on their way to token ids and labels: the same for training, evaluation and audit."""
