"""The server: an app on a socket, until it is told to end."""

import signal
import socket

import uvicorn
from fastapi import FastAPI

# Seconds for what is in flight when the server is told to end.
GRACE = 60


def listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens, before a model is loaded for it.

    Raises:
        ValueError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise ValueError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    return opened


def run(app: FastAPI, opened: socket.socket) -> None:
    """Serves an app until SIGINT or SIGTERM, and answers what is in flight then."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
    )
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # Uvicorn raises the signal once more when it is done: by then there is nothing to end.
        handlers[number] = signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(config).run(sockets=[opened])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
