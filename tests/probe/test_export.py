"""What an export is estimated to take, beside what random Llamas of 1.2 B were measured to take on two busy cores."""

import pytest

from studio.core.export_formats import gguf_formats
from studio.probe.export import export_estimate


@pytest.mark.parametrize(
    ("form", "size", "out", "resident", "seconds", "disk"),
    [
        ("bf16", 2_390_904_832, 2_392_835_360, 1.50e9, 51, 2.43e9),
        ("q8_0", 2_390_904_832, 1_272_169_760, 1.46e9, 108, 1.31e9),
        ("q4_k_m", 2_390_904_832, 741_795_104, 1.51e9, 233, 3.14e9),
        ("nf4", 2_348_962_144, 0, 3.66e9, 72, 0),
        ("int8", 2_348_962_144, 0, 3.85e9, 42, 0),
    ],
)
def test_measured_exports_are_within_the_estimate(
    form: str, size: int, out: float, resident: float, seconds: float, disk: float
) -> None:
    estimate = export_estimate(form, size)
    assert resident < estimate.memory_bytes < resident * 1.3
    assert estimate.seconds[0] < seconds < estimate.seconds[1]
    if out:
        assert estimate.out_bytes == pytest.approx(out, rel=0.02)
        assert disk < estimate.disk_bytes < disk + 0.25e9


def test_larger_formats_are_larger_and_a_merge_needs_more_room() -> None:
    sizes = [export_estimate(form, 10**10).out_bytes for form in gguf_formats()]
    assert sizes == sorted(sizes, reverse=True)
    for form in (*gguf_formats(), "nf4", "int8"):
        alone, merging = export_estimate(form, 10**10), export_estimate(form, 10**10, merges=True)
        assert alone.out_bytes <= alone.disk_bytes < merging.disk_bytes
    # The 16-bit file in between is there beside the quantised one, and beside the merged model before that.
    assert export_estimate("q4_k_m", 10**10).disk_bytes > 1.3 * 10**10
    assert export_estimate("q4_k_m", 10**10, merges=True).disk_bytes == pytest.approx(2 * 10**10, rel=0.02)
