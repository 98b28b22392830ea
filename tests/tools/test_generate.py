"""What a language model writes: how tokens are chosen, each computed once, alone and in a batch, and in a run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.config.load import dump, load
from dist_train.data.tokenizers import Bytes, Characters
from dist_train.errors import ConfigError
from dist_train.models.decoder import Decoder
from dist_train.models.generation import Sampling, reader_of, written
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.run.writing import Stream, Writer
from dist_train.tasks.base import tensor_of
from dist_train.tools import generate

from language_models import lora
from zygote import Run, Zygote

CPU = torch.device("cpu")
GREEDY = Sampling(0)
LINES = "the quick brown fox jumps over a lazy dog. naïve café owners smile, said Ünal — once more.\n"
ARGV = (
    *("--data.name", "text", "--data.args.files", "corpus.txt", "--data.args.block", "16", "--task.name"),
    *("language_modelling", "--model.name", "decoder", "--optim.name", "AdamW", "--optim.lr", "0.01"),
    *("--model.args", "{layers: 2, width: 16, heads: 2, kv_heads: 1, mlp_width: 16}", "--model.dropout", "0.1"),
    *("--train.global_batch_size", "6", "--train.max_steps", "7", "--train.device", "cpu", "--train.threads", "1"),
)
SAMPLE = "[{name: SampleText, every_steps: 3, prompt: 'the ', tokens: 30}]"


def started(folder: Path, name: str, *more: str, backend: str = "single", ranks: int = 1, hooks: str = SAMPLE) -> Run:
    (folder / "corpus.txt").write_text(LINES * 20)
    argv = [*ARGV, "--data.root", str(folder), "--backend.name", backend, "--run.dir", str(folder / name), *more]
    return Run([*argv, "--train.hooks", hooks] if hooks else argv, ranks)


@pytest.fixture(scope="module")
def trained(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    zygote.run(started(folder, "run"))[0].check()
    (folder / "corpus.txt").unlink()  # the run has all that is needed
    return folder / "run"


class Counted(nn.Module):
    """Counts the tokens of each call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, input_ids: torch.Tensor, **more: object) -> torch.Tensor:
        self.calls.append(input_ids.shape[1])
        return self.model(input_ids=input_ids, **more)


def decoder(block: int = 64, seed: int = 1) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(257, block, layers=2, width=32, heads=4, kv_heads=2, mlp_width=32).eval()
    with torch.no_grad():  # texts that differ
        for value in model.parameters():
            value.mul_(4)
    return model


@torch.no_grad()
def rows_of(
    model: nn.Module, prompts: list[list[int]], count: int, context: int, sampling: Sampling
) -> list[list[int]]:
    reader = reader_of(model, model, CPU, tensor_of)
    steps = list(written(reader, prompts, count, context, sampling))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def recomputed(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The most probable tokens, with all of the text computed for each."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row.append(int(tensor_of(model(input_ids=torch.tensor([row])))[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, which asks transformers by an old name
@pytest.mark.parametrize("kind", ["decoder", "gpt2", "lora", "own"])
def test_greedy_text_is_what_the_whole_text_gives(kind: str):
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [3]]
    model: nn.Module = decoder()
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    elif kind == "lora":
        model = lora(257, 64).eval()
    elif kind == "own":
        inner = model

        class Own(nn.Module):
            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                return inner(input_ids)

        model = Own()
    assert rows_of(model, prompts, 12, 64, GREEDY) == [recomputed(model, prompt, 12) for prompt in prompts]


def test_each_token_is_computed_once():
    model = decoder()
    counted = Counted(model)
    reader = reader_of(model, counted, CPU, tensor_of)
    with torch.no_grad():
        assert len(list(written(reader, [[1] * 9, [2] * 4], 20, 64, GREEDY))) == 25
    assert counted.calls == [4] + [1] * 24
    counted.calls.clear()
    with torch.no_grad():
        list(written(reader, [[1] * 5], 40, 16, GREEDY))  # past what it sees at once: half of it is read again
    assert counted.calls == [5] + [1] * 11 + 3 * [8, *[1] * 8] + [8]


def test_a_text_is_the_same_alone_and_in_a_batch():
    model, warm = decoder(), Sampling(1.0, seed=3)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [5, 6, 7], [3]]
    together = rows_of(model, prompts, 40, 16, warm)
    assert [rows_of(model, [prompts[i]], 40, 16, warm)[0] for i in (0, 1, 3)] == [together[i] for i in (0, 1, 3)]
    assert together[2] != together[0]  # an equal prompt has another text
    assert rows_of(model, prompts[:1], 40, 16, Sampling(1.0, seed=4))[0] != together[0]


def test_tokens_are_chosen_by_their_probabilities():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    grid = [(i + 0.5) / 2000 for i in range(2000)]

    def shares(sampling: Sampling) -> object:
        found = sampling.chosen(logits.expand(len(grid), 4), grid)
        return pytest.approx([found.count(token) / len(grid) for token in range(4)], abs=0.001)

    assert shares(Sampling()) == [0.1, 0.5, 0.15, 0.25]
    assert shares(Sampling(top_k=2)) == [0, 0.667, 0, 0.333]
    assert shares(Sampling(top_p=0.74)) == [0, 0.667, 0, 0.333]
    assert shares(Sampling(top_p=0.76)) == [0, 0.556, 0.167, 0.278]
    assert shares(Sampling(top_p=0.01)) == [0, 1, 0, 0] and shares(Sampling(0)) == [0, 1, 0, 0]
    assert shares(Sampling(0.5)) == [0.029, 0.725, 0.065, 0.181]
    draws = [Sampling(seed=1).draw(b"a", i) for i in range(2000)]
    assert (
        abs(sum(draws) / 2000 - 0.5) < 0.02 and len(set(draws)) == 2000 and Sampling(seed=2).draw(b"a", 0) != draws[0]
    )
    for wrong in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: got"):
            Sampling(**wrong)


def test_a_character_is_said_when_it_is_whole():
    stream, tokens = Stream(Bytes()), Bytes().encode("aé—🙂").tolist()
    assert [stream.add(token) for token in tokens] == ["a", "", "é", "", "", "—", "", "", "", "🙂"]
    assert [stream.add(token) for token in (0xC3, 0x41, 0xC3)] == ["", "\ufffdA", ""] and stream.rest() == "\ufffd"


def test_a_prompt_that_is_none_is_one_line():
    model = decoder(16)
    writer = Writer(model, model, Characters("abc"), 16, CPU)
    assert writer.tokens_of("cab", "--prompt") == [2, 0, 1]
    for prompt, said in (("abé", "knows no 'é'"), ("", "expected some text"), ("a" * 17, "of 17 tokens")):
        with pytest.raises(ConfigError, match=f"--prompt: got '.*{said}"):
            writer.tokens_of(prompt, "--prompt")
    assert Writer(model, model, Bytes(), 16, CPU).tokens_of("", "--prompt") == [256]


def test_the_command_writes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told = ["--run.dir", str(trained), "--tokens", "20"]
    assert generate.run([*told, "--prompt", "the "], Launcher()) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("the ") and len(alone) > 10
    (tmp_path / "prompts.txt").write_text("a lazy fox\nthe \n")
    assert generate.run([*told, "--prompts", str(tmp_path / "prompts.txt")], Launcher()) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a lazy fox", "the "] and f"the {lines[1]['text']}\n" == alone
    assert generate.run([*told, "--prompt=the ", "--seed", "1", "--which", "final"], Launcher()) == 0
    assert capsys.readouterr().out != alone


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--run.dir", "nope"], "run.dir: got nope, expected the folder of a finished run"),
        (["--tokens", "x"], "--tokens: got 'x', expected a whole number from 0"),
        (["--prompt"], "generate: got --prompt without a value"),
        (["--temperature", "-1"], "temperature: got -1.0, expected a number from 0"),
        (["--prompt", "a" * 17], "--prompt: got 'aaaaaaaaaaaaaaaaa' of 17 tokens, expected at most 16"),
        (["--prompts", "nope.txt"], "--prompts: got nope.txt, expected a text file"),
        (["--which", "best"], "--which: got best, but"),
    ],
)
def test_a_bad_option_is_one_line(argv: list[str], said: str, trained: Path):
    with pytest.raises(ConfigError) as caught:
        generate.run(["--run.dir", str(trained), *argv], Launcher())
    (line,) = caught.value.lines
    assert line.startswith(said)


def test_a_run_that_is_no_language_model_is_one_line(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(dump(load([])))
    with pytest.raises(ConfigError, match="a run of data.name digits without a tokenizer, expected that of a language"):
        generate.run(["--run.dir", str(tmp_path)], Launcher())


COMPILE_S = 200.0  # with an empty cache
FULL_CELLS = [("ddp", 2, ()), ("accelerate", 2, ()), ("single", 1, ("--compile.mode", "default"))]
FULL_CELLS += [("deepspeed", 2, ("--backend.zero_stage", stage)) for stage in ("1", "3")]


@pytest.mark.parametrize(
    ("backend", "ranks", "more"),
    [("single", 1, ()), ("fsdp2", 2, ()), *(pytest.param(*cell, marks=pytest.mark.full) for cell in FULL_CELLS)],
)
def test_a_run_shows_samples_and_is_not_changed(
    backend: str, ranks: int, more: tuple[str, ...], zygote: Zygote, tmp_path: Path
):
    both = [
        started(tmp_path, name, *more, backend=backend, ranks=ranks, hooks=h) for name, h in (("a", SAMPLE), ("b", ""))
    ]
    both = [dataclasses.replace(run, timeout_s=COMPILE_S) if "default" in more else run for run in both]
    (shown,) = zygote.run(both[0])
    zygote.run(both[1])[0].check()
    out = shown.check().out[0]
    assert [step for step in range(8) if f"-- step {step}: the " in out] == [3, 6, 7]
    with_hook, without = (torch.load(tmp_path / name / "weights.pt") for name in "ab")
    assert all(torch.equal(with_hook[name], without[name]) for name in without)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in "ab"]
    losses = [[json.loads(line).get("train/loss") for line in each] for each in lines]
    assert losses[0] == losses[1]


def test_the_hook_is_checked():
    for hooks, said in (
        ("[SampleTxt]", "expected SampleText or module:Class"),
        ("[{name: SampleText, promt: x}]", "got promt of SampleText"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(load(["--train.hooks", hooks]), Launcher(), writes=False)
