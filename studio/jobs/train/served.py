"""Opens an adapter as a server does: with plain peft, on the class that the base's `config.json` names.

Keys that fit nothing there are only a warning of peft, and the adapter would be served without any effect. So the names
are compared before the first step, and the saved folder is opened before it is published. Nothing here has weights of
the base.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.jobs.base.weights.skeleton import attach, build_clean, put_on
from studio.probe.adapter_folder import find_adapter
from studio.probe.model_folder import CONFIG

_OTHER_TARGETS = "name other adapter.targets, or report the model's name"


def check_names(model: PeftModel) -> None:
    """Compare the names of an adapter's tensors with those that plain peft gives it on the class that is served.

    Raises:
        JobFailed: `adapter_unmatched` when they differ.
    """
    base = _folder_of(model)
    if base is None:
        return
    try:
        twin = put_on(build_clean(base, towers=True), deepcopy(model.active_peft_config))
    except (BadInput, ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise _unmatched(plain(str(error), one_line=True, limit=400), _OTHER_TARGETS) from error
    ours, theirs = (set(get_peft_model_state_dict(one, save_embedding_layers=False)) for one in (model, twin))
    if ours != theirs:
        first = plain(sorted(ours ^ theirs)[0], one_line=True, limit=160)
        side = "is asked for there and not trained" if first in theirs else "is trained and fits nothing there"
        raise _unmatched(
            f"{len(ours ^ theirs)} tensors, the first of which, {first}, {side}",
            _OTHER_TARGETS,
        )


def check_folder(model: PeftModel, folder: Path) -> None:
    """Open a saved adapter on the class that is served.

    Args:
        model: What was trained.
        folder: The PEFT folder that was saved of it.

    Raises:
        JobFailed: `adapter_unmatched` when a tensor fits nothing, or one that is asked for is missing.
    """
    base = _folder_of(model)
    if base is None:
        return
    try:
        attach(build_clean(base, towers=True), [(find_adapter(folder), 1.0)])
    except BadInput as error:
        raise _unmatched(
            str(error), "resume from the last checkpoint, if there is one: it holds the trained weights"
        ) from error


def _folder_of(model: PeftModel) -> Path | None:
    """Return the folder of the base; None where it was not loaded from one, or is built by code in the folder."""
    causal: Any = model.get_base_model()
    folder = Path(causal.config.name_or_path)
    ours = type(causal).__module__.startswith("transformers.")
    return folder if ours and (folder / CONFIG).is_file() else None


def _unmatched(why: str, advice: str) -> JobFailed:
    message = f"with plain peft, the adapter does not fit the class that the base's {CONFIG} names: {why}"
    return JobFailed("adapter_unmatched", message, advice)
