"""From a wish for a smaller model to a running export: check, make the run's folder, launch."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.adapter_folder import find_adapter
from studio.probe.model_folder import check_folder
from studio.probe.space import check_space
from studio.probe.start import check_out, launch_prepared, prepare_run
from studio.runs.job import EXPORT_FORMATS, MODULES, ExportRequest
from studio.runs.layout import RunPaths


def start_export(
    request: ExportRequest,
    runs_root: Path,
    *,
    module: str = MODULES["export"],
    now: Callable[[], float] = time.time,
    **launching: Any,
) -> RunPaths:
    """Check an export, make its run and launch the worker; return when the worker holds the run.

    Args:
        request: What to write in which format.
        runs_root: Where runs live.
        module: The job's module.
        now: Unix seconds.
        launching: As for `launch`.

    Raises:
        BadInput: The model, the format or the output folder cannot be used; no folder was made.
        StudioError: The worker cannot be started; no folder is left.
    """
    check_export(request)
    check_space(runs_root)
    return launch_prepared(prepare_run(request, runs_root, now()), module, launching)


def check_export(request: ExportRequest) -> None:
    """Check what an export starts from and where it goes.

    Raises:
        BadInput: An unknown format, no whole adapter or model (16 or 32 bit), an output folder that already holds
            something, or a disk without room.
    """
    if request.format not in EXPORT_FORMATS:
        found = plain(request.format, one_line=True, limit=40)
        raise BadInput(f"the format {found} is not known here; wanted one of {', '.join(EXPORT_FORMATS)}.")
    if request.format == "peft":
        check_out(Path(request.out))
        check_space(Path(request.out).parent, find_adapter(Path(request.source)).header.buffer_bytes)
        return
    config, size_bytes = _check_merged(Path(request.source))
    if isinstance(config.get("quantization_config"), dict):
        raise BadInput(
            f"{plain(request.source, one_line=True)} is quantised already: rounding it again would lose more. "
            "Export from the merged 16-bit model."
        )
    check_out(Path(request.out))
    # The largest case: embeddings that stay in 16 bits and linear layers in 8.
    check_space(Path(request.out).parent, size_bytes)


def _check_merged(source: Path) -> tuple[dict[str, Any], int]:
    shown = plain(str(source), one_line=True)
    try:
        if not source.is_dir():
            raise BadInput(f"there is no model folder {shown}: merge first, with lora-studio merge.")
        return check_folder(source)
    except OSError as error:
        raise BadInput(f"{shown} cannot be looked at: {error.strerror or error}.") from None
