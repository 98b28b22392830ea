"""python -m launch [--config FILE.yaml] [options] [-- --section.key value ...]

Prints what it is about to run, and runs it; --dry-run only prints.
"""

import sys

from dist_train.config.load import load
from dist_train.errors import ConfigError
from launch import machine
from launch.options import parse
from launch.plan import build
from launch.run import run


def main() -> int:
    """The exit code: the run's own; 2 for a mistake on the command line or in the config, said in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # names of files may be any bytes
    try:
        options = parse(sys.argv[1:])
        plan = build(options, load(list(options.arguments), "python -m launch --"), machine.look())
        only_print = options.dry_run or len(plan.commands) > 1
        if not only_print and plan.listens_on is not None and not machine.is_free(plan.listens_on):
            port = plan.listens_on
            raise ConfigError(f"--port: got {port}, which another program uses, expected a free one; --port {port + 1}")
    except ConfigError as error:
        for line in error.lines:
            print(f"launch: {line}", file=sys.stderr)
        return 2
    print(plan.script(), end="", file=sys.stdout if only_print else sys.stderr, flush=True)
    return 0 if only_print else run(plan)


if __name__ == "__main__":
    sys.exit(main())
