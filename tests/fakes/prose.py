"""English text on which tests train small tokenizers."""

import json
from functools import cache

from tests.fakes.runs import CHECKOUT


@cache
def prose() -> str:
    """The words of the demo's rows: they stay as they are, so that tokens, and all that follows from them, do too."""
    lines = (CHECKOUT / "recipes" / "data" / "stdlib_qa.jsonl").read_text("utf-8").splitlines()
    return "\n".join(message["content"] for line in lines for message in json.loads(line)["messages"])
