"""Checks what was asked for and starts its job: no other room starts a run for somebody."""
