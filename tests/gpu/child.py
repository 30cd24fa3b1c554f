"""The process of one check: `python -m tests.gpu.child ASKED ANSWER`, two JSON files; started by `runner`.

The answer is written only when the check has ended by itself: who crashes, hangs or is killed leaves none. The check's
module is imported before the environment is noted, so that what libraries set as they are imported is not taken for the
check's doing.
"""

import importlib
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.gpu.bench import Bench, Seen, Skip, Wrong, as_json

OF_LIBRARIES = frozenset({"CUDA_MODULE_LOADING", "DISABLE_CUPTI_LAZY_REINIT", "TEARDOWN_CUPTI"})
"""Variables that torch sets by itself: as it starts CUDA (torch/cuda/__init__.py before 2.13), in its profiler."""


def surroundings() -> dict[str, Any]:
    """Return what a check must leave as it is, in its own process."""
    names = os.environ.keys() - OF_LIBRARIES
    noted: dict[str, Any] = {f"variable {name}": os.environ[name] for name in names}
    noted["working directory"] = str(Path.cwd())
    torch = sys.modules.get("torch")
    if torch is None:
        return noted
    return noted | {
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return in words what is not as it was."""
    gone = [f"{name} is gone (was {before[name]!r})" for name in before.keys() - after.keys()]
    new = [f"{name} is new: {after[name]!r}" for name in after.keys() - before.keys()]
    other = [
        f"{name} was {before[name]!r}, is {after[name]!r}"
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    ]
    return sorted(gone + new + other)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the check and return its outcome."""
    module, _, name = asked["function"].partition(":")
    bench = Bench(asked["device"], Path(asked["folder"]), Path(asked["shared"]), asked["server"])
    function = getattr(importlib.import_module(module), name)  # with torch, where the module is about torch
    before = surroundings()
    try:
        seen, outcome = function(bench, *asked["arguments"]), "ok"
    except Skip as why:
        seen, outcome = Seen(str(why)), "SKIP"
    except Exception as error:
        traceback.print_exc()
        shown = error.seen if isinstance(error, Wrong) else Seen("")
        seen, outcome = replace(shown, said=_words(error)), "FAILED"
    after = surroundings()
    if "gradients" not in before:
        after = {name: value for name, value in after.items() if name in before or name.startswith("variable ")}
    return {"outcome": outcome, **as_json(seen), "changed": differences(before, after)}


def _words(error: BaseException) -> str:
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error) or f"{place.line} does not hold" if isinstance(error, AssertionError) else str(error)
    return f"{kind}{text} ({Path(place.filename).name}:{place.lineno})"


def main(asked: str, answered: str) -> None:
    """Run what a file asks for and leave the answer in another."""
    import faulthandler

    faulthandler.enable()
    text = json.dumps(answer(json.loads(Path(asked).read_text("utf-8"))), default=str)
    aside = Path(f"{answered}.part")
    aside.write_text(text, "utf-8")
    aside.rename(answered)


if __name__ == "__main__":
    main(*sys.argv[1:3])
