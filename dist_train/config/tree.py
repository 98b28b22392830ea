"""The configuration: one tree of typed dataclasses. What the values must satisfy beyond their types stands in the
`rules.py` of each room. A config is never changed after it is loaded."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Marks a field that is a path: `~` and `$NAME` in it are replaced when a config is loaded.
PATH = {"path": True}


@dataclass(frozen=True)
class RunConfig:
    """Where the run's files go."""

    dir: str | None = field(default=None, metadata=PATH)
    """Folder of the run; with run.name, the folder that holds it (null: runs)."""
    name: str | None = field(default=None, metadata=PATH)
    """Name of the run, a folder within run.dir (null: run.dir itself, or DATA-MODEL-TIME within runs)."""


@dataclass(frozen=True)
class DataConfig:
    """The data set and how it is read."""

    name: str = "digits"
    """digits, mnist, fashion_mnist, kmnist, cifar10, synthetic, csv_images, image_folder, text, diabetes, multi_label,
    shapes, or a function or a map-style class by path, as module:name: torchvision.datasets:STL10,
    datasets:load_dataset, or your own."""
    root: str = field(default="data", metadata=PATH)
    """Folder with the data; downloads go there, in torchvision's layout."""
    download: bool = True
    """Download what is missing, where the data set can be had."""
    workers: int = 0
    """DataLoader processes per rank, for data sets that are read from files (data in memory needs none)."""
    normalize: bool = True
    """Subtract the data set's mean and divide by its deviation; false leaves pixels in [0, 1]."""
    one_hot: bool = False
    """Give targets as vectors of class probabilities instead of class numbers."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that only this data set has, such as data.args.n of synthetic."""
    test_args: dict[str, Any] | None = None
    """Of a data set by path, the arguments for its test split, which go before those of data.args: {train: false}; or
    several by name: {clean: {split: test}, noisy: {split: noisy}} (null: no test split)."""
    test_fraction: float | None = None
    """Of a data set by path without data.test_args, the share of the samples that is held out to test, the same ones in
    every run."""
    pair: list[str] | None = None
    """Of samples that are dicts, the keys of the input and of the target: [image, label] (null: all goes on as it
    is)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the data set does not say itself and a model or a task asks for by name: {classes: 10, input_shape:
    [3, 32, 32]}. classes is a number, or a list of names."""
    transforms: list[Any] = field(default_factory=list)
    """Applied to each sample that is trained on, in order: names of torchvision.transforms.v2, with arguments as
    {name: RandomCrop, size: 28, padding: 4}, or your own as module:name."""
    test_transforms: list[Any] = field(default_factory=list)
    """The same for samples that are tested on."""
    batch_transforms: list[Any] = field(default_factory=list)
    """Applied on the device to the batches that are trained on: MixUp, CutMix, RandomErasing, RandomHorizontalFlip,
    RandomCrop, with arguments as {name: MixUp, alpha: 0.2}, or your own as module:name."""


@dataclass(frozen=True)
class ModelConfig:
    """The model. A null is the model's own default."""

    name: str = "mlp"
    """mlp, unet (for segmentation), or any class or function that gives a torch.nn.Module, as module:name: your own or
    a library's, such as torchvision.models:resnet18."""
    hidden: list[int] | None = None
    """Sizes of the hidden layers (mlp: [512, 512])."""
    activation: str | None = None
    """Name of a class in torch.nn (mlp: ReLU)."""
    dropout: float | None = None
    """Probability of dropping a hidden unit (mlp: 0)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that only this model has. A mapping stands for an object where the argument is annotated with a
    dataclass, such as the config of a model of transformers."""
    frozen: list[str] = field(default_factory=list)
    """Weights that are not trained, by patterns of their names, such as backbone.*; !backbone.head.* takes some back.
    Norms among them stay in eval mode, so that their running statistics stay as they are."""
    batch_statistics: str | dict[str, Any] | None = None
    """Of which samples a BatchNorm takes its statistics: global, all samples of the step, on all ranks; or {group: 32},
    of each 32 in the step's order, which neither ranks nor micro-batches cut through (null: global)."""
    blocks: list[str] | None = None
    """Layers that fsdp2 and ZeRO 3 gather and compile each by itself, and that backend.recompute computes again, by
    patterns of their names or classes (null: the members of the outermost nn.Sequential and nn.ModuleList)."""
    split: dict[str, str] = field(default_factory=dict)
    """How layers are split over the tensor ranks of backend.mesh, by patterns of their names: columns, rows, sequence,
    gather or cut, such as {"*.q_proj": columns, "*.o_proj": rows} (none: the model's own attribute split)."""
    init_from: str | None = field(default=None, metadata=PATH)
    """Start from these weights: a run's folder, a .pt or .pth file with a state dict, a .safetensors file, or the URL
    of checkpoints. What fits by name and shape is loaded, and what does not is said."""
    init_strict: bool = False
    """Everything in model.init_from and in the model must fit."""


@dataclass(frozen=True)
class TaskConfig:
    """What the model is trained for. A null is the task's own default."""

    name: str = "classification"
    """classification, regression, multi_label, segmentation, model_loss (the loss that the model returns), or your own
    class as module:Class; none, for a loop of your own (dist_train.session)."""
    loss: str | None = None
    """classification: cross_entropy (default), which takes logits, nll, log-probabilities, or mse, one-hot targets
    (data.one_hot). regression: mse (default), l1, huber or smooth_l1."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that only this task has, such as task.args.label_smoothing of classification."""
    metrics: list[Any] | None = None
    """What evaluation measures beside the loss: names, or {name: NAME, ...} with arguments (null: accuracy; mae,
    rmse and r2; f1; mean_iou and pixel_accuracy)."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the schedule of its learning rate. A null is torch's own default."""

    name: str = "AdamW"
    """A class of torch.optim: SGD, AdamW, ...; Muon (with AdamW for what is no matrix, see optimizers.md); or your own
    optimizer as module:Class."""
    lr: float = 1e-3
    """Peak learning rate, the same at every world size."""
    weight_decay: float | None = None
    """Weight decay, if the optimizer has it."""
    momentum: float | None = None
    """Momentum, if the optimizer has it."""
    args: dict[str, Any] = field(default_factory=dict)
    """The optimizer's other arguments, such as optim.args.betas."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Other settings for some parameters: match, a pattern of their names such as "head.*", and the arguments of the
    optimizer that differ for them, such as lr. The first pattern that matches a parameter decides. Under Muon, also
    optimizer: Muon or AdamW."""
    no_decay: bool = False
    """No weight decay for biases, norms and other weights of one dimension, unless their group gives one."""
    schedule: str = "constant"
    """Learning rate after the warm-up: constant; linear, cosine or polynomial to lr_final at the last step; step: times
    gamma; wsd: stable, then linear to lr_final; cosine_restarts; or your own function as module:function."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0 to lr."""
    warmup_share: float | None = None
    """The same, as a share of the run's steps, such as 0.05."""
    lr_final: float = 0.0
    """Learning rate at the end of the linear, cosine, polynomial, wsd and cosine_restarts schedules."""
    step_size: int | None = None
    """Optimizer steps between two decays of the step schedule."""
    gamma: float | None = None
    """Factor of each decay of the step schedule."""
    decay_steps: int | None = None
    """wsd: the optimizer steps at the end of the run over which the learning rate falls to lr_final."""
    decay_share: float | None = None
    """wsd: the same, as a share of the run's steps, such as 0.1."""
    restart_steps: int | None = None
    """cosine_restarts: optimizer steps until the first restart."""
    restart_factor: int | None = None
    """cosine_restarts: how many times longer each cycle is than the one before (null: 1)."""
    power: float | None = None
    """polynomial: the power; 1 is linear."""
    ema: float | None = None
    """Also keep an average of the weights: after each step it is this times itself, plus the rest times the weights, so
    for example 0.999."""
    ema_start: int = 0
    """Optimizer steps after which the average starts, at the weights of then."""
    ema_eval: bool = True
    """Evaluations and weights.pt take the averaged weights, where there are any."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: int = 20
    """Passes over the training data."""
    max_steps: int | None = None
    """End after this many optimizer steps, if that comes before the last epoch's end."""
    global_batch_size: int = 64
    """Samples of one optimizer step, over all ranks, whose shares differ by one sample at most."""
    micro_batch_size: int | None = None
    """At most this many samples at once on a rank; a larger share is accumulated in pieces."""
    drop_last: bool = False
    """Leave out the last batch of an epoch if it is smaller than global_batch_size."""
    grad_clip: float | None = None
    """Largest global gradient norm; a larger gradient is scaled down to it."""
    precision: Literal["float32", "tf32", "bfloat16", "float16", "float64"] = "float32"
    """tf32, bfloat16 and float16 are the matrix products' alone; parameters and sums stay float32 (see the README)."""
    seed: int = 0
    """Decides the initial weights, the order of the samples, and all that is drawn."""
    draws: Literal["keyed", "torch"] = "keyed"
    """What dropout draws. keyed: by the step, the place in the model and the sample, so the same on any number of
    ranks. torch: from torch's generator, which is another on each rank."""
    device: str = "auto"
    """auto, cpu, cuda, ...: auto takes the accelerator that torch finds, else the CPU."""
    threads: int | None = None
    """CPU threads of a rank (null: OMP_NUM_THREADS, else the cores divided by the ranks on the node)."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop ends the run; skip leaves the step out, and waits for the device at
    every step to know."""
    audit_every_steps: int | None = None
    """At every so many steps, another rank computes each rank's gradient again, and the two and the ranks' weights are
    compared bit by bit, to find a device that computes wrongly; see audit.md (null: never)."""
    audit_action: Literal["stop", "warn"] = "stop"
    """Where an audit finds something: stop sets checkpoints aside that were saved since the last audit without a
    finding, and ends the run; warn says it and goes on."""
    max_time_s: float | None = None
    """Save and end after so many seconds of this start, with exit code 75, to be started again."""
    step_timeout_s: float | None = 600.0
    """Where a step takes longer than so many seconds, name the rank that is waited for, and end (null: never)."""
    eval_every_epochs: int | None = 1
    """Evaluate after every so many epochs (null: only at the end and by eval_every_steps)."""
    eval_every_steps: int | None = None
    """Evaluate after every so many optimizer steps."""
    early_stopping: dict[str, Any] = field(default_factory=dict)
    """End where a metric no longer gets better: metric, such as eval/loss (the task's own); patience, evaluations in a
    row that are no better (3); min_delta, by which a better one is better at least (0.0). With none of them, never."""
    hooks: list[Any] = field(default_factory=list)
    """Your own classes that are called at the steps of the run, as module:Class, or {name: module:Class, ...} with
    arguments; see hooks.md."""
    eval_batch_size: int | None = None
    """Samples at once on a rank during evaluation. Does not change the result. null: as many as a training micro-batch
    has, or more, up to 2048, where their inputs and outputs take little memory."""


@dataclass(frozen=True)
class BackendConfig:
    """The library that moves gradients and shards state. It changes speed and memory, not the result."""

    name: str = "auto"
    """single, ddp, fsdp2, accelerate, deepspeed, or auto: that of the launcher, ddp under torchrun, srun and mpirun,
    single alone."""
    zero_stage: int | None = None
    """deepspeed: what is shared out among the ranks; 0 nothing (also null), 1 optimizer state, 2 and gradients,
    3 and weights."""
    mesh: dict[str, int] = field(default_factory=dict)
    """fsdp2: how many ranks each dimension has: replicate, groups of ranks with a copy each; shard, ranks that share
    out a copy; tensor, ranks that split each layer. -1 is what is left (none: shard alone)."""
    offload: bool = False
    """fsdp2, and deepspeed at stages 1 to 3: keep the optimizer's state on the CPU, and compute its step there."""
    start: Literal["auto", "whole", "sharded"] = "auto"
    """fsdp2: whole builds the model on every rank before it is sharded; sharded fills each rank's shards, so that no
    rank ever holds the whole of it; the weights are the same. auto is sharded from 100 million weights on."""
    reduce: Literal["fast", "ordered"] = "fast"
    """How gradients are summed: fast, as the library does it; ordered, in an order that is the same at any number of
    ranks, so that single, ddp and fsdp2 give the same bits. It takes more time and memory."""
    recompute: str | dict[str, Any] = "none"
    """Activations that are not kept for the backward, but computed again there, to the same bits. none; blocks: all
    within the model's blocks (model.blocks); selective: what is cheap within them, while matrix products and attention
    are kept; {budget: 0.5}: as the compiler likes, within that share of what it would keep (with compile.mode)."""
    config: str | None = field(default=None, metadata=PATH)
    """deepspeed: JSON file with more of its own settings, for what has no place in this config."""


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile."""

    mode: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """off runs the model as written; the others are torch.compile's own."""
    scope: Literal["model", "step"] = "model"
    """What mode is for. step: all from the numbers of the samples to the loss; and on CUDA the whole optimizer step is
    captured once and replayed as a graph, also where mode is off (backend single, data in memory)."""
    fullgraph: bool = False
    """Fail where the model cannot be one graph."""
    dynamic: bool | None = None
    """Sizes as variables: true from the start, false never, null once a size has changed."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving during the run, and resuming. The final weights are always saved."""

    dir: str | None = field(default=None, metadata=PATH)
    """Where checkpoints are: a folder, or an object store's URL such as s3://bucket/path (null: in the run's folder).
    One run at a time has it."""
    every_steps: int | None = None
    """Save after every so many optimizer steps. With none of the three every_... keys, no checkpoint is saved."""
    every_epochs: int | None = None
    """Save after every so many epochs."""
    every_s: float | None = None
    """Save when so many seconds have passed, at the next line of metrics (track.every_steps)."""
    keep_last: int = 2
    """How many of the newest checkpoints stay: the one before is there if the newest is damaged."""
    keep_best: int = 0
    """How many of the best stay as well, of those that were saved at a step with an evaluation."""
    best_metric: str | None = None
    """What the best is decided by, such as eval/loss (null: the first of task.metrics, such as eval/accuracy)."""
    resume: str = field(default="auto", metadata=PATH)
    """auto: from the newest whole checkpoint of the run, else from the start; never; or the folder or URL of a
    checkpoint or of a run."""
    allow: list[str] = field(default_factory=list)
    """Config paths that may differ from the checkpoint's, such as train.seed; data for a changed data set of the same
    size."""
    asynchronous: bool = False
    """Copy the state, and write it in the background while training goes on."""


@dataclass(frozen=True)
class TrackConfig:
    """What is recorded. metrics.jsonl and the console always are."""

    every_steps: int = 50
    """Optimizer steps between two lines of metrics. Between them nothing waits for the device."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """A bar, or a line for each line of metrics; auto is a bar on a terminal."""
    tensorboard: bool = False
    """Also record for TensorBoard, in RUN/tensorboard."""
    wandb: bool = False
    """Also record to Weights & Biases. Of a null below, its own variables decide, such as WANDB_PROJECT."""
    wandb_project: str | None = None
    """Project of the run there."""
    wandb_entity: str | None = None
    """User or team that it belongs to."""
    wandb_group: str | None = None
    """Group of runs."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    wandb_name: str | None = None
    """Name of the run."""
    wandb_notes: str | None = None
    """Notes on the run."""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """online, where there is a network and a key, else offline; offline, to be uploaded later; disabled. auto is what
    WANDB_MODE says, else online."""
    wandb_id: str | None = None
    """Id of the run there (null: the one that the folder or the checkpoint holds, else a new one)."""
    profile: dict[str, int] = field(default_factory=dict)
    """Write a trace of some optimizer steps with torch.profiler, and say where their time went. start_step is the first
    of them, counted from 1 (10), steps how many (5); with neither, nothing is profiled."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


def to_config(tree: dict[str, dict[str, Any]]) -> Config:
    """The dataclasses of a nested dictionary whose values have been checked."""
    return Config(**{f.name: f.type(**tree[f.name]) for f in dataclasses.fields(Config)})  # type: ignore[operator]


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The config as a nested dictionary."""
    return dataclasses.asdict(config)


def fields_of(path: str) -> dict[str, Any] | None:
    """Name and type of each field below a config path; None if the path is a value or does not exist."""
    node: Any = Config
    for part in path.split(".") if path else []:
        hints = typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        if part not in hints:
            return None
        node = hints[part]
    return typing.get_type_hints(node) if dataclasses.is_dataclass(node) else None


def group_of(model: ModelConfig) -> int | None:
    """The samples of a group that a BatchNorm takes its statistics of; None where they are of the whole step."""
    asked = model.batch_statistics
    return asked["group"] if isinstance(asked, dict) else None


def budget_of(backend: BackendConfig) -> float | None:
    """The share of activations that the compiler may keep; None where it is not told any."""
    asked = backend.recompute
    return float(asked["budget"]) if isinstance(asked, dict) else None


def run_folder(config: Config) -> Path | None:
    """The folder of the run as far as the config decides it; None where the time of the start names it."""
    run = config.run
    if run.name is not None:
        return Path(run.dir or "runs") / run.name
    return Path(run.dir) if run.dir is not None else None
