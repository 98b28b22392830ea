"""python -m dist_train [COMMAND] [--config FILE.yaml] [--section.key value ...]

Without a command it trains. This is the one module that sees all the others.
"""

import importlib
import sys

from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.config.values import unknown
from dist_train.errors import ConfigError
from dist_train.ranks import ending, orphan
from dist_train.ranks.launcher import Launcher, clean_argv, detect
from dist_train.ranks.speech import escape_unprintable, mark_warnings
from dist_train.run.check import check

TOOLS = (
    *("bench", "doctor", "eval", "explain", "export", "generate", "inspect", "parity", "plan", "replay", "report"),
    *("runs", "tokenize"),
)


def main() -> None:
    """The console script. Ends the process with a code of `ending`."""
    escape_unprintable()
    launcher = Launcher()
    try:
        launcher = _launcher(sys.argv[1:])
        mark_warnings(launcher)
        argv = clean_argv(sys.argv[1:], launcher)
        command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
        if command == "train":
            code = run(load(argv), launcher)
        elif command in TOOLS:
            code = importlib.import_module(f"dist_train.tools.{command}").run(argv, launcher)
        else:
            raise ConfigError(unknown("command line", command, ("train", *TOOLS), "command"))
    except ConfigError as error:
        code = ending.refuse(error, launcher)
    except SystemExit as error:  # --help
        code = error.code if isinstance(error.code, int) else ending.FAILED
    except BaseException as error:
        code = ending.fail(error, launcher)
    ending.leave(code)


def _launcher(argv: list[str]) -> Launcher:
    """Who started this process. Where the environment contradicts itself, the doctor says it among its lines."""
    try:
        return detect()
    except ConfigError:
        if "doctor" not in argv[:1]:
            raise
        return Launcher()


def run(config: Config, launcher: Launcher) -> int:
    """Trains. What is wrong with the config is said before torch is imported, what is wrong with the data before
    the ranks are joined."""
    check(config, launcher)
    orphan.started_by(launcher.name)

    from dist_train.run import session, start

    with start.joined(config, launcher) as joined:
        return session.run(config, *joined).code


if __name__ == "__main__":
    main()
