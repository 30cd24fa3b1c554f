"""English text of our own, on which tests train small tokenizers."""

from functools import cache

from tests.fakes.runs import CHECKOUT


@cache
def prose() -> str:
    """The README and the pages of docs/ that are written by hand."""
    pages = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
    return "\n".join(page.read_text("utf-8") for page in pages)
