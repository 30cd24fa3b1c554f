"""Merging an adapter into its 16-bit base."""
