"""What the studio's process holds once its screens are imported. In an interpreter of its own: imports happen once."""

import json
import subprocess
import sys

_PROGRAM = """
import gc, json
from studio.tui.spare_memory import importing
with importing():
    import studio.tui.app
print(json.dumps({"set_aside": gc.get_freeze_count(), "collecting": gc.isenabled()}))
"""


def test_the_screens_leave_little_to_collect() -> None:
    told = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    held = json.loads(told.stdout)
    assert held["set_aside"] > 20_000
    assert held["collecting"]
