"""Weights & Biases: one run there for all starts of a run here, and no start that waits for the network for long."""

import contextlib
import json
import netrc
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dist_train.config.tree import TrackConfig
from dist_train.loop.meter import Metrics
from dist_train.ranks import ending
from dist_train.track.base import Course, Summary, numbers
from dist_train.track.jsonl import Jsonl
from dist_train.track.status import status_of
from dist_train.track.wandb_file import last_step
from dist_train.whole import write_text

ID_FILE = "wandb_id"  # in the run's folder
NETWORK_S, START_S, FINISH_S = 3.0, 30.0, 20.0


def run_id(cfg: TrackConfig, folder: Path, kept: str | None, before: Path | None) -> str | None:
    """The id of the run at W&B: the config's, the folder's, that of the checkpoint, W&B's own variable, or a new one.
    From here on the folder keeps it. None if there is none and none is needed. On rank 0.

    Args:
        cfg: of the run.
        folder: of the run.
        kept: in the checkpoint that the run goes on from.
        before: see Course. What goes on from a run that is finished is another run.
    """
    there = None
    with contextlib.suppress(OSError):
        there = (folder / ID_FILE).read_text(encoding="utf-8").strip()
    if before is not None and status_of(before) == "finished":
        kept = None
    name = cfg.wandb_id or there or kept
    if name is None and cfg.wandb:
        name = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    if name and name != there:
        write_text(folder / ID_FILE, name + "\n")
    return name


class WandB:
    """A run at W&B. What lies in `RUN/wandb` is W&B's own.

    Args:
        cfg: its keys go to W&B as they are; of a null, W&B's own variables and settings decide.
        tree: the run's config, and where it runs.
        folder: of the run.
        course: of the run.
        name: of the run at W&B, see `run_id`.
        say: takes a line for people.
        captures: W&B keeps what the process prints as well.
    """

    name = "track.wandb"

    def __init__(
        self, cfg: TrackConfig, tree: dict[str, Any], folder: Path, course: Course, name: str,
        say: Callable[[str], None], captures: bool,
    ):  # fmt: skip
        import wandb

        self.say = say
        given = wandb.setup(wandb.Settings(silent=True)).settings
        usual = wandb.Settings.model_fields["base_url"].default
        mode = given.mode if cfg.wandb_mode == "auto" else cfg.wandb_mode
        lack = _lack(given.base_url, given.base_url == usual, bool(given.api_key)) if mode == "online" else None

        def start(mode: str) -> Any:
            return wandb.init(
                **{key: getattr(cfg, f"wandb_{key}") for key in ("project", "entity", "group", "name", "notes")},
                tags=cfg.wandb_tags or None,
                mode=mode,
                dir=folder,
                id=name,
                resume="allow",
                config=tree,
                allow_val_change=True,
                settings=wandb.Settings(silent=True, init_timeout=START_S, console="auto" if captures else "off"),
            )

        # Before the start: the file of this one has no record yet.
        before = course.before or folder
        self.last_step = max(_last_step(folder, name), _last_step(before, name))
        if mode == "online" and lack is None:
            try:
                self.run = start(mode)
            except Exception as error:
                lack = f"W&B does not take it ({' '.join(str(error).split()) or type(error).__name__})"
                wandb.teardown()  # its process would take the id for used
        if mode != "online" or lack is not None:
            self.run = start("offline" if lack else mode)
        self.upload = f"wandb sync {folder}/wandb/offline-run-*-{name}"
        if lack is not None:
            say(f"track.wandb: {lack}, so it records offline; to upload it later: {self.upload}")
        elif mode == "offline":
            say(f"track.wandb: offline; to upload it: {self.upload}")
        elif mode == "online":
            say(f"track.wandb: {self.run.url}")
            self.upload = f"wandb sync --include-online {Path(self.run.dir).parent}"
            self.last_step = self.run.starting_step - 1
        self._catch_up(before / Jsonl.name, course.at)

    def _catch_up(self, file: Path, step: int) -> None:
        """Logs what W&B, which writes and sends now and then only, had not kept of the steps that will not come again:
        those up to `step`, when the run was killed."""
        with contextlib.suppress(FileNotFoundError), file.open(encoding="utf-8") as lines:
            for line in lines:
                metrics = json.loads(line) if line.endswith("\n") else None  # a kill may have cut it off
                if metrics is None or metrics["step"] > step:
                    break
                self.log(metrics, None)

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See Tracker. A step that W&B has is not logged again: the values are the same."""
        values = numbers(metrics)
        if values and metrics["step"] > self.last_step:
            self.run.log(values, step=metrics["step"])  # which stays open for more, until the next one

    def finish(self, summary: Summary) -> None:
        """See Tracker."""
        self.run.summary.update({"by": None} | summary)  # that of an earlier stop is over

    def close(self, code: int) -> None:
        """See Tracker. An upload that takes long is left to the user."""
        if code == ending.STOPPED:
            self.run.mark_preempting()
        if not _ends_within(FINISH_S, lambda: self.run.finish(exit_code=code)):
            self.say(f"track.wandb: not all was uploaded within {FINISH_S:.0f} s; the rest goes by {self.upload}")


def _last_step(folder: Path, name: str) -> int:
    """The last step that the files of earlier starts hold."""
    last = 0
    for file in folder.glob(f"wandb/*run-*-{name}/run-{name}.wandb"):
        step = last_step(file)
        if step is None and file.parent.name.startswith("offline"):  # killed too early; `wandb sync` would take none
            shutil.rmtree(file.parent, ignore_errors=True)
        last = max(last, step or 0)
    return last


def _lack(url: str, is_default: bool, has_key: bool) -> str | None:
    """What recording online would need, and is not there; None if nothing is missing."""
    host = urlsplit(url).netloc
    has_key = has_key or any(os.environ.get(f"WANDB_{name}") for name in ("API_KEY", "IDENTITY_TOKEN_FILE"))
    hosts = [host, "api.wandb.ai"] if is_default else [host]  # that name was the default's in earlier versions
    if not (has_key or _in_netrc(hosts)):  # W&B would ask for one at a terminal
        return f"no key for {host} (wandb login, or WANDB_API_KEY)"
    proxy = None if proxy_bypass(host) else getproxies().get(urlsplit(url).scheme)
    to = urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}" if proxy else url)
    port = to.port or {"http": 80, "https": 443}.get(to.scheme, 443)
    try:  # in a thread, as nothing ends a look-up of a name
        reached = _ends_within(NETWORK_S, lambda: socket.create_connection((to.hostname, port), NETWORK_S).close())
    except OSError:
        reached = False
    return None if reached else f"no way to {to.hostname}, port {port}"


def _in_netrc(hosts: Sequence[str]) -> bool:
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            file = netrc.netrc(os.path.expanduser(name)) if name else None
            if file and any(file.authenticators(host) for host in hosts):
                return True
    return False


def _ends_within(seconds: float, function: Callable[[], object]) -> bool:
    """Whether `function` ended in time; if not, it goes on in the background. Raises what it raised."""
    errors: list[Exception] = []

    def call() -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    for error in errors:
        raise error
    return not thread.is_alive()
