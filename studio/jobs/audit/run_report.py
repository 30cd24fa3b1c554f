"""The rows of an adapter's report: what each form showed, its size on disk, memory and speed of serving it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studio.jobs.audit.adapter_variants import AdapterForms, Named
from studio.jobs.audit.base_audit import stored_bytes_of
from studio.jobs.audit.forms import FORMS
from studio.jobs.audit.gguf_variants import GgufForms
from studio.jobs.audit.serving import serving
from studio.jobs.audit.speed import NOT_ASKED, Speed, unmeasured
from studio.jobs.audit.walk import Measured
from studio.jobs.audit.weights import FolderWeights
from studio.probe.adapter_folder import ADAPTER_WEIGHTS
from studio.probe.exported import GgufFile


@dataclass(frozen=True, slots=True)
class RunReport:
    """Makes the rows.

    Attributes:
        weights: The base in 16 bit.
        forms: Of the adapter.
        adapter: Its folder.
        found: What was measured.
    """

    weights: FolderWeights
    forms: AdapterForms
    adapter: Path
    found: Measured

    def walked(self, one: Named, speeds: Mapping[tuple[str, bool], Speed]) -> dict[str, Any]:
        """Return the row of a form that was walked."""
        size, name = self._form_bytes(one), one.variant.name
        speed = speeds.get((one.form, one.has_adapter), unmeasured(NOT_ASKED))
        row = self._row(name, one.title, size, speed, usable=one.usable)
        return row | {"form": one.form, "disk": "estimated", "why": ""}

    def gguf(self, name: str, file: GgufFile, gguf: GgufForms, speed: Speed) -> dict[str, Any]:
        """Return the row of a GGUF file."""
        title = f"{'GGUF ' + file.form if file.form else 'GGUF'}, {file.source}"
        why = gguf.whys.get(name, "")
        row = self._row(name, title, file.path.stat().st_size, speed, usable=bool(file.form) and not why)
        return row | {"form": file.form or "gguf", "disk": "measured", "why": why}

    def _row(self, name: str, title: str, size: int, speed: Speed, *, usable: bool) -> dict[str, Any]:
        return {
            "name": name,
            "title": title,
            "usable": usable,
            "task": asdict(self.found.task[name]) if name in self.found.task else None,
            "neutral": asdict(self.found.neutral[name]) if name in self.found.neutral else None,
            "disk_bytes": size,
            "serving": {**asdict(serving(self.weights.clean.config, size)), "how": "estimated"},
            "speed": asdict(speed),
        }

    def _form_bytes(self, one: Named) -> int:
        """Return the bytes of a form on disk, and so about of its weights when it is served."""
        kept_bytes = min(2, stored_bytes_of(self.weights))
        whole = sum(parameter.numel() for parameter in self.weights.clean.parameters())
        inside = 0 if one.form == "16-bit" else self.forms.rounded_weights
        base = (whole - inside) * kept_bytes + inside * FORMS[self.forms.form.name].bits / 8
        return int(base + ((self.adapter / ADAPTER_WEIGHTS).stat().st_size if one.has_adapter else 0))


def handiest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the forms that can be used, the smallest first."""
    usable = [row for row in rows if row["usable"] and row["task"]]
    return [row["name"] for row in sorted(usable, key=lambda row: row["disk_bytes"])]
