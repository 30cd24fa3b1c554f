"""Parts of an audit that are done, on disk as JSON, so that one that was stopped or killed need not do them again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studio.probe.adapter_folder import ADAPTER_WEIGHTS
from studio.runs.atomic import write_whole
from studio.runs.audit_request import AuditRequest
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker


class KeptPart:
    """One part; it goes with the run's `audit` folder when the audit has ended."""

    def __init__(self, worker: Worker, request: AuditRequest, name: str, *about: object) -> None:
        """Name a part.

        Args:
            worker: Of the audit.
            request: What was asked for: what another request has left is as good as nothing.
            name: Of the file.
            about: What else the part depends on, as JSON has it.
        """
        self._file = Path(worker.paths.root) / "audit" / f"{name}.json"
        self._about = json.loads(json.dumps([asdict(request), _stamp(request), *about]))

    def load(self) -> Any:
        """Return the part as it was kept; None where there is none that can be used."""
        try:
            table = json.loads(self._file.read_bytes())
            return table["part"] if table["about"] == self._about else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def keep(self, part: Any) -> None:
        """Keep it.

        Raises:
            OSError: The disk refuses.
        """
        self._file.parent.mkdir(exist_ok=True)
        write_whole(self._file, json.dumps({"about": self._about, "part": part}))


def _stamp(request: AuditRequest) -> list[int]:
    """Return what changes when the run is trained on."""
    if not request.run:
        return []
    seen = (RunPaths(Path(request.run)).adapter / ADAPTER_WEIGHTS).stat()
    return [seen.st_size, seen.st_mtime_ns]
