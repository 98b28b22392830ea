"""How a process ends: what is said, by which rank, and the exit code. Knows no torch, so a bad config ends at once."""

import contextlib
import os
import sys
import time
import traceback

from dist_train.config.own_code import frames
from dist_train.errors import ConfigError, CorruptionError, LaunchError, OtherRankError
from dist_train.ranks.launcher import Launcher
from dist_train.ranks.speech import prefix

# STOPPED: asked to end, saved, to be started again (EX_TEMPFAIL of sysexits.h).
OK, FAILED, BAD_CONFIG, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130

# A rank whose error may be only the echo of another's waits this long for that one to be shown first;
# the launcher ends it meanwhile.
ECHO_WAIT_S = 3.0
# What of a compiler's failure its own message leaves out.
MINIFIER = (
    "to get a minified reproduction of a compiler's failure: set TORCHDYNAMO_REPRO_AFTER=aot (or dynamo, where that "
    "writes nothing), run again, then run torch_compile_debug/*/minifier/minifier_launcher.py; --compile.mode off "
    "trains without the compiler, and python -m dist_train explain shows where the model's graph breaks"
)
# How gloo and nccl tell of a peer that is gone.
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")


def leave(code: int) -> None:
    """Ends the process. Without os._exit gloo's threads abort the interpreter's exit now and then (exit -6)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def refuse(error: ConfigError, launcher: Launcher) -> int:
    """Says the user's mistake once, not once a rank: a rank other than 0 speaks only if it is alone with it."""
    if launcher.rank:
        time.sleep(ECHO_WAIT_S + 0.2 * launcher.local_rank)
    for line in error.lines:
        print(f"dist_train: {line}", file=sys.stderr)
    return BAD_CONFIG


def fail(error: BaseException, launcher: Launcher) -> int:
    """Shows the traceback with the rank on every line. An echo of another rank's end is a line, after a wait."""
    if isinstance(error, KeyboardInterrupt):
        print(f"[rank {launcher.rank}] interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, LaunchError):
        print(f"dist_train: {error}", file=sys.stderr)
        return FAILED
    if isinstance(error, CorruptionError):  # on all ranks
        if launcher.rank:
            time.sleep(ECHO_WAIT_S)
        else:
            print(f"dist_train: {error}", file=sys.stderr)
        return FAILED
    echo = isinstance(error, OtherRankError) or any(sign in str(error).lower() for sign in LOST_PEER)
    if launcher.world_size > 1 and echo:
        time.sleep(ECHO_WAIT_S)
        print(f"[rank {launcher.rank}] lost another rank, whose own error stands above or on its node", file=sys.stderr)
        return FAILED
    rank = prefix(launcher.rank, launcher.world_size)
    text = "".join(traceback.format_exception(error))
    lines = text.splitlines() + _in_own_code(error) + ([MINIFIER] if _from_compiler(error) else [])
    sys.stderr.write("".join(f"{rank}{line}\n" for line in lines))
    sys.stderr.flush()
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows it in its own report
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
    return FAILED


def _in_own_code(error: BaseException) -> list[str]:
    """The last line of the user's own code among the many of a traceback."""
    return [f"in your code: {f.filename}, line {f.lineno}, in {f.name}: {f.line}" for f in frames(error)[-1:]]


def _from_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return True
        error = error.__cause__ or error.__context__
    return False
