"""A run's log shows what happened, not what a library would rather have."""

import importlib
import logging
import warnings

from bitsandbytes.backends.cpu import ops

import studio.jobs


def test_an_optional_kernel_that_is_not_installed_is_no_failure() -> None:
    assert not ops.logger.isEnabledFor(logging.WARNING)
    assert ops.logger.isEnabledFor(logging.ERROR)


def test_what_peft_asks_under_an_old_name_is_not_a_runs_last_word() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        importlib.reload(studio.jobs)  # pytest has filters of its own in each test
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
        )
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in told] == ["something else is deprecated"]
