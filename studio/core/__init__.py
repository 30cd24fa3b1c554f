"""Pure arithmetic and frozen values: standard library only, no clock, no disk."""
