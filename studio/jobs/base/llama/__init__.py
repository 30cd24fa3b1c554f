"""llama.cpp beside the jobs: fetched once, run in processes of its own, never imported."""
