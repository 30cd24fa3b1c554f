"""The measuring job: `python -m studio.jobs.measure RUN_DIR`, started by `studio.runs.supervise`."""
