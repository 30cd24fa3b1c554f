"""What the studio's process holds once its screens are imported. In an interpreter of its own: imports happen once."""

import json
import subprocess
import sys

_PROGRAM = """
import gc, json, sys
from studio.tui.spare_memory import importing
with importing():
    import studio.tui.app
held = {"ssl": "ssl" in sys.modules, "_hashlib": "_hashlib" in sys.modules, "set_aside": gc.get_freeze_count(),
        "collecting": gc.isenabled()}
import asyncio, ssl, huggingface_hub
held["later"] = ssl.OPENSSL_VERSION
held["client"] = type(huggingface_hub.get_session()).__name__
print(json.dumps(held))
"""


def test_the_screens_bring_no_openssl_and_leave_little_to_collect() -> None:
    told = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    held = json.loads(told.stdout)
    assert not held["ssl"]
    assert not held["_hashlib"]
    assert held["set_aside"] > 20_000
    assert held["collecting"]
    assert held["later"], "what asks the hub still finds ssl"
    assert held["client"]
