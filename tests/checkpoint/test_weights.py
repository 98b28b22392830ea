"""Weights in files: what is loaded, what is said, what is refused, and how much memory it takes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_train.checkpoint import weights
from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check
from dist_train.tools.agreement import difference
from dist_train.tools.finished import finished

from parity_cells import run_cells, run_single
from workers import run_ranks

SHAPE = ["--data.name=synthetic", "--data.args.n=64", "--data.args.n_test=8", "--data.args.shape=[6]"]
SMALL = [*SHAPE, "--model.hidden=[5]", "--train.device=cpu", "--optim.name=SGD", "--optim.lr=0.1"]
STEPS = ["--train.max_steps=20", "--train.global_batch_size=8", "--train.epochs=9", "--track.every_steps=1"]
CPU = torch.device("cpu")


def config(*argv: str) -> Config:
    return load([*SMALL, *argv])


def built(*argv: str) -> assemble.Parts:
    return assemble.build(config(*argv), CPU)


def drawn(seed: int = 1, *argv: str) -> weights.State:
    """Weights that a run does not start from by itself."""
    return built(f"--train.seed={seed}", *argv).model.state_dict()


def write_run(path: Path, state: weights.State) -> Path:
    path.mkdir()
    weights.save_weights(path, state)
    return path


def write_pt(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def write_safetensors(path: Path, state: weights.State) -> Path:
    save_file(state, path)
    return path


def same(model: nn.Module, state: weights.State) -> bool:
    return all(torch.equal(value, state[name].to(value.dtype)) for name, value in model.state_dict().items())


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        built(*argv)
    (line,) = caught.value.lines
    return line


# -- sources -----------------------------------------------------------------------------------------------------------

SOURCES: dict[str, tuple[str, Callable[[Path, weights.State], Path]]] = {
    "run": ("run", write_run),
    "pt": ("w.pt", write_pt),
    "pth-of-before-torch-1.6": (
        "w.pth",
        lambda path, s: (torch.save(s, path, _use_new_zipfile_serialization=False), path)[1],
    ),
    "model": ("w.pt", lambda path, s: write_pt(path, {"epoch": 3, "model": s, "optimizer": {"lr": 0.1}})),
    "state_dict": ("w.pt", lambda path, s: write_pt(path, {"state_dict": s})),
    "safetensors": ("w.safetensors", write_safetensors),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_its_weights(source: str, tmp_path: Path):
    name, write = SOURCES[source]
    state = drawn()
    path = write(tmp_path / name, state)
    parts = built(f"--model.init_from={path}", "--model.init_strict=true")
    assert parts.loaded == (f"model.init_from {path}: 4 of 4 tensors loaded",)
    assert same(parts.model, state) and not same(built().model, state)


@pytest.mark.parametrize(
    "wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "{0[0]}._orig_mod.{0[1]}"]
)
def test_names_of_wrappers_are_stripped(wrap: str, tmp_path: Path):
    state = drawn()
    wrapped = {wrap.format(name.split(".", 1) if "{0" in wrap else name): value for name, value in state.items()}
    path = write_pt(tmp_path / "w.pt", wrapped)
    parts = built(f"--model.init_from={path}", "--model.init_strict=true")
    assert same(parts.model, state)
    assert parts.loaded[0].endswith("4 of 4 tensors loaded, 4 of them without module. or _orig_mod. in their names")


def test_a_models_own_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    found = weights.match(model, {"module.weight": torch.ones(2, 2), "weight": torch.zeros(2, 2)})
    assert list(found.found) == ["module.weight"] and found.unexpected == ["weight"] and found.stripped == 0


# -- what fits ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_and_stays_as_drawn(tmp_path: Path):
    state = drawn()
    first, first_bias, last, last_bias = state
    given = {first: state[first], last: torch.zeros(7, 5), last_bias: torch.zeros(10, dtype=torch.int64)}
    given |= {f"more.{i}": torch.zeros(1) for i in range(12)}
    path = write_pt(tmp_path / "w.pt", given)
    parts = built(f"--model.init_from={path}")
    fresh = built().model.state_dict()
    got = parts.model.state_dict()
    assert torch.equal(got[first], state[first]) and not torch.equal(fresh[first], state[first])
    assert all(torch.equal(got[name], fresh[name]) for name in (first_bias, last, last_bias))
    more = ", ".join(f"more.{i}" for i in range(10))
    assert parts.loaded == (
        f"model.init_from {path}: 1 of 4 tensors loaded",
        f"1 not in the file: {first_bias}",
        f"12 not in the model: {more} and 2 more",
        f"2 of another shape or type: {last} (float32 [7, 5], the model has float32 [10, 5]), "
        f"{last_bias} (int64 [10], the model has float32 [10])",
    )
    strict = refusal(f"--model.init_from={path}", "--model.init_strict=true")
    assert strict.startswith(f"model.init_from: got {path}, of which 1 tensors fit the model; 1 not in the file: ")
    assert strict.endswith("write --model.init_strict false to load what fits")


def test_nothing_that_fits_is_refused(tmp_path: Path):
    path = write_pt(tmp_path / "w.pt", {"other": torch.zeros(3)})
    line = refusal(f"--model.init_from={path}")
    assert line.startswith(f"model.init_from: got {path}, of which nothing fits the model; 4 not in the file: ")


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float16), ("float64", torch.float32)])
def test_values_go_to_the_runs_type(precision: str, dtype: torch.dtype, tmp_path: Path):
    state = {name: value.to(dtype) for name, value in drawn().items()}
    path = write_safetensors(tmp_path / "w.safetensors", state)
    model = built(f"--model.init_from={path}", f"--train.precision={precision}").model
    assert {value.dtype for value in model.parameters()} == {getattr(torch, precision)}
    assert same(model, state)


# -- models that cannot take the tensors themselves --------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


class Hidden(nn.Module):
    """Tensors that no file has: a buffer that is not persistent, one in a list, one in a closure."""

    def __init__(self, kind: str):
        super().__init__()
        self.a = nn.Linear(3, 3)
        if kind == "buffer":
            self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        scale = torch.full((1,), 2.0)
        self.kept = [scale] if kind == "list" else (lambda: scale) if kind == "closure" else None


class Looks(nn.Module):
    """Its constructor reads values, which there are none of without memory."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, int(torch.tensor(3.0)))


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.a.bias.no_decay = True


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), True),
    "lstm": (lambda: nn.LSTM(3, 3), True),
    "frozen": (lambda: nn.Linear(3, 3).requires_grad_(False), True),
    "tied": (Tied, False),
    "buffer": (lambda: Hidden("buffer"), False),
    "list": (lambda: Hidden("list"), False),
    "closure": (lambda: Hidden("closure"), False),
    "looks": (Looks, False),
    "marked": (Marked, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_is_without_the_file(name: str):
    make, takes = MODELS[name]
    state = {key: value.clone() for key, value in make().state_dict().items()}
    model, found = weights.fill(make, torch.float32, state)
    assert not list(found.differences()) and same(model, state)
    taken = {value.data_ptr() for value in state.values()} == {
        value.data_ptr() for value in model.state_dict().values()
    }
    assert taken == takes
    fresh = make()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert [vars(p) for p in model.parameters()] == [vars(p) for p in fresh.parameters()]
    if name == "tied":
        assert model.a.weight is model.b.weight
    if name == "lstm":
        assert model(torch.ones(1, 1, 3))[0].shape == (1, 1, 3)
    if isinstance(model, Hidden):
        kept = {"buffer": lambda: model.scale, "list": lambda: model.kept[0], "closure": lambda: model.kept()}[name]()
        assert float(kept) == 2.0


def test_tensors_that_share_memory_in_the_file_are_apart_in_the_model(tmp_path: Path):
    one = torch.arange(9.0).view(3, 3)
    given = {"0.weight": one, "1.weight": one, "2.weight": one.t(), "3.weight": torch.ones(1).expand(3, 3)}
    path = write_pt(tmp_path / "w.pt", given)

    def make() -> nn.Module:
        return nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(4)])

    model, _ = weights.fill(make, torch.float32, weights.read(path))
    with torch.no_grad():
        for i in range(4):
            assert torch.equal(model[i].weight, given[f"{i}.weight"])
            model[i].weight.fill_(-1.0)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Code:
    """A pickle that runs a command where it is loaded."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(zipped: bool, tmp_path: Path):
    ran, path = tmp_path / "ran", tmp_path / "w.pt"
    torch.save({**drawn(), "x": Code(f"touch {ran}")}, path, _use_new_zipfile_serialization=zipped)
    line = refusal(f"--model.init_from={path}")
    assert line.startswith(f"model.init_from: got {path}, which holds posix.system beside tensors; nothing of it was ")
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the file is no threat, so the test shows nothing"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(drawn()["layers.1.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("w.pt", lambda p: p.write_bytes(b""), "which is damaged"),
        ("w.pt", lambda p: p.write_bytes(b"not weights"), "which is damaged"),
        ("w.pt", lambda p: p.write_bytes(p.read_bytes()[:1500]), "which is damaged"),
        ("w.pt", flip_a_byte, "does not have its checksum"),
        ("w.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9]), "which is damaged"),
        (
            "w.pt",
            lambda p: torch.save([torch.ones(1)], p),
            "which holds something of type list, expected tensors by name",
        ),
        ("w.pt", lambda p: torch.save({"model": {}}, p), "which holds 0 entries, expected tensors by name"),
        (
            "w.pt",
            lambda p: torch.save({"a": torch.ones(1), "n": 3}, p),
            "where 'n' is something of type int, expected tensors",
        ),
        ("w.pt", lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p), "where 'a' is a torch.sparse_coo tensor"),
        ("w.pt", lambda p: torch.save(nn.Linear(2, 2), p), "which holds torch.nn.modules.linear.Linear beside tensors"),
    ],
)
def test_a_file_that_is_not_weights_is_one_line(name: str, damage: Callable, said: str, tmp_path: Path):
    path = tmp_path / name
    (write_pt if name.endswith("pt") else write_safetensors)(path, drawn())
    damage(path)
    line = refusal(f"--model.init_from={path}")
    assert line.startswith(f"model.init_from: got {path}, ") and said in line and len(line) < 400


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model.init_from=nope.pt"], "model.init_from: got 'nope.pt', which is not there; expected the folder"),
        (["--model.init_from="], "model.init_from: got '', which is not there"),
        (
            ["--model.init_from=empty"],
            "model.init_from: got empty, a folder without weights.pt and without checkpoints; expected",
        ),
        (
            ["--model.init_from=w.bin"],
            "model.init_from: got w.bin, expected the folder of a run",
        ),
        (["--model.init_strict=true"], "model.init_strict: got true without model.init_from"),
    ],
)
def test_a_bad_option_is_one_line(argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("w.bin").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        check(load(argv), Launcher())
    (line,) = caught.value.lines
    assert line.startswith(said)


# -- a run -------------------------------------------------------------------------------------------------------------


def start(cwd: Path, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dist_train", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_a_run_starts_from_a_file_leaves_it_alone_and_then_does_without_it(tmp_path: Path):
    path = write_pt(tmp_path / "w.pt", {f"module.{name}": value for name, value in drawn().items()})
    before = path.read_bytes()
    done = start(tmp_path, *SMALL, *STEPS, "--run.dir=run", "--model.init_from=w.pt")
    assert done.returncode == 0, done.stderr
    assert "model.init_from w.pt: 4 of 4 tensors loaded, 4 of them without module." in done.stdout
    assert path.read_bytes() == before
    path.unlink()
    own = weights.load_weights(tmp_path / "run")
    assert not torch.equal(own["layers.1.weight"], drawn()["layers.1.weight"]), "it did not train"
    again = start(tmp_path, "eval", "--run.dir", "run")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["eval/loss"] == json.loads((tmp_path / "run/summary.json").read_text())["eval/loss"]
    run = ["--run.dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match="but eval takes the weights of the run; leave it out"):
        finished([*run, "--model.init_from=w.pt"], "eval")
    with pytest.raises(ConfigError, match="model: got another model than the one in .*: 3 of another shape or type: "):
        assemble.build(finished([*run, "--model.hidden=[4]"], "eval")[1], CPU, trained=tmp_path / "run")


def test_every_backend_trains_on_from_mapped_weights(tmp_path: Path):
    """The weights of all ranks are views of one file, which the libraries cut up, move and write to."""
    path = write_safetensors(tmp_path / "w.safetensors", drawn())
    before = path.read_bytes()
    argv = [*STEPS, f"--model.init_from={path}", "--model.init_strict=true", "--model.activation=Tanh"]
    alone = run_single(config(*argv, "--backend.name=single"))
    backends = (["ddp"], ["fsdp2"], ["accelerate"], ["deepspeed", "--backend.zero_stage=3"])
    cells = [config(*argv, f"--backend.name={backend[0]}", *backend[1:]) for backend in backends]
    for ran in run_ranks(run_cells, 2, cells)[0]:
        assert difference(ran, alone).worst < 1e-5
    assert path.read_bytes() == before


# -- memory ------------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import torch
from dist_train.run import assemble
from dist_train.config.load import load

folder, *argv = sys.argv[1:]
def model(*more):  # without the gradients of a first look at it
    config = load([*argv, *more])
    return assemble.build_model(config, assemble.read_data(config.data, False), torch.float32, warm=True)[0]
def peak():  # bytes; not ru_maxrss, which begins with that of the process that started this one
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
def used(model):
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(0.5)  # every page is read and written
    return (peak() - before) / sum(value.nbytes for value in model.parameters())
torch.save(model("--model.hidden=[8]").state_dict(), folder + "/small.pt")
model("--model.hidden=[8]", f"--model.init_from={folder}/small.pt")  # all is imported
before = peak()
print(used(model(f"--model.init_from={folder}/large.pt")))
naive = model()
naive.load_state_dict(torch.load(folder + "/large.pt", weights_only=True))
print(used(naive))
"""


def test_loading_takes_the_memory_of_one_model(tmp_path: Path):
    """In copies of a model of 400 MB, the growth of a fresh process's peak."""
    shapes = {
        "layers.1.weight": (10000, 6), "layers.1.bias": (10000,), "layers.3.weight": (10000, 10000),
        "layers.3.bias": (10000,), "layers.5.weight": (10, 10000), "layers.5.bias": (10,),
    }  # fmt: skip
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "large.pt")
    argv = [*SHAPE, "--model.hidden=[10000,10000]", "--train.device=cpu"]
    command = [sys.executable, "-c", PEAK, str(tmp_path), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (tmp_path / "large.pt").unlink()
    assert done.returncode == 0, done.stderr
    ours, naive = map(float, done.stdout.split())
    assert 0.95 < ours < 1.2 and naive > 1.9, done.stdout


# -- what other programs leave -----------------------------------------------------------------------------------------


def test_folders_of_save_pretrained_are_told_apart(tmp_path: Path):

    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")

    def line(name: Path) -> str:
        with pytest.raises(ConfigError) as refused:
            check(load([f"--model.init_from={name}"]), Launcher())
        return str(refused.value)

    check(load([f"--model.init_from={tmp_path}"]), Launcher())
    assert list(weights.read(tmp_path)) == ["w"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert line(index).endswith(f"expected their folder; write --model.init_from {tmp_path}")
    with pytest.raises(ConfigError, match="index.json, which cannot be read"):
        weights.read(tmp_path)
    save_file({"v": torch.ones(2)}, tmp_path / "more.safetensors")
    where = {"w": "model.safetensors", "v": "more.safetensors"}
    index.write_text(json.dumps({"weight_map": where}))
    assert sorted(weights.read(tmp_path)) == ["v", "w"]
    for name, file, said in (
        ("u", "more.safetensors", "whose files lack u"),
        ("v", "../more.safetensors", "beside it"),
    ):
        index.write_text(json.dumps({"weight_map": where | {name: file}}))
        with pytest.raises(ConfigError, match=said):
            weights.read(tmp_path)
