"""What users bring for the tasks: small data sets, models, and tasks of their own."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import dist_train
from dist_train.data.sets import Columns, Data, Samples
from dist_train.ranks.dist import gather_samples
from dist_train.tasks.base import Task

IGNORED, PADDING, WORDS = 255, -100, 7


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(root: str, download: bool, n: int = 16, n_test: int = 11, k: int = 2) -> Data:
    """Ten numbers of a sample, and k to be found; k = 0 is one without a dimension."""
    g = drawn()
    inputs = torch.randn(n + n_test, 10, generator=g)
    targets = torch.tanh(inputs @ torch.randn(10, max(k, 1), generator=g)) * 3 + 1
    targets = targets if k else targets[:, 0]
    splits = [Columns((inputs[some], targets[some])) for some in (slice(0, n), slice(n, None))]
    return Data(*splits, input_shape=(10,))


def labels(root: str, download: bool, n: int = 16, n_test: int = 11) -> Data:
    """Ten numbers, and three labels as integers."""
    data = numbers(root, download, n, n_test, 3)
    splits = [Columns((split.tree[0], (split.tree[1] > 1).long())) for split in (data.train, data.test)]
    return Data(*splits, input_shape=(10,), classes=tuple("abc"))


def classed(root: str, download: bool, n: int = 16, n_test: int = 11) -> Data:
    """Ten numbers, and one of four classes, of which the last is to be left out."""
    data = numbers(root, download, n, n_test, 4)
    splits = [Columns((split.tree[0], split.tree[1].argmax(1))) for split in (data.train, data.test)]
    return Data(*splits, input_shape=(10,), classes=tuple("abcd"))


def masks(root: str, download: bool, n: int = 16, n_test: int = 11, files: bool = False) -> Data:
    """Pictures 4x6 whose pixels are of three classes, or of none."""
    g = drawn(1)
    pictures = torch.randn(n + n_test, 2, 4, 6, generator=g)
    truth = (pictures.sum(1) > 0).to(torch.uint8) + (pictures[:, 0] > 1).to(torch.uint8)
    truth[(torch.rand(truth.shape, generator=g) < 0.3) & (torch.arange(n + n_test) % 3 == 0).view(-1, 1, 1)] = IGNORED
    pairs = [(pictures[some], truth[some]) for some in (slice(0, n), slice(n, None))]
    splits = [Samples(list(zip(*pair, strict=True))) if files else Columns(pair) for pair in pairs]
    return Data(*splits, input_shape=(2, 4, 6), classes=("sky", "sea", "land"))


class Pixels(nn.Module):
    """Its outputs are in a dict, as torchvision's models for segmentation have them."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, classes, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.body(x)}


class OwnLoss(nn.Module):
    """It returns its loss itself, and takes its input and target by name."""

    def __init__(self, input_shape):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(input_shape[0], 12), nn.Tanh(), nn.Linear(12, 2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=F.mse_loss(self.body(x), y))


class Wide(nn.Sequential):
    """It gives as many numbers as it is asked for."""

    def __init__(self, outputs: int):
        super().__init__(nn.Linear(10, outputs))


class Wrong(nn.Module):
    """Its outputs have the shape that is asked for."""

    def __init__(self, shape: list[int]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(len(x), *self.weight.shape)


# -- padded sequences: units that differ by sample ---------------------------------------------------------------------


def padded(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=PADDING)
    return {"tokens": tokens[:, :-1], "next": tokens[:, 1:]}


def sentences(root: str, download: bool, n: int = 16, n_test: int = 11) -> Data:
    """Sentences of 2 to 9 words."""
    g = drawn(2)
    made = []
    for _ in range(n + n_test):
        length = int(torch.randint(2, 10, (), generator=g))
        first = torch.randint(WORDS, (1,), generator=g)
        made.append((first + torch.arange(length) * (1 + first % 2)) % WORDS)
    splits = [Samples(made[some], collate=padded, draws=False) for some in (slice(0, n), slice(n, None))]
    return Data(*splits, facts={"vocab_size": WORDS})


class Words(nn.Module):
    """Logits of the next word, of the one before alone."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(tokens.clamp(min=0))))


class NextWord(Task):
    """The mean over words, of which a sentence has any number."""

    def units(self, batch):
        return (batch["next"] != PADDING).sum()

    def sums(self, model, batch):
        logits, targets = model(batch["tokens"]).flatten(0, 1), batch["next"].flatten()
        right = (logits.argmax(1) == targets).sum()
        return {"loss": F.cross_entropy(logits, targets, ignore_index=PADDING, reduction="sum"), "right": right}

    def metrics(self, sums):
        return super().metrics(sums) | {"accuracy": float(sums["right"] / sums["units"])}


class PerSample(NextWord):
    """A fault: what is counted is not what the loss is summed over."""

    def units(self, batch):
        return len(batch["next"])


# -- contrastive -------------------------------------------------------------------------------------------------------


class Contrastive(Task):
    """Each sample is to be nearest to its own second view, among those of the whole batch."""

    mixes_samples = True

    def sums(self, model, batch):
        inputs, _ = batch
        views = torch.stack([inputs, inputs.roll(1, 1)], 1).flatten(0, 1)
        found = F.normalize(model(views).view(len(inputs), 2, -1), dim=2)[: len(batch)]
        everyone, before = gather_samples(found, len(batch))
        logits = found[:, 0] @ everyone[:, 1].T * 5
        own = torch.arange(before, before + len(batch), device=logits.device)
        loss = F.cross_entropy(logits, own, reduction="sum")
        return {"loss": loss, "right": (logits.argmax(1) == own).sum()}

    def metrics(self, sums):
        return super().metrics(sums) | {"accuracy": float(sums["right"] / sums["units"])}


# -- six lines, and what may go wrong in them --------------------------------------------------------------------------


class Classify(Task):
    def sums(self, model, batch):
        inputs, targets = batch
        logits = model(inputs)
        return {"loss": F.cross_entropy(logits, targets, reduction="sum"), "right": (logits.argmax(1) == targets).sum()}

    def metrics(self, sums):
        return super().metrics(sums) | {"accuracy": float(sums["right"] / sums["units"])}


class Broken(Classify):
    """It fails at `at`."""

    def __init__(self, at: str):
        self.at = at

    def fail(self, at: str):
        if self.at == at:
            raise KeyError("mine")

    def units(self, batch):
        self.fail("units")
        return [3, 4] if self.at == "no number" else len(batch)

    def sums(self, model, batch):
        self.fail("training" if model.training else "evaluation")
        return {"loss": model(batch[0])} if self.at == "no loss" else super().sums(model, batch)


class BrokenModel(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.layer = nn.Linear(10, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[:, 0].no_such_thing


class NotATask:
    pass


class Shown(Classify):
    """It has panels: what it is asked for, and of which samples."""

    def __init__(self, what: str = "good", classes: int = 0):
        self.what, self.classes = what, classes

    def sums(self, model, batch):
        found = super().sums(model, batch)
        return found if model.training else found | {"true": F.one_hot(batch.tree[1], self.classes).sum(0)}

    def panels(self, sums, data):
        rows = list(zip(data.classes, sums["true"], strict=True))
        table = dist_train.Table("Samples of a class", ["class", "samples"], rows, "of the test split")
        bars = {"data": [{"type": "bar", "x": list(data.classes), "y": sums["true"]}], "layout": {}}
        wrong = {
            "no list": None, "no panel": [rows], "no figure": [dist_train.Plot("bars", 3)],
            "no traces": [dist_train.Plot("bars", {"data": {"y": 1}})],
            "an object": [dist_train.Plot("bars", {"data": [{"y": self}]})],
            "short rows": [dist_train.Table("t", ["a", "b"], [[1, 2], [3]])],
            "a cell": [dist_train.Table("t", ["a"], [[sums["true"]]])],
            "twice": [table, table], "no title": [dist_train.Table("", [], [])],
        }  # fmt: skip
        if self.what == "raises":
            raise KeyError("mine")
        return wrong[self.what] if self.what in wrong else [table, dist_train.Plot("Bars", bars)]
