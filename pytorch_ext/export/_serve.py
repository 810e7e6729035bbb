"""A process of its own that serves one thing on the loopback interface until whoever started it is gone.

``python -P _serve.py netron FILE PORT`` or ``… page FOLDER PORT``. It prints ``ready PORT``, or ``error SENTENCE``, and
ends when its standard input does. It imports neither torch nor pytorch_ext, so that it is there at once.

Netron shows one model per process, and asks in its page for leave to report on its use. Here nothing is reported: the
page may talk to its own server alone, so that the question has no point and is not asked. And from 180 days after its
release on it shows nothing but a demand to be updated, also where nobody can: here it is as old as the day.
"""

import errno
import functools
import http.server
import os
import re
import signal
import sys
import threading
import time

HOST = "127.0.0.1"
NOBODY_ELSE = (
    "default-src 'self' 'unsafe-inline' data: blob:; form-action 'none'; "
    f"frame-src http://{HOST}:*; frame-ancestors 'self' http://{HOST}:* http://localhost:*"
)


def main(kind: str, what: str, port: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this gets it too, and closes the pipe
    try:
        port = serve_netron(what, port) if kind == "netron" else serve_page(what, port)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        say(
            f"error port: {port} is in use"
            if in_use
            else f"error port: cannot listen on {port}: {error.strerror}"
        )
        return
    say(f"ready {port}")
    sys.stdin.read()


def serve_netron(file: str, port: int) -> int:
    import netron

    as_of_today(netron.server._HTTPRequestHandler)
    add_headers({"Content-Security-Policy": NOBODY_ELSE, "Set-Cookie": f"consent={int(time.time())}; path=/"})
    return netron.start(file, address=(HOST, port), browse=False)[1]


def as_of_today(handler: type) -> None:
    """Netron reads from its page how old it is."""
    write = handler._write
    today = time.strftime("%Y-%m-%d %H:%M:%S").encode()

    def write_with_date(self, status_code, content_type, content):
        if content_type == "text/html":
            content = re.sub(rb'(<meta name="date" content=")[^"]*', rb"\g<1>" + today, content)
        write(self, status_code, content_type, content)

    handler._write = write_with_date


def serve_page(folder: str, port: int) -> int:
    add_headers({"Content-Security-Policy": NOBODY_ELSE, "Cache-Control": "no-store"})
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer((HOST, port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def add_headers(headers: dict[str, str]) -> None:
    """To every answer of this process: Netron's handler has no such setting."""
    handler = http.server.BaseHTTPRequestHandler
    end = handler.end_headers

    def end_headers(self):
        for name, value in headers.items():
            self.send_header(name, value)
        end(self)

    handler.end_headers = end_headers


def say(what: str) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    os._exit(0)  # whatever the threads of a server are doing
