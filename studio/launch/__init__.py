"""Checks what was asked for and starts its job.

No other room starts a run that a person or another run asked for. One exception lies inside a job: an export that must
merge first runs that merge in its own folder (`studio/jobs/export/work.py`).
"""
