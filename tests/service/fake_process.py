"""Children for the supervisor's tests: `python fake_process.py ROLE [ARGUMENT]`, standard library only.

Every role ends on SIGTERM unless it says otherwise.
"""

import http.server
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path


def say(**status: object) -> None:
    print(json.dumps(status), flush=True)


def api(fd: str) -> None:
    """Answers every GET with 200 on the socket it inherited."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(str(os.getpid()).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(fd))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.sigwait({signal.SIGTERM})


def engine(path: str) -> None:
    """Listens on the Unix socket and says that it is ready."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    say(status="loading", fraction=0.5)
    say(status="ready")
    signal.sigwait({signal.SIGTERM})


def stubborn(path: str) -> None:
    """An engine that ignores SIGTERM, with a child of its own in its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (pid := os.fork()) != 0:
        Path(path + ".pid").write_text(str(pid))
        say(status="ready")
    while True:
        signal.pause()


def refuse(message: str) -> None:
    """An engine that says why it cannot load."""
    say(status="failed", error=message)
    sys.exit(1)


def crash(message: str) -> None:
    """Ends before it is ready."""
    print(message, file=sys.stderr)
    sys.exit(3)


def wait(_: str) -> None:
    signal.sigwait({signal.SIGTERM})


def convert(folder: str) -> None:
    """Makes a checkpoint folder, with a progress bar."""
    sys.stderr.write("\rconverting:  40%|####      |")
    sys.stderr.flush()
    Path(folder).mkdir(parents=True)
    (Path(folder) / "lathe.json").write_text("{}")
    sys.stderr.write("\rconverting: 100%|##########|\n")


if __name__ == "__main__":
    # sigwait needs the signals blocked first; a role that sets a handler unblocks nothing.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    roles = {role.__name__: role for role in (api, engine, stubborn, refuse, crash, wait, convert)}
    roles[sys.argv[1]](*sys.argv[2:])
