"""A chat's process without a model: answers each side with what it was asked. `python -m tests.fakes.chat_job`."""

import json
import os
import sys
import time
from pathlib import Path

from studio.runs.chat import Answered, Piece, Ready, TurnDone
from studio.runs.piped import Loading, NotAnswered, event_line


def tell(event: object) -> None:
    print(event_line(event), flush=True)  # type: ignore[arg-type]


def main() -> None:
    load = json.loads(sys.stdin.readline())["load"]
    print("a library says something", flush=True)
    tell(Loading("loading the base model", 0.5))
    how = os.environ.get("FAKE_CHAT", "")
    if how == "refuses":
        tell(NotAnswered("the model needs about 9.0 GB of memory, 1.0 GB are free", bad_input=True))
        return
    if how == "dies":
        print("something broke", file=sys.stderr)
        sys.exit(3)
    while (waits_for := os.environ.get("FAKE_CHAT_WAITS_FOR")) and not Path(waits_for).exists():
        time.sleep(0.02)
    tell(Ready(("tuned", "base") if load["adapter"] else ("tuned",), "cpu", "bfloat16", ("a note",)))
    for line in sys.stdin:
        asked = json.loads(line)
        if "ask" not in asked:
            continue
        for side, messages in asked["ask"].items():
            if how == "slow" and not asked.get("cancel"):
                tell(Piece(side, "wait"))
                assert json.loads(sys.stdin.readline()) == {"cancel": True}
                tell(Answered(side, 1, 0.1, "cancelled"))
                break
            for word in (f"{side} ", f"heard {messages[-1]['content']}", f" after {len(messages) - 1}", " \x1b[31mred"):
                tell(Piece(side, word))
                time.sleep(0.01)
            tell(Answered(side, 4, 0.5, "stop"))
        tell(TurnDone())


if __name__ == "__main__":
    main()
