"""On the PYTHONPATH of a process, this lets a test set its wall clock: LATHE_TEST_CLOCK names a file that holds seconds
to add."""

import os
import time

_real = time.time
_file = os.environ.get("LATHE_TEST_CLOCK")


def _shifted() -> float:
    assert _file is not None
    with open(_file) as file:
        return _real() + float(file.read())


if _file is not None:
    time.time = _shifted
