"""Checks what was asked for, makes the run's folder and starts its worker.

Every run is started here, with one exception: an export that must merge first starts that merge itself, as a run inside
its own folder (`studio/jobs/export/work.py`).
"""
