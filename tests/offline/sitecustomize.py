"""With this folder on PYTHONPATH a Python process reaches no network.

Each attempt is refused and logged in the file that OFFLINE_LOG names.
"""

import os
import socket
import sys

CALLS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.sendto",
    "socket.sendmsg",
)


def log(line):
    with open(os.environ["OFFLINE_LOG"], "a") as file:
        file.write(line + "\n")


def refuse(event, args):
    if event in CALLS and getattr(args[0], "family", None) != socket.AF_UNIX:
        log(f"{event} {args!r}")
        raise OSError(f"offline: {event} {args!r}")


sys.addaudithook(refuse)
log("guards " + next((word for word in sys.orig_argv[1:] if word != "-m"), ""))
