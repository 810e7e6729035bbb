"""The server processes of a view."""

from __future__ import annotations

import atexit
import errno
import socket
import subprocess
import sys
from pathlib import Path

from ._errors import ExportError, first_line

HOST = "127.0.0.1"


def free(port: int) -> None:
    """Looked at first: a model takes its time to export.

    Raises:
        ExportError: somebody listens on ``port``, or nobody may.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            in_use = getattr(error, "errno", None) == errno.EADDRINUSE
            told = "is in use" if in_use else f"cannot be listened on: {first_line(error)}"
            raise ExportError(f"port: {port} {told}") from None


class Server:
    """``_serve.py`` in a process of its own; it ends with this one, however this one ends.

    Raises:
        ExportError: the port is in use, or the server does not start.
    """

    def __init__(self, kind: str, what: Path, port: int = 0):
        script = Path(__file__).with_name("_serve.py")
        # -P: beside the script lie an onnx.py and a netron.py that are not the packages.
        command = [sys.executable, "-P", str(script), kind, str(what), str(port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        answer, _, rest = self._process.stdout.readline().strip().partition(" ")
        if answer != "ready":
            said = rest or (self._process.stderr.read().strip().splitlines() or ["it said nothing"])[-1]
            self.stop()
            raise ExportError(
                said if answer == "error" else f"the server for {what.name} did not start: {said}"
            )
        self.url = f"http://{HOST}:{rest}"
        atexit.register(self.stop)

    def wait(self) -> None:
        self._process.wait()

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()
