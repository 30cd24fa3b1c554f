"""Textual widgets that anyone could lift out: they take numbers and words, never our types."""
