"""Doing what a plan says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from launch.plan import Plan

# What arrives, and what the command gets: torchrun passes SIGTERM on to the ranks, but dies of a SIGUSR1.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGHUP,
    signal.SIGQUIT: signal.SIGQUIT,
    signal.SIGUSR1: signal.SIGTERM,
}


def run(plan: Plan) -> int:
    """Writes the files, runs the command, and returns its exit code: 128 and the signal's number if one ended it.
    A signal is passed on, and the command waited for."""
    for path, text in plan.files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    (command,) = plan.commands
    child: subprocess.Popen | None = None
    early: list[int] = []

    def forward(signum: int, _: object) -> None:
        if child is None:
            early.append(FORWARDED[signum])
        else:
            child.send_signal(FORWARDED[signum])

    for signum in FORWARDED:
        signal.signal(signum, forward)
    try:
        # Away from the terminal's own signals: Ctrl-C would come twice, and a second one means to stop at once.
        child = subprocess.Popen(command.argv, env=os.environ | command.env, start_new_session=True)
    except OSError as error:
        print(f"launch: {command.argv[0]}: {error.strerror}; is it installed here?", file=sys.stderr)
        return 127
    for signum in early:
        child.send_signal(signum)
    code = child.wait()
    return code if code >= 0 else 128 - code
