"""Our loop against HF Trainer + PEFT: step time and peak memory on the embedded model, engines interleaved in one run.

Ratios compare within one run; the absolute numbers are this machine's.
`python -m tests.bench.bench_train [STEPS] [ROUNDS]`
"""

import json
import statistics
import subprocess
import sys
from typing import Any


def measure(engine: str, method: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.engines", engine, method, str(steps)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    report: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return report


def main(steps: int = 14, rounds: int = 3) -> None:
    print(f"{steps} steps of 8 rows, rank 16 on all linear layers; median of {rounds} interleaved rounds")
    print(f"{'method':8}{'engine':10}{'s/step':>9}{'peak RSS GB':>13}{'first loss':>12}{'last loss':>11}")
    for method in ("lora", "qlora"):
        seen: dict[str, list[dict[str, Any]]] = {"studio": [], "hf": []}
        for _ in range(rounds):
            for engine, reports in seen.items():
                reports.append(measure(engine, method, steps))
        figures = {}
        for engine, reports in seen.items():
            seconds = statistics.median(report["seconds_per_step"] for report in reports)
            peak = statistics.median(report["peak_resident_bytes"] for report in reports)
            losses = reports[0]["losses"]
            figures[engine] = (seconds, peak)
            print(f"{method:8}{engine:10}{seconds:9.3f}{peak / 1e9:13.2f}{losses[0]:12.4f}{losses[-1]:11.4f}")
        time_ratio = figures["studio"][0] / figures["hf"][0]
        memory_ratio = figures["studio"][1] / figures["hf"][1]
        print(f"{method:8}{'ratio':10}{time_ratio:9.2f}{memory_ratio:13.2f}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
