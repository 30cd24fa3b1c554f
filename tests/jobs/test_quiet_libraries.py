"""A run's log shows what happened, not what a library would rather have."""

import logging

from bitsandbytes.backends.cpu import ops

import studio.jobs  # noqa: F401  it is what is tested


def test_an_optional_kernel_that_is_not_installed_is_no_failure() -> None:
    assert not ops.logger.isEnabledFor(logging.WARNING)
    assert ops.logger.isEnabledFor(logging.ERROR)
