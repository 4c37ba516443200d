"""A loopback Hub for tests, and the way to run the real client against it.

The client reads HF_ENDPOINT and HF_HUB_OFFLINE once, when it is imported: that is why client code runs in a process
of its own. `from tests.hub.server import LoopbackHub` is the server.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .server import LoopbackHub

_INHERITED = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_")


def hub_env(hub: "LoopbackHub", token: str | None, home: Path) -> dict[str, str]:
    """Environment of a client of `hub`: ours without anything about the Hub, its caches or offline mode.

    Args:
        token: None leaves the client without one.
        home: HF_HOME, the root of all caches; an empty folder for a client that must download.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(_INHERITED) and "_proxy" not in k.lower()}
    env |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else load_dataset calls on Amazon S3
        # Anything but the Hub goes to the Hub as a proxy, is refused at once and shows in `hub.strays()`.
        "HTTP_PROXY": hub.endpoint,
        "HTTPS_PROXY": hub.endpoint,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return env | ({"HF_TOKEN": token} if token else {})


def run_client(code: str, env: dict[str, str], timeout: float = 120) -> str:
    """Runs Python code in a new process and returns what it printed.

    Raises:
        AssertionError: the code failed; the message ends with its traceback.
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"client failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
