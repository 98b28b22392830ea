"""Folders for transformers: what it makes of them is the model; they start a run; and the checks can fail."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint import weights
from dist_train.config.load import dump, load
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokenizers import Bytes, Characters
from dist_train.errors import ConfigError
from dist_train.models.generation import Sampling
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.tools import export, export_hf, generate

from language_models import LINES, SIZES, chats_in, config, run_of
from zygote import Run, Zygote

CPU = torch.device("cpu")


def exported(folder: Path, *argv: str) -> int:
    return export.run(["--run.dir", str(folder), "--format", "hf", *argv], Launcher())


@pytest.mark.parametrize(("tokenizer", "tied"), [("bytes", True), ("characters", False)])
def test_transformers_gets_the_model(
    tokenizer: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not tied:
        monkeypatch.setattr(export_hf, "SHARD_BYTES", 20_000)
    folder = run_of(tmp_path / "run", config(tmp_path, tokenizer=tokenizer, tied=tied))
    assert exported(folder) == 0
    told = json.loads(capsys.readouterr().out)
    path = Path(told["folder"])
    assert path == folder / "hf" and told["verified"]["largest_relative_difference"] < 1e-5
    shards = sorted(file.name for file in path.glob("model*"))
    assert len(shards) > 3 if not tied else shards == ["model.safetensors"]
    named = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in path.iterdir()} == {*named, *shards}
    theirs, state = AutoModelForCausalLM.from_pretrained(path), torch.load(folder / "weights.pt")
    assert theirs.config.tie_word_embeddings == tied and ("lm_head.weight" in state) != tied
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in state.items())
    tokens = AutoTokenizer.from_pretrained(path)
    assert (tokens.eos_token_id, theirs.generation_config.eos_token_id) == ((256, 256) if tied else (None, None))

    # and another run starts there, with nothing said of its sizes
    cell = config(tmp_path, f"--model.init_from={path}", tokenizer=tokenizer)
    cell = dataclasses.replace(cell, model=dataclasses.replace(cell.model, args={}))
    parts = assemble.build(cell, CPU)
    assert all(torch.equal(parts.model.state_dict()[name], value) for name, value in state.items())
    assert f"{len(state)} of {len(state)} tensors loaded" in parts.loaded[0]

    with pytest.raises(ConfigError, match="--output: got .*hf, which is there, expected a new folder"):
        exported(folder)


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters("".join(sorted(set(LINES))))], ids=["bytes", "characters"])
def test_transformers_gets_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(3)
    texts = [LINES, " two  spaces\n\n", ""]
    if isinstance(tokenizer, Bytes):
        codes = torch.randint(1, 0x10FFFF, (20, 50), generator=draw).tolist()
        texts += ["".join(chr(code) for code in row if not 0xD800 <= code < 0xE000) for row in codes]
        texts += [bytes(range(128)).decode()]
    else:
        rows = torch.randint(0, tokenizer.vocab_size, (20, 50), generator=draw).tolist()
        texts += [tokenizer.decode(row) for row in rows]
        texts = [text for text in texts if set(text) <= set(tokenizer.vocabulary)]
    for text in texts:
        numbers = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == numbers
        assert theirs.decode(numbers) == tokenizer.decode(numbers) == text


@pytest.mark.parametrize("planted", ["weight", "theta", "tokenizer"])
def test_the_check_can_fail(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = run_of(tmp_path / "run", config(tmp_path))
    before, write = sorted(folder.iterdir()), export_hf.write

    def wrong(parts: assemble.Parts, path: Path) -> torch.nn.Module:
        model = write(parts, path)
        if planted == "weight":
            export_hf._save({k: v + 1e-3 for k, v in model.state_dict().items()}, path)
        elif planted == "theta":
            told = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(told | {"rope_parameters": {"rope_theta": 1e4}}))
        else:
            Characters("".join(sorted(set(LINES)))).save(path)
        return model

    monkeypatch.setattr(export_hf, "write", wrong)
    assert exported(folder) == 1
    said = capsys.readouterr()
    what = "has other tokens for the text" if planted == "tokenizer" else "gives logits that differ by"
    assert said.out == "" and f"export: transformers {what}" in said.err
    assert sorted(folder.iterdir()) == before


def test_a_model_of_transformers_and_one_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoModelForCausalLM

    for name, args in (("lora", {}), ("gpt2", {})):
        cell = config(tmp_path)
        model = dataclasses.replace(cell.model, name=f"language_models:{name}", args=args)
        folder = run_of(tmp_path / name, dataclasses.replace(cell, model=model))
        assert exported(folder) == 0
        theirs = AutoModelForCausalLM.from_pretrained(json.loads(capsys.readouterr().out)["folder"])
        assert not [key for key in theirs.state_dict() if "lora" in key]


def test_another_model_is_refused(tmp_path: Path):
    (tmp_path / "run").mkdir()
    cell = load(["--data.name=synthetic", "--data.args.shape=[1,6,6]", "--model.hidden=[4]"])
    (tmp_path / "run" / "config.yaml").write_text(dump(cell))
    weights.save_weights(tmp_path / "run", assemble.build(cell, CPU).model.state_dict())
    with pytest.raises(ConfigError, match="--format: got hf for MLP, expected model.name decoder or a model of"):
        exported(tmp_path / "run")


@pytest.mark.parametrize(
    ("told", "args", "said"),
    [
        ({"model_type": "mamba"}, {}, "got .*, whose model_type is mamba, expected llama"),
        ({"hidden_act": "gelu"}, {}, "hidden_act is gelu, expected silu"),
        ({"attention_bias": True}, {}, "attention_bias is True, expected False"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, {}, "rope_type is llama3, expected default"),
        ({}, {"layers": 3}, "model.args.layers: got 3, but .* has 2"),
        ({"vocab_size": 99}, {}, "vocab_size"),
    ],
)
def test_a_folder_that_the_decoder_is_not_is_refused(told: dict, args: dict, said: str, tmp_path: Path):
    parts = assemble.build(config(tmp_path), CPU)
    export_hf.write(parts, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    cell = config(tmp_path, f"--model.init_from={tmp_path / 'hf'}")
    cell = dataclasses.replace(cell, model=dataclasses.replace(cell.model, args=args))
    with pytest.raises(ConfigError, match=said):
        assemble.build(cell, CPU)


def test_a_chat_is_trained_on_several_ranks_answered_and_exported(
    zygote: Zygote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With the tokenizer's template everywhere the same."""
    from transformers import AutoTokenizer

    chats_in(tmp_path)
    told = ["data.root", str(tmp_path), "data.args.files", "chats.jsonl", "data.args.tokenizer", "tokenizer.json"]
    told += ["data.name", "text", "data.args.format", "chat", "data.args.packing", "packed", "data.args.block", "48"]
    told += ["model.name", "decoder", "model.args", json.dumps(SIZES), "task.name", "language_modelling"]
    told += ["train.max_steps", "3", "train.global_batch_size", "4", "run.dir", str(tmp_path / "run")]
    options = [f"--{word}" if i % 2 == 0 else word for i, word in enumerate(told)]
    zygote.run(Run([*options, "--backend.name", "ddp"], 2))[0].check()

    assert exported(tmp_path / "run") == 0
    folder = json.loads(capsys.readouterr().out)["folder"]
    question = [{"role": "user", "content": "1+1"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(question, add_generation_prompt=True)
    config = load(["--config", str(tmp_path / "run" / "config.yaml"), "--backend.name", "single"])
    writer = generate.writer_of(tmp_path / "run", config, chats=True)
    assert list(theirs["input_ids"]) == writer.tokens_of("1+1", "--prompt")

    argv = ["--run.dir", str(tmp_path / "run"), "--prompt", "1+1", "--tokens", "4", "--temperature", "0"]
    assert generate.run(argv, Launcher()) == 0
    answer = capsys.readouterr().out
    pieces = writer.write([writer.tokens_of("1+1", "")], 4, Sampling(0))
    assert answer == "".join(piece for (piece,) in pieces) + "\n"
    assert generate.run([*argv, "--format", "text"], Launcher()) == 0
    assert capsys.readouterr().out.startswith("1+1")
    with pytest.raises(ConfigError, match="--format: got unknown format 'x', expected one of text, chat"):
        generate.run([*argv, "--format", "x"], Launcher())


def test_a_run_that_began_there_goes_on_without_the_folder(zygote: Zygote, tmp_path: Path):
    cell = config(tmp_path)
    folder = tmp_path / "hf"
    export_hf.write(assemble.build(cell, CPU), folder)
    told = dataclasses.replace(cell, model=dataclasses.replace(cell.model, args={}, init_from=str(folder)))
    told = dataclasses.replace(told, run=dataclasses.replace(told.run, dir=str(tmp_path / "run")))
    (tmp_path / "start.yaml").write_text(dump(told))
    every = ["--train.max_steps", "6", "--checkpoint.every_steps", "2"]
    argv = ["--config", str(tmp_path / "start.yaml"), *every, "--train.max_time_s", "0.01"]
    (stopped,) = zygote.run(Run(argv))
    assert stopped.codes == [75]
    shutil.rmtree(folder)
    again = ["--config", str(tmp_path / "run/config.yaml"), "--run.dir", str(tmp_path / "run")]
    (ended,) = zygote.run(Run([*again, "--train.max_time_s", "null"]))
    assert "resume" in (tmp_path / "run/metrics.jsonl").read_text() and "6 steps" in ended.check().out[0]
