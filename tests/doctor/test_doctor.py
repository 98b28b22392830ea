"""The doctor: each thing that it looks at is broken for real, and the right line says so."""

import gzip
import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.doctor import data as data_checks
from dist_train.doctor import fit, machine, meeting, traced, versions
from dist_train.doctor.report import Line, Report, merge
from dist_train.ranks import dist
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble

from data_files import made_images, write_archives, write_images
from zygote import Ended, Run, Zygote

TINY = ["--model.hidden=[16]", "--train.device=cpu"]


def examined(zygote: Zygote, folder: Path, *argv: str, ranks: int = 1, plant: dict | None = None) -> Ended:
    """The real command on some ranks."""
    where = [] if any(word.startswith("--run.dir") for word in argv) else [f"--run.dir={folder / 'run'}"]
    (ended,) = zygote.run(Run(["doctor", "--json", *TINY, *where, *argv], ranks, plant))
    return ended


def lines(ended: Ended) -> dict[str, dict]:
    """The lines of the report by name; of one name the worst."""
    assert "Traceback" not in ended.err[0], ended
    tree = json.loads(ended.out[0])
    order = ("pass", "warn", "fail")
    assert tree["worst"] == max((line["status"] for line in tree["lines"]), key=order.index)
    assert set(ended.codes[:1]) == {1 if tree["worst"] == "fail" else 0}, ended
    mended = [line["mend"] or "; " in line["what"] for line in tree["lines"] if line["status"] != "pass"]
    assert all(mended), ended
    return {line["name"]: line for line in sorted(tree["lines"], key=lambda line: order.index(line["status"]))}


def bad(ended: Ended) -> dict[str, str]:
    """Name and status of what does not pass."""
    return {name: line["status"] for name, line in lines(ended).items() if line["status"] != "pass"}


# -- healthy -----------------------------------------------------------------------------------------------------------


def test_a_healthy_machine_passes_and_nothing_is_left(zygote: Zygote, tmp_path: Path):
    ended = examined(zygote, tmp_path, "--max-mb=1", ranks=2).check()
    found = lines(ended)
    assert set(bad(ended)) <= {"cores", "memory", "open files", "shared memory", "cuda", "wandb", "tensorboard"}
    sections = list(dict.fromkeys(line["section"] for line in json.loads(ended.out[0])["lines"]))
    assert sections == ["versions", "machine", "launcher", "network", "disk", "data", "config"]
    assert found["launcher"]["facts"]["name"] == "env" and found["launcher"]["facts"]["world_size"] == 2
    assert found["rank 1"]["facts"]["process"] != found["rank 0"]["facts"]["process"]
    for name, count in (("1 KB", 1 << 10), ("16 KB", 1 << 14), ("256 KB", 1 << 18)):
        facts = found[name]["facts"]
        assert facts["bytes"] == count and facts["ranks"] == 2 and facts["backend"] == "gloo"
        seconds = facts["all_reduce_ms"] / 1e3
        assert facts["all_reduce_gb_per_s"] == pytest.approx(count / seconds / 1e9)
        assert facts["all_reduce_bus_gb_per_s"] == pytest.approx(count / seconds / 1e9)  # 2 (n - 1) / n is 1
    assert "4 MB" not in found
    assert ended.out[1] == "" and list(tmp_path.iterdir()) == []


def test_a_process_alone_measures_two_and_reads_like_this(zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(Run(["doctor", *TINY, "--max-mb=1", f"--run.dir={tmp_path}"]))
    said = ended.check().out[0].splitlines()
    assert said[0] == "versions" and said[1].startswith("  pass  python         3.")
    assert "  pass  launcher       none: this process was started alone" in said
    assert any(line.startswith("  pass  256 KB         broadcast ") and "(bus " in line for line in said)
    assert " lines: " in said[-1] and said[-1].endswith(("worst: pass", "worst: warn")), said[-1]
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun(tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "dist_train", "doctor", "--json", "--only=launcher,network", "--max-mb=1", *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    names = {line["name"]: line for line in tree["lines"]}
    assert names["launcher"]["what"].startswith("torchrun: 2 ranks, 2 here")
    assert names["clocks"]["status"] == "pass" and len(names["clocks"]["facts"]["skew_s"]) == 2


# -- versions ----------------------------------------------------------------------------------------------------------


def distribution(folder: Path, name: str, version: str) -> None:
    """A distribution's metadata, as pip leaves it."""
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_what_is_too_old_says_how_to_update_it(zygote: Zygote, tmp_path: Path):
    for name in ("numpy", "wandb", "accelerate"):
        distribution(tmp_path / "old", name, "0.1")
    plant = {0: ("installed", str(tmp_path / "old"))}
    found = lines(examined(zygote, tmp_path, "--only=versions", "--backend.name=accelerate", plant=plant))
    assert found["numpy"]["what"] == "got 0.1, expected 1.26 or newer"
    assert found["numpy"]["mend"] == "pip install -U 'numpy>=1.26'"
    assert found["accelerate"]["status"] == "fail" and found["accelerate"]["mend"].startswith("pip install -U 'accel")
    assert found["wandb"]["status"] == "warn" and found["wandb"]["what"].endswith("; this run does not need it")


@pytest.mark.parametrize(("backend", "status"), [("deepspeed", "fail"), ("ddp", "pass")])
def test_a_missing_library_matters_where_the_run_needs_it(backend: str, status: str, zygote: Zygote, tmp_path: Path):
    plant = {0: ("not_installed", "deepspeed")}
    found = lines(examined(zygote, tmp_path, "--only=versions", f"--backend.name={backend}", plant=plant))
    assert found["deepspeed"]["status"] == status
    assert found["deepspeed"]["mend"] == ("pip install 'dist-train[deepspeed]'" if status == "fail" else "")


def test_a_device_that_torch_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.is_available():
        pytest.skip("it finds one")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("PATH", "")
    assert versions.driver(tmp_path) == f"{tmp_path}/nvidia0"
    monkeypatch.setattr(versions, "driver", lambda: "/dev/nvidia0")
    (line, *_) = versions._cuda(Config())
    assert (line.status, line.name) == ("warn", "cuda") and "there is /dev/nvidia0" in line.what and line.mend


def test_ranks_with_other_versions_are_named(zygote: Zygote, tmp_path: Path):
    ended = examined(zygote, tmp_path, "--only=versions", ranks=2, plant={1: ("other_version", "torch")})
    line = lines(ended)["same on all"]
    assert line["status"] == "fail" and line["what"].endswith("but 0.0.1 on rank 1") and line["facts"] == {"ranks": [1]}
    assert ended.codes == [1, 1]


# -- the machine -------------------------------------------------------------------------------------------------------


def test_few_open_files(zygote: Zygote, tmp_path: Path):
    found = lines(examined(zygote, tmp_path, "--only=machine", plant={0: ("few_files", 200)}))["open files"]
    assert (found["status"], found["what"], found["mend"]) == (
        "warn",
        "ulimit -n is 200, expected 260",
        "ulimit -n 65536",
    )


def test_little_shared_memory_for_workers(mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "SHM", str(mounts(tmp_path / "shm", "-t", "tmpfs", "-o", "size=64m", "none")))
    assert machine._shm(load([]), Launcher()).status == "pass"
    line = machine._shm(load(["--data.workers=2"]), Launcher())
    assert line.status == "warn" and "67.1 MB free for 2 workers a rank" in line.what and "--shm-size" in line.mend


def test_a_containers_limits_are_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {"memory.max": "100000000", "memory.current": "90000000", "cpu.max": "50000 100000"}
    for name, text in (files | {"memory.stat": "anon 1\ninactive_file 20000000\n"}).items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "_groups", lambda: iter([tmp_path]))
    assert machine.memory() == (100_000_000, 30_000_000)
    (cores, memory, *_) = machine.check(Config(), Launcher("env", 0, 2, 0, 2))
    assert cores.status == "warn" and "the container may use 0.5" in cores.what
    assert memory.status == "warn" and memory.what.startswith("30.0 MB of 100.0 MB are free")


# -- the network -------------------------------------------------------------------------------------------------------


def test_an_address_that_means_nothing(zygote: Zygote, tmp_path: Path):
    plant = {0: ("set_environment", {"MASTER_ADDR": "no.such.host.invalid"}), 1: ("leaves",)}
    found = lines(examined(zygote, tmp_path, "--only=network,disk", ranks=2, plant=plant))
    assert found["address"]["status"] == "fail"
    assert found["address"]["what"].startswith("MASTER_ADDR=no.such.host.invalid does not resolve: ")
    assert found["checkpoint"]["status"] == "pass", "what needs no other rank is checked"


def test_a_name_that_means_this_host_alone_on_several_nodes():
    (line,) = meeting.address(Launcher("env", 0, 2, 0, 1, "localhost", 1))
    assert line.status == "fail" and "is 127.0.0.1 here, this host alone" in line.what and "/etc/hosts" in line.mend


def test_a_port_that_another_program_has(zygote: Zygote, tmp_path: Path):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        plant = {0: ("set_environment", {"MASTER_PORT": str(port)}), 1: ("leaves",)}
        found = lines(examined(zygote, tmp_path, "--only=network", ranks=2, plant=plant))
    assert found["port"]["what"] == f"{port} is taken on this host, where rank 0 listens"
    assert found["port"]["mend"].startswith("export MASTER_PORT=")


def test_a_rank_that_does_not_come_is_named(zygote: Zygote, tmp_path: Path):
    plant = {0: ("wait_less", 0.5), 1: ("leaves",), 2: ("wait_less", 0.5)}
    ended = examined(zygote, tmp_path, "--only=network", "--train.global_batch_size=66", ranks=3, plant=plant)
    found = lines(ended)["rendezvous"]
    assert found["status"] == "fail" and found["facts"] == {"missing": [1]}
    assert found["what"].startswith("rank 1 of 3 did not come to 127.0.0.1 (127.0.0.1) port ")
    assert "[rank 2] FAIL rendezvous: rank 1 of 3 did not come" in ended.err[2]


def test_rank_0_that_does_not_come(zygote: Zygote, tmp_path: Path):
    ended = examined(zygote, tmp_path, "--only=network", ranks=2, plant={0: ("leaves",), 1: ("wait_less", 0.3)})
    assert ended.codes[1] == 1
    assert "[rank 1] FAIL port: rank 0 does not answer at 127.0.0.1 port" in ended.err[1]
    assert "Connection refused" in ended.err[1]


def test_a_stranger_in_the_place_of_rank_0_does_not_hang_the_others(zygote: Zygote, tmp_path: Path):
    """torch's client waits for its answer, whatever its timeout."""
    ended = examined(zygote, tmp_path, "--only=network", ranks=2, plant={0: ("listens_only",), 1: ("wait_less", 0.5)})
    assert ended.codes[1] == 1 and ended.seconds < 10
    assert "[rank 1] FAIL rendezvous: did not end within" in ended.err[1]


def test_a_network_card_that_is_not_there(zygote: Zygote, tmp_path: Path):
    plant = {rank: ("set_environment", {"GLOO_SOCKET_IFNAME": "nosuch0"}) for rank in (0, 1)}
    found = lines(examined(zygote, tmp_path, "--only=network", ranks=2, plant=plant))["interface"]
    assert found["what"].startswith("GLOO_SOCKET_IFNAME names nosuch0, but this host has ")
    assert found["mend"].startswith("export GLOO_SOCKET_IFNAME=")


def test_variables_that_contradict_each_other(zygote: Zygote, tmp_path: Path):
    plant = {0: ("set_environment", {"RANK": "0"})}
    found = lines(examined(zygote, tmp_path, "--only=launcher,disk", plant=plant))
    assert found["launcher"]["what"].startswith("environment: got RANK=0 without WORLD_SIZE")
    assert found["checkpoint"]["status"] == "pass"


def test_a_wrong_sum(zygote: Zygote, tmp_path: Path):
    plant = {1: ("flips_bits", 1 << 14)}
    found = lines(examined(zygote, tmp_path, "--only=network", "--max-mb=1", ranks=2, plant=plant))
    assert found["1 KB"]["status"] == "pass"
    assert found["16 KB"]["what"] == "the sum of an all-reduce is wrong on rank 1"
    assert "256 KB" not in found and found["clocks"]["status"] == "pass"


def test_a_clock_that_is_ahead(zygote: Zygote, tmp_path: Path):
    plant = {1: ("clock_ahead", 3.5)}
    found = lines(examined(zygote, tmp_path, "--only=network", "--max-mb=0", ranks=2, plant=plant))["clocks"]
    assert found["status"] == "warn" and "is 3.5 s ahead of rank 0" in found["what"] and found["ranks"] == [0]
    assert found["facts"]["skew_s"][1] == pytest.approx(3.5, abs=0.1)


def test_a_slow_link_between_nodes(zygote: Zygote, tmp_path: Path):
    plant = dict.fromkeys((0, 1), ("far_apart",))
    found = lines(examined(zygote, tmp_path, "--only=network", "--max-mb=4", ranks=2, plant=plant))
    assert [found[name]["status"] for name in ("1 KB", "16 KB", "256 KB", "4 MB")] == ["pass", "pass", "pass", "warn"]
    assert "a slow link between nodes" in found["4 MB"]["what"]
    assert found["rank 1"]["what"].endswith(": the same place as rank 0")
    assert "python -m launch --interface" in found["4 MB"]["mend"]


def test_a_check_that_raises_is_a_line(zygote: Zygote, tmp_path: Path):
    found = lines(examined(zygote, tmp_path, "--only=machine,data", plant={0: ("broken_check",)}))
    assert found["machine"]["what"] == "KeyError: 'MemAvailable'"
    assert found["data set"]["status"] == "pass"


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_full_disk(mounts, zygote: Zygote, tmp_path: Path):
    disk = mounts(tmp_path / "disk", "-t", "tmpfs", "-o", "size=6m", "none")
    (disk / "filler").write_bytes(bytes(5_000_000))
    found = lines(examined(zygote, tmp_path, "--only=disk", f"--run.dir={disk}/run"))
    assert found["free space"]["status"] == found["write"]["status"] == found["checkpoint"]["status"] == "fail"
    assert "No space left on device" in found["write"]["what"] and f"df -h {disk}" in found["write"]["mend"]
    assert f"cannot be written in {disk}: No space left on device" in found["checkpoint"]["what"]
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_too_little_space_for_the_checkpoints(mounts, zygote: Zygote, tmp_path: Path):
    disk = mounts(tmp_path / "disk", "-t", "tmpfs", "-o", "size=80m", "none")
    options = ["--only=disk", f"--run.dir={disk}/run", "--model.hidden=[2048,2048]", "--checkpoint.every_epochs=1"]
    found = lines(examined(zygote, tmp_path, *options))
    assert "3 checkpoints of 52.2 MB: not enough" in found["free space"]["what"]
    assert found["write"]["status"] == "pass"


def test_a_folder_that_cannot_be_written(mounts, zygote: Zygote, tmp_path: Path):
    disk = mounts(tmp_path / "disk", "-t", "tmpfs", "-o", "size=9m,ro", "none")
    found = lines(examined(zygote, tmp_path, "--only=disk", f"--run.dir={disk}/run", ranks=2))
    assert "cannot be written to: Read-only file system" in found["write"]["what"]
    assert "no folder can be made" in found["checkpoint"]["what"]


@pytest.mark.parametrize(
    ("by", "problem"), [("flip", "does not fit its hash"), ("cut", "bytes in __1_0.distcp, expected")]
)
def test_a_checkpoint_that_reads_back_otherwise(by: str, problem: str, zygote: Zygote, tmp_path: Path):
    ended = examined(zygote, tmp_path, "--only=disk", ranks=2, plant={1: ("torn_checkpoint", by)})
    found = lines(ended)["checkpoint"]
    assert found["status"] == "fail" and problem in found["what"] and found["ranks"] == [1]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_another_one_elsewhere(mounts, zygote: Zygote, tmp_path: Path):
    mounts(tmp_path / "probe", "-t", "tmpfs", "none")  # skips where none can be mounted
    (tmp_path / "runs").mkdir()
    plant = {0: ("blind_soon",), 1: ("own_folder", str(tmp_path / "runs"))}
    found = lines(examined(zygote, tmp_path, "--only=disk", f"--run.dir={tmp_path}/runs", ranks=2, plant=plant))
    assert found["same folder"]["status"] == "fail" and "rank 1 on " in found["same folder"]["what"]


# -- the data ----------------------------------------------------------------------------------------------------------


def looked_at(*options: str) -> dict[str, Line]:
    """The lines about a data set, by name."""
    config = load(list(options))
    try:
        data = assemble.read_data(config.data, False)
    except ValueError as error:
        data = error
    return {line.name: line for line in data_checks.check(config, data)}


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small archives with their checksums; the folder that they are in."""
    raw = tmp_path / "FashionMNIST" / "raw"
    monkeypatch.setattr(datasets.FashionMNIST, "resources", write_archives(raw, 30, 20))
    return raw


def test_data_whose_checksums_are_right(fashion: Path, tmp_path: Path):
    for archive in list(fashion.glob("*.gz")):
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
    found = looked_at("--data.name=fashion_mnist", f"--data.root={tmp_path}")
    assert found["checksums"].status == "pass" and found["checksums"].facts["files"] == 4
    assert found["data set"].what.startswith("fashion_mnist: 30 samples to train on, 20 to test")


@pytest.mark.parametrize("download", ["true", "false"])
def test_an_archive_with_a_wrong_byte(download: str, fashion: Path, tmp_path: Path):
    archive = fashion / "train-images-idx3-ubyte.gz"
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    found = looked_at("--data.name=fashion_mnist", f"--data.root={tmp_path}", f"--data.download={download}")
    assert list(found) == ["checksums"] and found["checksums"].status == "fail"
    assert f"{archive} has a wrong checksum" in found["checksums"].what
    assert found["checksums"].mend.startswith(f"rm {archive}")


def test_what_was_unpacked_wrong(fashion: Path, tmp_path: Path):
    for archive in list(fashion.glob("*.gz")):
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
    wrong = fashion / "t10k-images-idx3-ubyte"
    data = bytearray(wrong.read_bytes())
    data[-1] ^= 1
    wrong.write_bytes(data)
    found = looked_at("--data.name=fashion_mnist", f"--data.root={tmp_path}")
    assert found["checksums"].status == "fail" and f"rm {wrong} " in found["checksums"].mend


@pytest.mark.parametrize(("download", "status"), [("true", "warn"), ("false", "fail")])
def test_data_that_is_not_there(download: str, status: str, tmp_path: Path):
    found = looked_at("--data.name=kmnist", f"--data.root={tmp_path}", f"--data.download={download}")
    assert list(found) == ["data set"] and found["data set"].status == status
    assert f"not in {tmp_path}/KMNIST/raw" in found["data set"].what and found["data set"].mend


def test_an_image_that_cannot_be_read(tmp_path: Path):
    write_images(tmp_path, *made_images(20))
    options = ["--data.name=csv_images", f"--data.root={tmp_path}", "--data.args.test_fraction=0.2"]
    assert {line.status for line in looked_at(*options).values()} == {"pass"}
    last = assemble.read_data(load(options).data, False).train.dataset.rows[-1].path
    (tmp_path / last).write_bytes((tmp_path / last).read_bytes()[:60])
    found = looked_at(*options)
    assert found["train samples"].status == "fail" and last in found["train samples"].what


def test_data_of_the_users_own_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_for_doctor.py").write_text("def data(root, download):\n    raise RuntimeError('planted')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load(["--data.name=mine_for_doctor:data"])
    (line,) = data_checks.check(config, RuntimeError("planted"))
    assert line.status == "fail" and "mine_for_doctor:data raises RuntimeError('planted')" in line.what


# -- the config --------------------------------------------------------------------------------------------------------


def test_a_bad_config_is_among_the_lines(zygote: Zygote, tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_text("train:\n  epochz: 3\n")
    found = lines(examined(zygote, tmp_path, "--only=disk,data,config", f"--config={file}"))
    assert found["config"]["what"].startswith(f"train in {file}: got unknown key 'epochz'")
    assert found["checkpoint"]["status"] == "pass"
    found = lines(examined(zygote, tmp_path, "--only=config", "--train.epochs=0", "--optim.momentum=0.5"))
    assert "optim.momentum: got 0.5" in found["config"]["what"] or "train.epochs: got 0" in found["config"]["what"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--optim.lrr=1", "optim: got unknown key 'lrr'"),
        ("--only=disks", "--only: got unknown section 'disks'"),
        ("--max-mb=x", "--max-mb: got 'x'"),
    ],
)
def test_a_mistake_on_the_command_line_ends_it(option: str, said: str, zygote: Zygote, tmp_path: Path):
    ended = examined(zygote, tmp_path, option)
    assert ended.codes == [2] and ended.out == [""] and said in ended.err[0] and ended.err[0].count("\n") == 1


def test_a_run_that_does_not_fit(zygote: Zygote, tmp_path: Path):
    wide = ["--data.name=synthetic", "--data.args.shape=[100000]", "--model.hidden=[1000000]"]
    wide += ["--data.args.n=8", "--data.args.n_test=8"]
    found = lines(examined(zygote, tmp_path, "--only=config", *wide))["memory"]
    assert found["status"] == "fail" and "--backend.name fsdp2" in found["mend"]
    # 4 bytes: 1e11 + 1e7 weights and 1e6 + 10 biases.
    assert found["facts"]["parts"]["weights"] == 4 * (100_000 * 1_000_000 + 1_000_000 + 1_000_000 * 10 + 10)
    many = ["--model.hidden=[100000]", "--train.global_batch_size=4000000"]
    found = lines(examined(zygote, tmp_path, "--only=config", *many))["memory"]
    assert found["status"] == "fail" and found["mend"] == "--train.micro_batch_size 2000000"


@pytest.mark.parametrize(
    ("backend", "optimizer"),
    [("single", name) for name in ("AdamW", "SGD", "Adafactor", "ASGD")] + [("ddp", "Adam"), ("fsdp2", "AdamW")],
)
def test_the_estimate_is_what_a_run_holds(backend: str, optimizer: str, zygote: Zygote, tmp_path: Path):
    ranks = 1 if backend == "single" else 2
    options = [
        "--model.hidden=[33, 21]",
        f"--optim.name={optimizer}",
        "--train.device=cpu",
        f"--backend.name={backend}",
    ]
    options += ["--optim.momentum=0.9"] if optimizer == "SGD" else []
    weigh = ("weigh", backend, str(tmp_path / "held"))
    trained = Run([*options, "--train.max_steps=2", f"--run.dir={tmp_path / 'run'}"], ranks, {0: weigh})
    zygote.run(trained)[0].check()
    found = traced.of_run(load(options), Launcher("env" if ranks > 1 else "none", 0, ranks, 0, ranks))
    assert list(found.held.values()) == json.loads((tmp_path / "held").read_text())


def test_a_step_is_counted_on_real_tensors_as_without_values():
    options = ["--model.hidden=[300, 200]", "--train.global_batch_size=100", "--optim.name=SGD"]
    config = load([*options, "--backend.name=single"])
    data = assemble.read_data(config.data, False)
    with dist.imagined(1, 1) as world:
        trace = traced.Trace(config, data, world, buckets=False)
        with trace.ledger:
            trace.build()
            trace.step(1)
            trace.step(1)
            real = trace.estimate(None)
    few = replace(config, train=replace(config.train, eval_batch_size=1))
    found = traced.of_run(few, Launcher())
    assert found.peak == real.peak and found.held == real.held
    # 600 samples are gathered at once; each layer is there before and after its ReLU; the outputs.
    activations = 4 * (600 * 64 + 100 * (2 * 300 + 2 * 200 + 2 * 10))
    assert activations <= sum(real.peak.parts.values()) - real.held["weights"] <= activations + 2 * real.held["weights"]


def test_a_model_whose_memory_cannot_be_known(zygote: Zygote, tmp_path: Path):
    options = ["--only=config", "--data.name=kmnist", f"--data.root={tmp_path}"]
    line = lines(examined(zygote, tmp_path, *options))["memory"]
    assert line["status"] == "warn" and line["what"].startswith("not estimated, as it depends on")
    (line,) = fit.estimate(Config(), Launcher(), torch.device("cpu"), RuntimeError("data dependent"))
    assert line.status == "warn" and line.what == "not estimated: RuntimeError: data dependent" and line.mend


# -- the report --------------------------------------------------------------------------------------------------------


def test_lines_of_many_ranks(capsys: pytest.CaptureFixture):
    def of(rank: int, *lines: Line) -> list[Line]:
        return [replace(line, section="disk", ranks=(rank,)) for line in lines]

    slow, fine = Line("warn", "write", "slow", "buy"), Line("pass", "write", "fast")
    merged = merge([of(0, fine), of(1, slow), of(2, slow)])
    assert [(line.what, line.ranks) for line in merged] == [("fast", (0,)), ("slow", (1, 2))]
    report = Report(0, as_json=False)
    report.joined(3, lambda own: [own, of(1, slow), of(2, slow)])
    report.add("disk", [fine])
    report.show()
    assert report.close() == "warn"
    assert capsys.readouterr().out == (
        "disk\n  pass  write          fast\n  warn  write          ranks 1, 2: slow\n        mend: buy\n"
        "\n2 lines: 1 pass, 1 warn; worst: warn\n"
    )


def test_a_rank_that_is_lost_is_a_line(capsys: pytest.CaptureFixture):
    def lost(_):
        raise RuntimeError("Connection closed by peer")

    report = Report(0, as_json=False)
    report.joined(2, lost)
    report.add("disk", [Line("pass", "write", "fast")])
    report.show()
    report.show()
    assert report.close() == "fail" and report.lost
    assert "lost another rank: RuntimeError: Connection closed by peer" in capsys.readouterr().out
