"""Windows of tokens: each target once, of its own document, by one plan for all ranks; and mixtures of sources."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config.load import load
from dist_train.data import packing
from dist_train.data.mixture import SLOTS, mixture
from dist_train.data.order import Plan, global_indices
from dist_train.data.packing import Packing
from dist_train.data.sets import Data, Gathered
from dist_train.data.tokenizers import Bytes
from dist_train.data.tokens import Tokens
from dist_train.data.windows import contiguous, packed, padded
from dist_train.errors import ConfigError
from dist_train.models.chunked_loss import IGNORED
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check

KINDS = {"contiguous": lambda tokens, block: contiguous(tokens, block, tail=True), "packed": packed, "padded": padded}
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)
blocks = st.integers(1, 24)


def corpus(sizes: list[int], shards: int = 1) -> Tokens:
    """Each token is its own number, so that a window says by itself which ones it has."""
    ends = np.cumsum(sizes)
    row = np.arange(ends[-1], dtype=np.uint32)
    return Tokens(np.array_split(row, shards), ends - sizes, f"{sizes}")


def expected(kind: str, sizes: list[int]) -> set[tuple[int, int]]:
    """All pairs of an input and its target, one by one."""
    pairs, at = set(), 0
    for document, size in enumerate(sizes):
        for place in range(size):
            last = place == size - 1
            if not last or (kind == "contiguous" and document < len(sizes) - 1):
                pairs.add((at, at + 1))
            at += 1
    return pairs


def faults(kind: str, sizes: list[int], block: int, batches: Iterator[dict[str, torch.Tensor]]) -> set[str]:
    """What is wrong with an epoch of windows, in words: token by token, and knowing nothing of how they are made."""
    found, seen = set(), Counter()
    starts = set(np.cumsum([0, *sizes]).tolist())
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            inputs, targets = batch["input_ids"][i].tolist(), batch["targets"][i].tolist()
            positions = batch["position_ids"][i].tolist() if kind == "packed" else list(range(block))
            if len(inputs) != block or len(targets) != block:
                found.add("shape")
            padding = False
            for place, (token, target, position) in enumerate(zip(inputs, targets, positions, strict=True)):
                if target == IGNORED:
                    if kind == "packed" and position != (positions[place - 1] + 1 if padding else 0):
                        found.add("positions of padding")
                    padding = True
                    continue
                if padding:
                    found.add("a hole")
                seen[token, target] += 1
                goes_on = place > 0 and token == inputs[place - 1] + 1 and (kind == "contiguous" or token not in starts)
                if kind == "packed" and (position == 0) == goes_on:
                    found.add("positions")
                if kind == "packed" and position and position != positions[place - 1] + 1:
                    found.add("positions")
    pairs = expected(kind, sizes)
    if set(seen) - pairs:
        found.add("wrong targets")
    if pairs - set(seen):
        found.add("missing targets")
    if any(count > 1 for count in seen.values()):
        found.add("targets twice")
    return found


def epoch(split: Gathered, batch: int = 7, seed: int = 0, number: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of an epoch, the last one smaller."""
    plan = Plan(len(split), seed, batch, None, False, 0, 1)
    return (split.gather(index) for index in plan.indices(number))


@settings(deadline=None, max_examples=60)
@given(sizes=lengths, block=blocks, shards=st.integers(1, 5), kind=st.sampled_from(sorted(KINDS)))
def test_each_target_counts_once_an_epoch(sizes: list[int], block: int, shards: int, kind: str):
    if not expected(kind, sizes):
        with pytest.raises(ConfigError, match="expected"):
            KINDS[kind](corpus(sizes), block)
        return
    split = KINDS[kind](corpus(sizes, shards), block)
    assert faults(kind, sizes, block, epoch(split)) == set()
    assert split.about.startswith(f"{len(split):,} windows of {block} tokens, {len(expected(kind, sizes)):,} targets")
    whole = split.gather(np.arange(len(split)))
    assert all(leaf.is_contiguous() and leaf.dtype == torch.int64 for leaf in whole.values())
    one = split.gather(np.array([len(split) - 1]))  # a window is the same in any batch
    assert all(torch.equal(one[name][0], whole[name][-1]) for name in whole)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2, 200), block=blocks)
def test_windows_follow_each_other(size: int, block: int):
    targets = np.concatenate([batch["targets"] for batch in [contiguous(corpus([size]), block, True).gather(
        np.arange(-(-(size - 1) // block)))]]).ravel()  # fmt: skip
    assert targets[targets != IGNORED].tolist() == list(range(1, size))
    if size <= block:
        with pytest.raises(ConfigError, match="data.args.block"):
            contiguous(corpus([size]), block)
    else:  # what is incomplete is left out
        split = contiguous(corpus([size]), block)
        assert len(split) == (size - 1) // block
        targets = split.gather(np.arange(len(split)))["targets"].numpy().ravel()
        assert targets.tolist() == list(range(1, len(split) * block + 1))


# -- planted faults: what the checks above must see --------------------------------------------------------------------

SIZES = [5, 17, 1, 9, 30, 2, 8, 8, 12, 3]
BLOCK = 8


def changed(split: Gathered, **change) -> Iterator[dict[str, torch.Tensor]]:
    for batch in epoch(split):
        yield batch | {name: how(batch) for name, how in change.items()}


def test_labels_off_by_one_are_seen():
    for kind, make in KINDS.items():
        split = make(corpus(SIZES), BLOCK)
        shifted = changed(split, targets=lambda batch: batch["targets"].roll(-1, 1))
        assert "wrong targets" in faults(kind, SIZES, BLOCK, shifted)
        unshifted = changed(split, targets=lambda batch: batch["input_ids"])
        assert "wrong targets" in faults(kind, SIZES, BLOCK, unshifted)


def test_padding_that_counts_is_seen():
    for kind in ("packed", "padded"):
        counted = changed(KINDS[kind](corpus(SIZES), BLOCK), targets=lambda batch: batch["targets"].clamp(min=0))
        assert "wrong targets" in faults(kind, SIZES, BLOCK, counted)


def test_positions_that_do_not_restart_are_seen():
    split = packed(corpus(SIZES), BLOCK)
    running = changed(split, position_ids=lambda batch: torch.arange(BLOCK).expand_as(batch["input_ids"]))
    assert faults("packed", SIZES, BLOCK, running) == {"positions", "positions of padding"}


def test_a_window_that_repeats_at_the_seam_of_epochs_is_seen():
    split = contiguous(corpus([401]), BLOCK, tail=True)

    def seam() -> Iterator[dict[str, torch.Tensor]]:
        batches = [global_indices(len(split), 0, 0, step, 7) for step in range(len(split) // 7)]
        filled = np.concatenate([batches.pop(), global_indices(len(split), 0, 1, 0, 7)])  # for a last one that is whole
        return (split.gather(index) for index in [*batches, filled])

    assert "targets twice" in faults("contiguous", [401], BLOCK, seam())


def test_packing_by_rank_is_seen():
    """Each rank's own documents in windows of its own: the targets are all there, but as other windows, which depend on
    the number of ranks."""
    sizes = np.random.default_rng(0).integers(2, 40, 200).tolist()
    tokens, whole = corpus(sizes), packed(corpus(sizes), BLOCK)
    shares = [np.arange(rank, 200, 2) for rank in range(2)]
    plans = [Packing.of(tokens.lengths[share], BLOCK) for share in shares]
    assert sum(plan.targets for plan in plans) == Packing.of(tokens.lengths, BLOCK).targets
    by_rank = {
        frozenset(share[documents].tolist())
        for share, plan in zip(shares, plans, strict=True)
        for documents, _, _ in [plan.pieces(np.array([number])) for number in range(plan.windows)]
    }
    plan = Packing.of(tokens.lengths, BLOCK)
    together = {frozenset(plan.pieces(np.array([number]))[0].tolist()) for number in range(len(whole))}
    assert by_rank != together
    assert any({number % 2 for number in documents} == {0, 1} for documents in together)


# -- the plan ----------------------------------------------------------------------------------------------------------


def slow_best_fit(pieces: list[int], block: int) -> Counter:
    """How many windows are filled how far, packed piece by piece."""
    filled: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [i for i, size in enumerate(filled) if size + piece <= block]
        if fitting:
            filled[max(fitting, key=filled.__getitem__)] += piece
        else:
            filled.append(piece)
    return Counter(filled)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=120), block=st.integers(1, 30))
def test_the_plan_is_best_fit_decreasing(sizes: list[int], block: int):
    plan = Packing.of(np.array([*sizes, 2]), block)
    targets = np.maximum(np.array([*sizes, 2]) - 1, 0)
    documents, runs, counts = plan.pieces(np.arange(plan.windows))
    held = np.where(runs == packing.REST, targets[documents] % block, block)
    rows = np.split(held, np.cumsum(counts)[:-1])
    slow = slow_best_fit([rest for rest in (targets % block).tolist() if rest], block)
    slow[block] += int((targets // block).sum())
    assert Counter(int(row.sum()) for row in rows) == +slow
    assert len(set(zip(documents.tolist(), runs.tolist(), strict=True))) == len(documents)
    assert plan.targets == held.sum() == targets.sum() and plan.windows >= -(-plan.targets // block)


def test_the_plan_wastes_little():
    """Against the fewest windows that could hold as much."""
    sizes = np.random.default_rng(1).lognormal(5.5, 1, 50_000).astype(np.int64) + 2
    plan = Packing.of(sizes, 1024)
    fewest = -(-int((sizes - 1).sum()) // 1024)
    assert plan.windows - fewest < 0.001 * fewest
    assert plan.rests.nbytes <= 4 * len(sizes)


def test_the_plan_is_the_same_in_another_process(tmp_path: Path):
    """Whatever order sets and dicts have there."""
    code = (
        "import hashlib, numpy as np\n"
        "from dist_train.data.packing import Packing\n"
        "plan = Packing.of(np.random.default_rng(2).integers(0, 900, 5000), 256)\n"
        "parts = plan.pieces(np.arange(plan.windows))\n"
        "print(hashlib.sha256(b''.join(part.tobytes() for part in parts)).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(said) == 1 and len(said.pop()) == 65


# -- any size ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def endless(tmp_path: Path) -> Tokens:
    """10^11 tokens in a file that is all hole but for its ends."""
    path, count = tmp_path / "tokens.bin", 10**11
    with path.open("wb") as file:
        file.write(np.arange(5, dtype=np.uint16).tobytes())
        file.truncate(2 * count)
        file.seek(2 * (count - 5))
        file.write(np.arange(5, dtype=np.uint16).tobytes())
    return Tokens([np.memmap(path, np.uint16, "r")], np.zeros(1, np.int64), "endless")


def test_a_hundred_billion_tokens_cost_no_more_than_few(endless: Tokens):
    tracemalloc.start()
    try:
        split = contiguous(endless, 64)
        mixed = mixture([split, contiguous(corpus([1000]), 64)], [0.9, 0.1])
        for some in (split, mixed):
            plan = Plan(len(some), 0, 12, None, False, 0, 1)
            batch = some.gather(next(plan.indices(3, 10**7)))
            assert batch["input_ids"].shape == (12, 64)
        assert split.gather(np.array([0]))["targets"][0, :4].tolist() == [1, 2, 3, 4]
        assert contiguous(endless, 64, True).gather(np.array([(10**11 - 1) // 64]))["targets"].max() == 4
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(split) == (10**11 - 1) // 64 and peak_bytes < 4 << 20


# -- mixtures ----------------------------------------------------------------------------------------------------------


def numbers(n: int, source: int) -> Gathered:
    """A split whose samples say which they are."""

    def gather(index: np.ndarray) -> dict[str, torch.Tensor]:
        assert ((index >= 0) & (index < n)).all()
        return {"source": torch.full((len(index),), source), "number": torch.from_numpy(index)}

    return Gathered(n, gather, f"{source} {n}")


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    data=st.data(),
)
def test_shares_are_exact_and_passes_are_whole(sizes: list[int], data: st.DataObject):
    weights = [data.draw(st.floats(0.05, 10)) for _ in sizes]
    mixed = mixture([numbers(n, i) for i, n in enumerate(sizes)], weights)
    rows = mixed.gather(np.arange(len(mixed)))
    shares = np.array(weights) / sum(weights)
    first = data.draw(st.integers(0, len(mixed) - 1))
    for source, n in enumerate(sizes):
        here = (rows["source"] == source).numpy()
        slack = len(here) / SLOTS + 2
        assert abs(here.sum() - shares[source] * len(here)) <= slack
        assert abs(here[first:].sum() - shares[source] * len(here[first:])) <= slack
        found = rows["number"].numpy()[here]
        assert len(found) >= n  # each is passed over
        for start in range(0, len(found), n):
            one = found[start : start + n]
            assert len(set(one)) == len(one)  # none comes again within its pass
        if n > 20 and len(found) >= 2 * n:
            assert found[:n].tolist() != found[n : 2 * n].tolist()
    shorter = mixture([numbers(n, i) for i, n in enumerate(sizes)], weights).gather(np.arange(first, len(mixed)))
    assert shorter["number"].tolist() == rows["number"][first:].tolist()  # it goes on anywhere
    assert any(n == (rows["source"] == source).sum() for source, n in enumerate(sizes)), "no longer than it must be"


def test_shares_hold_of_any_long_run():
    mixed = mixture([numbers(10**9, 0), numbers(7, 1), numbers(10**6, 2)], [0.7, 0.2, 0.1])
    for first in (0, 12_345, 10**8 + 1):
        source = mixed.gather(np.arange(first, first + 10_000))["source"]
        assert (torch.bincount(source) - torch.tensor([7000, 2000, 1000])).abs().max() <= 4


def test_a_mixture_of_windows_keeps_their_rows():
    splits = [packed(corpus([9, 30, 4]), 8), packed(corpus([25, 25, 40]), 8)]
    mixed = mixture(splits, [1, 3])
    shown = mixed.gather(np.arange(len(mixed)))
    for i in range(len(mixed)):
        alone = mixed.gather(np.array([i]))
        assert all(torch.equal(alone[name][0], shown[name][i]) for name in shown)
    assert mixed.identity != mixture(splits, [1, 2]).identity
    assert mixed.identity != mixture([splits[0], replace(splits[1], identity="other")], [1, 3]).identity


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, 1e-9]])
def test_a_weight_that_is_no_share_is_refused(weights: list[float]):
    with pytest.raises(ConfigError, match="data.args.sources"):
        mixture([numbers(5, 0), numbers(5, 1)], weights)


def test_a_window_is_described_by_its_documents():
    texts = ["To be, or not to be.", "That is the question", "Whether", "'tis nobler in the mind to suffer" * 4]
    rows = [np.array([*text.encode(), 256], np.uint16) for text in texts]
    tokens = Tokens([np.concatenate(rows)], np.cumsum([0, *map(len, rows[:-1])]), "verse")
    assert contiguous(tokens, 16, True, Bytes()).describe(1) == "document 0, tokens 16 to 32: ' be.That is the '"
    assert padded(tokens, 32, Bytes()).describe(2) == "document 2, tokens 0 to 7: 'Whether'"
    split = packed(tokens, 64, Bytes())
    told = [split.describe(number) for number in range(len(split))]
    assert (
        told[0].startswith("document 3, tokens 0 to 64: \"'tis nobler in the mind to suffer'tis")
        and told[0][-3:] == "..."
    )
    assert "document 2, tokens 0 to 7: 'Whether'" in "".join(told[2:])
    assert mixture([padded(tokens, 32)], [1]).describe(0).startswith("source 0, sample ")


# -- as a config has them ----------------------------------------------------------------------------------------------


def data_of(root: Path, **args) -> Data:
    config = load(["--data.name", "text", "--data.root", str(root), "--data.args", json.dumps(args)])
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)
    return assemble.read_data(config.data, False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    drawn = np.random.default_rng(3)
    for name, many in (("a.jsonl", 90), ("b.jsonl", 40)):
        lines = ["".join(drawn.choice(list("abcd "), drawn.integers(1, 60))) for _ in range(many)]
        (root / name).write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return root


def test_a_config_chooses_how_windows_are_made(texts: Path):
    made = {kind: data_of(texts, files="a.jsonl", block=32, packing=kind) for kind in KINDS}
    assert set(made["packed"].train.gather(np.arange(2))) == {"input_ids", "targets", "position_ids"}
    assert len({data.fingerprint() for data in made.values()}) == 3
    counts = {
        kind: int((data.train.gather(np.arange(len(data.train)))["targets"] != IGNORED).sum())
        for kind, data in made.items()
    }
    assert counts["packed"] == counts["padded"] < counts["contiguous"]
    assert len(made["packed"].train) < len(made["padded"].train)
    assert set(made["packed"].test.gather(np.arange(1))) == {"input_ids", "targets", "position_ids"}


def test_a_config_mixes_sources(texts: Path):
    sources = [{"files": "a.jsonl", "weight": 3}, {"files": "b.jsonl", "weight": 1}]
    data = data_of(texts, sources=sources, block=16, packing="packed")
    alone = [data_of(texts, files=one["files"], block=16, packing="packed") for one in sources]
    assert list(data.tests) == ["source_0", "source_1"]
    for split, one in zip(data.tests.values(), alone, strict=True):
        assert split.identity == one.test.identity
    rows = {tuple(row.tolist()) for row in data.train.gather(np.arange(len(data.train)))["targets"]}
    assert rows == {
        tuple(row.tolist()) for one in alone for row in one.train.gather(np.arange(len(one.train)))["targets"]
    }
    assert "75.0%" in data.train.about and "25.0%" in data.train.about


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"packing": "pack"}, "data.args.packing: got 'pack', expected contiguous, packed or padded"),
        ({"sources": "a"}, "data.args.sources: got 'a', expected a list"),
        ({"sources": [{"files": "a"}]}, "data.args.sources[0]: got keys ['files']"),
        ({"sources": [{"files": "a", "weight": 0}]}, "data.args.sources[0].weight: got 0"),
        ({"sources": [{"files": "missing", "weight": 1}]}, "data.args.sources[0].files: got missing"),
        ({"sources": [{"files": "a.jsonl", "weight": 1}], "files": "a"}, "data.args.files: got 'a' with data.args.sou"),
        ({"sources": [{"files": "a", "weight": 1}], "tokenizer": "characters"}, "data.args.tokenizer: got characters"),
    ],
)
def test_what_fits_no_mixture_is_refused(args: dict, said: str, texts: Path):
    with pytest.raises(ConfigError) as error:
        data_of(texts, **args)
    (line,) = error.value.lines
    assert line.startswith(said), line
