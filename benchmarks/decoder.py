"""A decoder of text on the CPU: ours beside a bare loop, nanoGPT's way of feeding, Lightning, Trainer and Accelerate.

pip install 'lightning==2.6.*' 'accelerate==1.15.*' transformers   (for this benchmark; the package needs none of them)
python benchmarks/decoder.py [--repeats 16] [--steps N] [--config FILE.yaml ...the config's options]

All train the same model with the same optimizer, each in a process of its own but for the ceiling, which shares ours;
they take turns in short slices. The ceiling is a bare loop over batches that lie in memory.
nanogpt     the bare loop, each batch from random places of a mapped file, as nanoGPT's get_batch makes it.
lightning   the Trainer, without its logging, progress bar and checkpoints, on the batches in memory.
trainer     that of transformers, without reports and saves, on windows in memory, through its own loader.
accelerate  the plain loop of its documentation, on the batches in memory.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers import Held, alone, in_turns

from dist_train.bench import machine, table
from dist_train.bench.slices import CEILING, CONFIG, OURS, SOCKET
from dist_train.config.load import load
from dist_train.ranks.launcher import Launcher
from dist_train.tools.options import split

OPTIONS = {"--repeats": ("16", "16"), "--steps": ("0", "100")}


def main(argv: list[str]) -> None:
    """Leads, and prints the ratios."""
    options, rest = split(argv, OPTIONS, "decoder")
    repeats, steps = (int(options[name]) for name in OPTIONS)
    rest = rest if "--config" in rest else ["--config", "configs/shakespeare.yaml", *rest]
    config = alone(rest)
    batch_size = config.train.global_batch_size
    print(f"{config.model.args}, batch {batch_size}; {machine.describe(machine.facts())}", flush=True)
    runs, places = in_turns(config, batch_size, repeats, steps, (OURS, CEILING), PEERS, __file__)
    peaks = {name: places[name].ready[0].peak_bytes / 1e6 for name in places}
    starts = {name: places[name].start_s for name in places}
    print("| | ours / it | quartiles | by CPU time | start to first step, s | memory, MB |\n|---|---|---|---|---|---|")
    for name, run in runs.items():
        ours = table.ratio(runs[OURS], run)
        low, middle, high = table.quartiles(ours.by_round)
        cpu = statistics.median(ours.by_cpu_time)
        print(f"| {name} | {middle:.2f} | {low:.2f}-{high:.2f} | {cpu:.2f} | {starts[name]:.1f} | {peaks[name]:,.0f} |")


# -- a peer ------------------------------------------------------------------------------------------------------------


def serve(folder: Path, name: str) -> None:
    """A peer's process."""
    import torch

    from dist_train.bench.references import lay_out
    from dist_train.bench.turns import Turns
    from dist_train.loop import optim
    from dist_train.ranks import dist
    from dist_train.run import assemble

    config, device = load(["--config", str(folder / CONFIG)]), torch.device("cpu")
    dist.set_threads(config.train.threads, 1)
    parts = assemble.build(config, device)
    with dist.joined(Launcher(), device) as world:
        laid = [step[0].tree for step in lay_out(config, world, parts)]

    def optimizer_of() -> torch.optim.Optimizer:
        return optim.factory(config.optim, parts.model)(parts.model.named_parameters())

    turns = Turns(str(folder / SOCKET), 0, device)
    PEERS[name](parts.model, optimizer_of, config.train.grad_clip, laid, turns, folder)


def nanogpt(model, optimizer_of, clip, laid, turns, folder) -> None:
    """A bare loop that makes each batch as nanoGPT's train.py does."""
    import numpy as np
    import torch

    tokens = torch.cat([batch["input_ids"].flatten() for batch in laid]).numpy().astype(np.uint16)
    tokens.tofile(folder / "train.bin")
    rows, block = laid[0]["input_ids"].shape

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")  # anew, as nanoGPT does
            places = torch.randint(len(data) - block, (rows,))
            inputs, targets = (
                torch.stack([torch.from_numpy(data[i + by : i + by + block].astype(np.int64)) for i in places])
                for by in (0, 1)
            )
            yield {"input_ids": inputs, "targets": targets}

    _loop(model, optimizer_of(), clip, Held(batches(), len(laid), turns), lambda loss: loss.backward())


def accelerate(model, optimizer_of, clip, laid, turns, folder) -> None:
    """The plain loop of its documentation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer_of())
    _loop(model, optimizer, clip, _held(laid, turns), accelerator.backward, accelerator.clip_grad_norm_)


def lightning(model, optimizer_of, clip, laid, turns, folder) -> None:
    """The Trainer."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return self.model(**batch).mean()

        def configure_optimizers(self):
            return optimizer_of()

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    of = {"max_epochs": -1, "accelerator": "cpu", "devices": 1, "default_root_dir": folder, "gradient_clip_val": clip}
    lightning.Trainer(**of, **off).fit(Module(), Held(laid, len(laid), turns))


def trainer(model, optimizer_of, clip, laid, turns, folder) -> None:
    """That of transformers. A step ends where its loader is asked for the next batch."""
    import torch
    from transformers import Trainer, TrainingArguments

    rows = len(laid[0]["input_ids"])

    class Turning(Trainer):
        def get_train_dataloader(self):
            return Held(super().get_train_dataloader(), len(laid), turns)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).mean()

    windows = [{key: value[i] for key, value in batch.items()} for batch in laid for i in range(rows)]
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=rows, use_cpu=True, num_train_epochs=10**6,
        max_grad_norm=clip or 0.0, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, label_names=["targets"],
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer := optimizer_of(), lambda _: 1.0)
    Turning(model, settings, train_dataset=windows, optimizers=(optimizer, schedule)).train()


def _held(laid: list[Any], turns: Any) -> Iterator[Any]:
    while True:
        yield from Held(laid, len(laid), turns)


def _loop(model, optimizer, clip, batches, backward: Callable, clip_: Callable | None = None) -> None:
    import torch

    clip_ = clip_ or torch.nn.utils.clip_grad_norm_
    parameters = list(model.parameters())
    for batch in batches:
        loss = model(**batch).mean()
        backward(loss)
        if clip is not None:
            clip_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()


PEERS: dict[str, Callable[..., None]] = {
    "nanogpt": nanogpt, "lightning": lightning, "trainer": trainer, "accelerate": accelerate,
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] in PEERS:
        serve(Path(sys.argv[1]), sys.argv[2])
    else:
        main(sys.argv[1:])
