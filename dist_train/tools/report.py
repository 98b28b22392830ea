"""python -m dist_train report RUN [RUN ...] [-o FILE.html] [--png DIR]: runs as one page that opens offline.

Written to RUN/report.html, or of several runs to ./report.html, or to FILE.html; --png DIR also writes each plot as a
picture. The runs are only read; they may be running.
"""

from pathlib import Path

from dist_train.errors import ConfigError
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher
from dist_train.report import html, read
from dist_train.report.panels import panels
from dist_train.tools.options import split
from dist_train.whole import write

# Default, and an example.
OPTIONS = {"-o": ("", "report.html"), "--output": ("", "report.html"), "--png": ("", "plots")}


def run(argv: list[str], launcher: Launcher) -> int:
    """Writes the page, and says where it is."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return ending.OK
    options, words = split(argv, OPTIONS, "report", paths=OPTIONS)
    wrong = [word for word in words if word.startswith("-")]
    if wrong or not words:
        raise ConfigError(
            f"command line: got {wrong[0] if wrong else 'no run'}, expected folders of runs; write report RUN [RUN "
            f"...] [-o FILE.html] [--png DIR]"
        )
    folders = [Path(word) for word in words]
    output = options["-o"] or options["--output"]
    beside = folders[0] if len(folders) == 1 else Path()
    path = Path(output) if output else beside / "report.html"
    if path.is_dir():
        raise ConfigError(f"-o: got {path}, which is a folder, expected a file; for example -o {path / 'report.html'}")
    runs = read.read(folders)
    shown = panels(runs)
    write(path, html.page(runs, shown), "-o")
    print(f"report of {len(runs)} run{'s' if len(runs) > 1 else ''}: {path}")
    if options["--png"]:
        from dist_train.report import png

        drawn = png.drawable(shown)
        for panel in drawn:
            write(Path(options["--png"]) / f"{panel.key}.png", png.png(panel), "--png")
        left = len(shown) - len(drawn)
        only = f" (of your own figures, the page alone has {left})" if left else ""
        print(f"{len(drawn)} plots: {options['--png']}{only}")
    return ending.OK
