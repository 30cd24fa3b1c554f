"""What an export is estimated to take, beside what one was measured to take."""

import pytest

from studio.probe.export import export_estimate
from studio.runs.job import GGUF_FORMATS

MEASURED = 2_348_962_144
"""Bytes of a random Llama of 1.17B, vocabulary 49k, whose exports were measured (resident, and on disk)."""


@pytest.mark.parametrize(
    ("form", "out", "resident", "seconds"),
    [("bf16", 2_350_858_560, 1.17e9, 74), ("q8_0", 1_249_853_760, 1.17e9, 39.5), ("q4_k_m", 725_369_152, 1.17e9, 135),
     ("nf4", 0, 3.66e9, 72), ("int8", 0, 3.85e9, 42)],
)  # fmt: skip
def test_measured_exports_are_within_the_estimate(form: str, out: float, resident: float, seconds: float) -> None:
    estimate = export_estimate(form, MEASURED)
    assert resident < estimate.memory_bytes < resident * 1.3
    assert estimate.seconds[0] < seconds < estimate.seconds[1]
    if out:
        assert estimate.out_bytes == pytest.approx(out, rel=0.02)


def test_larger_formats_are_larger_and_a_merge_needs_more_room() -> None:
    sizes = [export_estimate(form, 10**10).out_bytes for form in GGUF_FORMATS]
    assert sizes == sorted(sizes, reverse=True)
    for form in (*GGUF_FORMATS, "nf4", "int8"):
        alone, merging = export_estimate(form, 10**10), export_estimate(form, 10**10, merges=True)
        assert alone.out_bytes <= alone.disk_bytes < merging.disk_bytes or form.startswith("q")
        assert merging.disk_bytes >= alone.disk_bytes
    # The 16-bit file in between is there beside the quantised one, and beside the merged model before that.
    assert export_estimate("q4_k_m", 10**10).disk_bytes > 1.3 * 10**10
    assert export_estimate("q4_k_m", 10**10, merges=True).disk_bytes == 2 * 10**10
