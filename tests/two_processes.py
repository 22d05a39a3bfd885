"""A program, given as its text, in two processes that work together on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

STOPPED = """
import importlib, os, signal, sys

from reward.run import leave

program, owner, method, number, *arguments = sys.argv[1:]
if os.environ["RANK"] == "1":
    module, name = owner.split(":")
    found = getattr(importlib.import_module(module), name)
    real, calls = getattr(found, method), []

    def call(*given):
        calls.append(given)
        if len(calls) == int(number):
            signal.raise_signal(signal.SIGTERM)
        return real(*given)

    setattr(found, method, call)
leave(importlib.import_module(program).main(arguments))
"""
"""PROGRAM MODULE:CLASS METHOD NUMBER ...: of a module's `main`, the second process alone gets SIGTERM in that call."""


def run(text: str, *arguments: str) -> list[int]:
    """Give both exit statuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text, *arguments],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            cwd=Path(__file__).parents[1],
        )
        for rank in ("0", "1")
    ]
    try:
        return [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
