"""Saving: when, whole or not at all, and what stays.

checkpoints/.writing-START-step-00000100  every rank writes its file and syncs it
checkpoints/.writing-.../manifest.json    rank 0, when all have: sizes and hashes
checkpoints/step-00000100                 one rename by rank 0, synced: from here on it exists
checkpoints/.removing-step-00000050       then an older one goes, also by a rename first
checkpoints/suspect-step-00000100         an audit has found that a device computes wrongly; see set_aside
"""

import contextlib
import functools
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch.distributed as torch_dist

from dist_train.backends import chosen, mesh
from dist_train.backends.base import Backend
from dist_train.backends.shards import HostCopy, Shards, shards_of
from dist_train.checkpoint import manifest, randomness
from dist_train.checkpoint.manifest import Damaged, DataFacts, Manifest, Scale, Tensor
from dist_train.config.tree import CheckpointConfig, Config, to_tree
from dist_train.data.order import falls_on
from dist_train.errors import OtherRankError
from dist_train.loop.meter import Meter
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.versions import versions

# Ranks come to a save together, out of the exchange of the step's gradients; one that does not come is elsewhere.
TOGETHER_S = 10.0
WRITING, REMOVING, SUSPECT = ".writing-", ".removing-", "suspect-"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint must fit.

    Args:
        model: shapes of the model's tensors.
        train: samples of the training split.
        test: samples of the test split.
        fingerprint_of: gives the hash over the data. It goes through all that is in memory, seconds for each GB.
    """

    model: dict[str, Tensor]
    train: int
    test: int
    fingerprint_of: Callable[[], str]

    def begin(self) -> None:
        """Goes through the data in the background, for the first checkpoint to find it done."""
        assert self._fingerprint is not None

    @property
    def data(self) -> DataFacts:
        """The facts about the data. Waits until they are there."""
        return DataFacts(self.train, self.test, self._fingerprint.result())

    @functools.cached_property
    def _fingerprint(self) -> Future[str]:
        thread = ThreadPoolExecutor(1, "fingerprint")
        try:
            return thread.submit(self.fingerprint_of)
        finally:
            thread.shutdown(wait=False)


class Checkpoints:
    """The checkpoints of a run that trains. All methods are collective.

    Args:
        config: of the run.
        world: this rank's place.
        folder: of the run, the same on all ranks.
        facts: of the run.
        backend: has prepared the model.
        best: what decides which is the best.
        damaged: checkpoints in the folder that were found damaged, to be removed when a newer one stands.
        wandb_id: of the run at W&B; on rank 0.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        folder: Path,
        facts: Facts,
        backend: Backend,
        best: manifest.Best,
        damaged: Sequence[Damaged] = (),
        wandb_id: str | None = None,
    ):
        self.config, self.world, self.facts, self.backend = config, world, facts, backend
        self.best, self.wandb_id = best, wandb_id
        self.folder = folder / manifest.FOLDER
        # Those of another run, from which this one goes on, are not ours to remove.
        self.damaged = {error.folder for error in damaged if error.folder.parent == self.folder}
        self.stalls_s: list[float] = []
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None
        self.pending: Future[None] | None = None
        cfg = config.checkpoint
        self.beside: Callable[[], dict[str, Shards]] = dict  # what this rank saves beside the backend's state
        self.trusted: Callable[[], int | None] = lambda: None  # the newest step that was audited, where steps are
        self.host = HostCopy()
        self.thread = ThreadPoolExecutor(1, "checkpoint") if cfg.asynchronous else None
        # Of its own: a write in the background must not meet the training's collectives. On the CPU under any backend.
        joined = torch_dist.is_initialized()
        self.group = dist.group_of_hosts() if joined else None
        # One to meet in: monitored_barrier keeps to its own timeout on rank 0 alone, the others to their group's.
        self.meeting = dist.group_of_hosts(TOGETHER_S) if joined else None
        if saves(cfg):
            from dist_train.checkpoint import storage  # noqa: F401  (it takes half a second: not in the first save)

            if world.is_main:  # who writes it down
                facts.begin()
        # A rank of a killed run may still write when the next run has begun: not into the same folder.
        self.start = dist.on_main(lambda: secrets.token_hex(4))

    def after_step(self, meter: Meter) -> None:
        """Saves if the config says so. Raises what went wrong in the background since the last call."""
        cfg, step, requests = self.config.checkpoint, meter.result.steps, meter.requests
        if self.pending is not None and self.pending.done():
            self._wait()
        if cfg.every_s is not None and self.world.is_main:
            requests.saving = time.monotonic() - self.saved_at >= cfg.every_s
        due = falls_on(step, cfg.every_steps, cfg.every_epochs, meter.steps_per_epoch)
        if due or requests.save_agreed or (step == meter.total_steps and saves(cfg)):
            self.save(meter)
        if requests.stop_agreed and step < meter.total_steps:
            self.save(meter)
            meter.event({"event": "stop", "at": time.time(), "by": requests.stop_agreed})
            raise Stopped(requests.stop_agreed, step)

    def save(self, meter: Meter) -> None:
        """Saves the run as it is after the last step. Raises RuntimeError at once where not all ranks call it."""
        if meter.result.steps == self.saved_step:
            return
        meter.phases("checkpoint")
        meter.phases.progressed()
        with meter.away():
            start = time.perf_counter()
            self._wait()
            self._meet()
            state = self.backend.state() | {
                f"random.{self.world.rank}.{name}": shards_of(value)
                for name, value in randomness.state(self.world.device).items()
            }
            state |= self.beside()
            what = self._manifest(meter)
            if self.thread is None:
                self._write(state, what)
            else:
                self.pending = self.thread.submit(self._write, self.host.of(state), what)
            self.stalls_s.append(time.perf_counter() - start)
        self.saved_at, self.saved_step = time.monotonic(), meter.result.steps
        meter.requests.saving = meter.requests.save_agreed = False
        meter.event({"checkpoint/stall_s": self.stalls_s[-1]})

    def set_aside(self, after: int) -> tuple[Path | None, list[str]]:
        """Gives the checkpoints of steps after this one names from which no run resumes.

        Returns:
            The newest checkpoint that is left, and the new names of the others.
        """
        self._wait()
        return dist.on_main(lambda: self._set_aside(after))

    def _set_aside(self, after: int) -> tuple[Path | None, list[str]]:
        found, names = manifest.listed(self.folder.parent)[0], []
        for folder in [folder for folder, what in found if what.step > after]:
            target = next(t for t in _names(folder.with_name(f"{SUSPECT}{folder.name}")) if not t.exists())
            folder.rename(target)
            names.append(target.name)
        if names:
            sync_folder(self.folder)
        return next((folder for folder, what in found if what.step <= after), None), sorted(names)

    def close(self) -> None:
        """Waits for what is being written."""
        self._wait()
        for group in (self.group, self.meeting):
            if group is not None:
                torch_dist.destroy_process_group(group)

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _meet(self) -> None:
        if self.meeting is None:
            return
        try:
            torch_dist.monitored_barrier(self.meeting, timedelta(seconds=TOGETHER_S), wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"save() is called by every rank, or by none; rank {self.world.rank} waited {TOGETHER_S:.0f} s for "
                f"others: {error}"
            ) from error

    def _manifest(self, meter: Meter) -> Manifest:
        step, scale, stage = meter.result.steps, self.backend.scale, self.config.backend.zero_stage
        backend = chosen(self.config.backend.name, self.world.launcher)
        epoch, within = divmod(step, meter.steps_per_epoch)
        sizes = mesh.of(self.config, self.world.size).sizes if self.config.backend.mesh else None
        return Manifest(
            schema=manifest.SCHEMA,
            sequence=0,
            step=step,
            epoch=epoch,
            step_in_epoch=within,
            seed=self.config.train.seed,
            data=DataFacts(self.facts.train, self.facts.test, fingerprint=""),
            global_batch_size=self.config.train.global_batch_size,
            backend=f"{backend}:{stage or 0}" if backend == "deepspeed" else backend,
            world_size=self.world.size,
            model=self.facts.model,
            progress=meter.progress(),
            evaluation=meter.result.evaluation if meter.evaluated_step == step else {},
            loss_scale=Scale(scale.factor, scale.finite_steps) if scale else None,
            config=to_tree(self.config),
            versions=versions(),
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            files={},
            wandb_id=self.wandb_id,
            mesh=dict(zip(mesh.DIMENSIONS, sizes, strict=True)) if sizes else None,
        )

    def _write(self, state: dict[str, Shards], what: Manifest) -> None:
        """Writes and commits. In the background too, where it is the only user of the group."""
        from dist_train.checkpoint import storage

        name = f"step-{what.step:08d}"
        beside = self.folder / f"{WRITING}{self.start}-{name}"
        with self._failing_together(beside):
            files = storage.write(beside, state, self.group)
        with self._failing_together(beside):
            every = dist.gather(files, self.group)
            if self.world.is_main:
                self._commit(beside, name, replace(what, files=dict(itertools.chain(*(f.items() for f in every)))))

    @contextlib.contextmanager
    def _failing_together(self, beside: Path) -> Iterator[None]:
        """What fails on one rank fails on all, and what was written is removed."""
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        own = error is not None and not isinstance(error, OtherRankError)
        failed = [rank for rank, bad in enumerate(dist.gather(own, self.group)) if bad]
        if error is None and not failed:
            return
        if self.world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        if own or not failed:
            raise SaveError(f"{beside}: cannot be written, earlier checkpoints stand: {error}") from error
        raise OtherRankError(f"rank {failed[0]} could not write {beside}")

    def _commit(self, beside: Path, name: str, what: Manifest) -> None:
        """Gives the checkpoint its name, then removes those that the config does not keep. On rank 0."""
        older, _ = manifest.listed(self.folder.parent)
        what = replace(what, sequence=1 + max((m.sequence for _, m in older), default=0), data=self.facts.data)
        with (beside / manifest.NAME).open("x", encoding="utf-8") as file:
            file.write(manifest.dumps(what))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(beside)
        # A damaged one of the same step may stand there, or one of a run that was resumed from before it.
        target = next(t for t in _names(self.folder / name) if not t.exists())
        beside.rename(target)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)  # the first checkpoint's folder of checkpoints is new there
        keep = self._kept([(target, what), *older])
        for folder in [*(f for f, _ in older), *self.damaged]:
            if folder not in keep and folder.exists():
                gone = folder.with_name(f"{REMOVING}{folder.name}")
                folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)  # the new one stands; what is left goes at the next start

    def _kept(self, newest_first: list[tuple[Path, Manifest]]) -> set[Path]:
        cfg = self.config.checkpoint
        whole = [(folder, m) for folder, m in newest_first if folder not in self.damaged]
        keep = {folder for folder, _ in whole[: cfg.keep_last]}
        trusted = self.trusted()
        if trusted is not None:
            keep |= set([folder for folder, m in whole if m.step <= trusted][:1])
        for _ in range(cfg.keep_best):
            found = self.best.of(whole)
            if found is not None:
                keep.add(found[0])
                whole.remove(found)
        return keep


class Stopped(Exception):
    """The run was asked to end, and is saved.

    Args:
        why: who asked.
        step: that it ends after.
    """

    def __init__(self, why: str, step: int):
        super().__init__(f"stopped by {why} after step {step}")
        self.why, self.step = why, step


class SaveError(OSError):
    """A checkpoint could not be written."""


def saves(cfg: CheckpointConfig) -> bool:
    """Whether a run saves checkpoints."""
    return any(every is not None for every in (cfg.every_steps, cfg.every_epochs, cfg.every_s))


def clean(run: Path) -> None:
    """Removes what a killed run left half-written or half-removed. By the holder of the run's lock."""
    folder = run / manifest.FOLDER
    for path in [*folder.glob(f"{WRITING}*"), *folder.glob(f"{REMOVING}*")]:
        shutil.rmtree(path, ignore_errors=True)  # a rank of the killed run may be in it still


def sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(path: Path) -> Iterator[Path]:
    yield path
    for i in itertools.count(2):
        yield path.with_name(f"{path.name}.{i}")
