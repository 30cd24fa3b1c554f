"""What the rows of a file add up to, in words that fit the room."""

from studio.runs.show import Opened, Summary
from studio.tui.panels.data_text import facts_text


def test_a_long_fact_goes_on_below_itself() -> None:
    lengths = {"min": 45, "median": 55, "p95": 68, "max": 85, "total": 30376}
    summary = Summary(done=591, rows=591, seq_len=256, steps=34, made=591, lengths=lengths)
    lines = facts_text(Opened(rows=591), summary, 40).plain.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert all(len(line) <= 40 for line in lines)
    start = lines.index("length    45 to 85 tokens; half up to")
    assert lines[start + 1] == f"{'':10}55, 95 % up to 68"
    for cells in range(30, 70):
        assert "95\n" not in facts_text(Opened(rows=591), summary, cells).plain
