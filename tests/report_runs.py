"""Folders as runs leave them, made without training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config.load import dump
from dist_train.config.tree import Config

CLASSES = ("cat", "dog", "<script>window.hacked = 1</script>", "%{x} & </script>")
STARTED_AT = 1.7e9


def lines(steps: int = 40, ranks: int = 2, loss: float = 1.0) -> list[dict[str, Any]]:
    """Of a run that evaluates and saves after every tenth step, and was stopped and resumed after the 20th."""
    found: list[dict[str, Any]] = []
    who = {"backend": "ddp", "world_size": ranks, "host": "node<1>"}
    rng = np.random.default_rng(0)

    def add(step: int, **facts: Any) -> None:
        found.append({"step": step, "epoch": step / 20, "time_s": step / 8, **facts})

    add(0, event="start", at=STARTED_AT, **who)
    for step in range(1, steps + 1):
        add(step, **{
            "train/loss": loss / step ** 0.5 + float(rng.normal(0, 0.01)), "train/grad_norm": 1 / step,
            "train/lr": 1e-3 * (1 - step / steps), "train/samples_per_s": 1000.0 + step,
            "ranks/own_ms": [1.0 + rank + step / 10 for rank in range(ranks)],
        })  # fmt: skip
        if step % 10 == 0:
            add(step, **{"eval/loss": loss / step, "eval/accuracy": 0.5 + min(step, 400) / 1000})
            add(step, **{"checkpoint/stall_s": 0.02})
        if step == 20:
            add(step, event="stop", at=STARTED_AT + 60, by="SIGTERM")
            add(step, event="resume", at=STARTED_AT + 180, **who)
    return found


def write_lines(folder: Path, found: list[dict[str, Any]]) -> None:
    """metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


def make(folder: Path, loss: float = 1.0, finished: bool = True, name: str = "digits") -> Path:
    """A run's folder."""
    folder.mkdir(parents=True)
    config = Config()
    data, train = replace(config.data, name=name), replace(config.train, epochs=2)
    config = replace(config, data=data, train=train, optim=replace(config.optim, lr=loss / 1000))
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    write_lines(folder, lines(loss=loss))
    if finished:
        summary = {"status": "finished", "backend": "ddp", "world_size": 2, "steps": 40, "train_s": 5.0 * loss}
        summary |= {"samples_per_s": 1200.0 / loss, "step_ms": {"p50": 8.0, "p95": 9.5}, "device": "cpu"}
        summary |= {"versions": {"python": "3.11.7", "torch": "2.14.1"}, "git_commit": "abc123"}
        (folder / "summary.json").write_text(json.dumps(summary))
        write_evaluation(folder)
    return folder


def write_evaluation(folder: Path, classes: tuple[str, ...] = CLASSES, shape: tuple[int, ...] = (1, 8, 8)) -> None:
    """evaluation.npz with six wrong samples."""
    rng, n = np.random.default_rng(1), len(classes)
    np.savez(
        folder / "evaluation.npz", classes=np.array(classes),
        confusion=rng.integers(0, 20, (n, n)) + 200 * np.eye(n, dtype=np.int64),
        worst_index=np.arange(6) * 7, worst_true=np.arange(6) % n, worst_predicted=(np.arange(6) + 1) % n,
        worst_loss=np.linspace(9, 4, 6), worst_confidence=np.linspace(0.99, 0.6, 6),
        worst_images=rng.integers(0, 256, (6, *shape)).astype(np.uint8),
    )  # fmt: skip


def write_predictions(folder: Path, numbers: int = 1, points: int = 50) -> None:
    """predictions.npz of samples 0, 3, 6 and so on, of which two are among the three worst."""
    true = np.random.default_rng(2).normal(size=(points, numbers))
    predicted = true + 0.1
    predicted[[4, 7]] += 3
    np.savez(
        folder / "predictions.npz", outputs=np.array(numbers), index=np.arange(points) * 3, true=true,
        predicted=predicted, worst_index=np.array([12, 1, 21]), worst_loss=np.array([9.5, 9.25, 9.0]),
        worst_true=np.concatenate([true[[4]], np.full((1, numbers), 2.0), true[[7]]]),
        worst_predicted=np.concatenate([predicted[[4]], np.full((1, numbers), -1.0), predicted[[7]]]),
    )  # fmt: skip


def write_masks(folder: Path, classes: tuple[str, ...] = CLASSES) -> None:
    """masks.npz of two samples of 4x6 and of 5x3 pixels."""
    true, predicted = (np.full((2, 16, 16), -2, np.int16) for _ in "ab")
    for i, (height, width) in enumerate(((4, 6), (5, 3))):
        true[i, :height, :width] = np.arange(height * width).reshape(height, width) % len(classes)
        predicted[i, :height, :width] = (true[i, :height, :width] + i) % len(classes)
    true[0, 0, 0] = -1
    np.savez(
        folder / "masks.npz", classes=np.array(classes), index=np.array([70, 3]), loss=np.array([2.5, 2.25]),
        right=np.array([1.0, 0.0]), true=true, predicted=predicted, image_0=np.full((3, 4, 6), 9, np.uint8),
        image_1=np.full((1, 5, 3), 9, np.uint8),
    )  # fmt: skip


def measured(found: list[dict[str, Any]], best: str, lower: list[str], splits: list[str], **metrics: Any) -> None:
    """Turns the lines of `lines` into those of another task.

    Args:
        found: is changed.
        best: metric that the best is decided by.
        lower: of metrics, those whose least is the best.
        splits: names of test splits.
        metrics: functions of the step by name, with __ for a slash.
    """
    for line in found:
        if line.get("event") in ("start", "resume"):
            line |= {"best_metric": best, "lower_is_better": lower, "test_splits": splits, "unit": "pixels"}
        if line.pop("eval/accuracy", None) is not None:
            del line["eval/loss"]
            line |= {f"eval/{name.replace('__', '/')}": of(line["step"]) for name, of in metrics.items()}
