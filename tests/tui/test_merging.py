"""What the merge screen knows without a widget: estimates of what outputs take, and the folder that it proposes."""

from pathlib import Path

from studio.tui.merging import estimates_of, proposed_out
from studio.tui.panels.merge_text import OUTPUTS_HEAD, is_short, output_line, size, totals_text
from tests.tui.stories import (
    make_run,
)
from tests.tui.test_merge_screen import SIXTEEN_GB


def test_estimates_and_what_is_short() -> None:
    merged, *others = estimates_of(SIXTEEN_GB)
    assert merged.out_bytes == SIXTEEN_GB
    assert merged.ram_bytes is not None
    assert merged.ram_bytes < SIXTEEN_GB / 4
    assert all(row.out_bytes for row in others)
    assert is_short([merged, *others], SIXTEEN_GB)
    assert not is_short([merged], 2 * SIXTEEN_GB)
    q4, seconds = others[-1], merged.seconds
    assert q4.seconds is not None
    assert seconds is not None
    cells = [output_line(q4)[31 + 10 * place :][:10].strip() for place in range(3)]
    assert cells == [size(taken) for taken in (q4.out_bytes, q4.disk_bytes, q4.ram_bytes)]
    assert q4.disk_bytes != q4.out_bytes, "it is made of a larger file"
    assert [OUTPUTS_HEAD[35 + 10 * place :][:10].strip() for place in range(3)] == ["leaves", "disk", "RAM"]
    both = f"{(seconds[0] + q4.seconds[0]) / 60:.0f}-{(seconds[1] + q4.seconds[1]) / 60:.0f} min"
    assert both in totals_text([merged, q4], 10**12, 10**12).plain
    assert "16 GB of 8.00 GB free disk" in totals_text([merged], 10**10, 8 * 10**9).plain
    assert all(row.out_bytes is None for row in estimates_of(None))
    assert "not known" in totals_text(estimates_of(None), 1, 1).plain


def test_the_proposed_folder_is_new(tmp_path: Path) -> None:
    run = make_run(tmp_path, "trained")
    first = proposed_out(run)
    first.mkdir(parents=True)
    assert proposed_out(run) != first
    assert proposed_out(run).parent == first.parent
