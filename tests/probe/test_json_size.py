"""How many values a JSON text holds: never told too few."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from studio.probe.json_size import values_in

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def counted(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(counted, inside))


@given(JSON, st.sampled_from([(",", ":"), (" , ", " : ")]), st.booleans())
def test_a_text_holds_no_more_values_than_are_told(value: Any, separators: tuple[str, str], ascii_only: bool) -> None:
    raw = json.dumps(value, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert values_in(raw) >= counted(value)


def test_a_header_without_commas_in_its_names_is_told_closely() -> None:
    entry = {"dtype": "BF16", "shape": [128, 16], "data_offsets": [0, 4096]}
    assert values_in(json.dumps({f"w{number}": entry for number in range(50)}).encode()) <= 1 + 50 * 8 + 1
