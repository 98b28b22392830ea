"""The cost of a step of a decoder on a mesh of GPUs, on paper: see docs/scaling.md for what is assumed, and why.

`predict` is the model. Three of its numbers are fitted to some rows of PUBLISHED; the other rows are what it is held
against. `scaling.py show` prints the tables of the page and draws its picture.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

GPUS_A_NODE = 8


@dataclass(frozen=True)
class Decoder:
    """The shapes of a model.

    Args:
        layers: of attention and MLP.
        width: of what a layer takes and gives.
        kv_share: key and value heads for each query head.
        mlp: width of the MLP's inner layer.
        matrices: of the MLP: 3 with a gate, else 2.
        vocab: of the embedding and the head.
        tied: the head is the embedding.
        sequence: tokens of a sample.
    """

    layers: int
    width: int
    kv_share: float
    mlp: int
    matrices: int
    vocab: int
    tied: bool
    sequence: int

    @property
    def layer_weights(self) -> float:
        """Of a layer's matrices."""
        return self.width * (self.width * (2 + 2 * self.kv_share) + self.matrices * self.mlp)

    @property
    def weights(self) -> float:
        """Of all matrices."""
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.width * self.vocab

    @property
    def model_flops(self) -> float:
        """Of a token in training, as utilisation is counted: 6 a weight that is multiplied with, and attention as if it
        were not causal; recomputation does not count."""
        multiplied = self.layers * self.layer_weights + self.width * self.vocab
        return 6 * multiplied + 12 * self.layers * self.width * self.sequence


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them; what a maker's sheet says, and what of it is used.

    Args:
        memory_bytes: of a GPU.
        memory_per_s: bytes that a GPU moves to and from its memory.
        node_per_s: bytes a GPU sends within its node.
        cards: network cards of a node.
        card_per_s: bytes that a card sends.
        flops: of a GPU in bfloat16.
        node_s: latency of a message within a node.
        network_s: latency between nodes.
        used: of `flops`, in matrix products; fitted.
        attending: of `flops`, in attention.
        moved: of the other rates.
        straggling: of a step, for each doubling of the nodes; fitted.
    """

    memory_bytes: float = 80e9
    memory_per_s: float = 3.35e12
    node_per_s: float = 450e9
    cards: int = 8
    card_per_s: float = 50e9
    flops: float = 989e12
    node_s: float = 3.4e-6
    network_s: float = 9.6e-6
    used: float = 0.485
    attending: float = 0.35
    moved: float = 0.8
    straggling: float = 0.014


@dataclass(frozen=True)
class Mesh:
    """Ranks in three dimensions, `tensor` innermost, as `backend.mesh` lays them out."""

    replicate: int
    shard: int
    tensor: int

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.replicate * self.shard * self.tensor

    @property
    def data_ranks(self) -> int:
        """That take samples of their own."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"{self.replicate} x {self.shard} x {self.tensor}"


@dataclass(frozen=True)
class Habits:
    """What a program does; the defaults are this package's.

    Args:
        gathered_bytes: of a weight on its way to a rank that computes with it.
        residual_bytes: of a number between the layers.
        whole_gradients: with accumulation, gradients stay whole on a rank until the last micro-batch.
        chunked_loss: the logits are never whole.
    """

    gathered_bytes: int = 4
    residual_bytes: int = 4
    whole_gradients: bool = True
    chunked_loss: bool = True


OURS = Habits()
THEIRS = Habits(gathered_bytes=2, residual_bytes=2, whole_gradients=False, chunked_loss=False)
REDUCED_BYTES = 4  # of a gradient on its way, in all of them
STATE_BYTES = 16  # float32 of a weight: itself, its gradient, and AdamW's two
HELD = 1.1  # bytes that an allocator holds for one that is used; fitted
CHUNK_BYTES = 3 * 2**26  # of the logits of a chunk: themselves, a copy and their gradient
# Of a layer's forward, what is computed again in the backward; selective keeps attention and every other product.
AGAIN = {"none": 0.0, "selective": 0.5, "blocks": 1.0}


@dataclass(frozen=True)
class Cost:
    """What is predicted of a step.

    Args:
        step_s: a whole step.
        shares: of it, by what it is spent on.
        memory_bytes: of a rank, at the peak.
        tokens_per_s: of a rank.
        utilisation: of its arithmetic, by model FLOPs.
    """

    step_s: float
    shares: dict[str, float]
    memory_bytes: float
    tokens_per_s: float
    utilisation: float


def predict(
    model: Decoder, machine: Machine, mesh: Mesh, micro_batch: int, recompute: str, accumulation: int = 1,
    habits: Habits = OURS,
) -> Cost:  # fmt: skip
    """A step of training in bfloat16 under fully_shard, with tensor and sequence parallelism in the tensor dimension.

    A layer's weights are gathered while the layer before it computes, in the forward and again in the backward, and its
    gradients are scattered meanwhile; what takes longer than the computing is waited for. What tensor parallelism
    sends is always waited for. Gradients are summed over replicas behind the backward of the last micro-batch.

    Args:
        model: shapes.
        machine: rates.
        mesh: of ranks.
        micro_batch: samples of a data rank at once.
        recompute: none, selective or blocks.
        accumulation: micro-batches of a step.
        habits: of the program.
    """
    tokens, t = micro_batch * model.sequence, mesh.tensor
    compute_s = _compute_s(model, machine, tokens, recompute, habits) / t
    gather, scatter = (
        _ring_s(machine, mesh.shard, t, model.layer_weights / t * size)
        for size in (habits.gathered_bytes, REDUCED_BYTES)
    )
    head_gather, head_scatter = (
        _ring_s(machine, mesh.shard, t, model.width * model.vocab / t * size)
        for size in (habits.gathered_bytes, REDUCED_BYTES)
    )
    tables = 1 if model.tied else 2
    forward_s, backward_s = compute_s * _forward_share(recompute), compute_s * (1 - _forward_share(recompute))
    scatters = accumulation if not habits.whole_gradients else 1
    exposed_s = accumulation * max(0.0, model.layers * gather - forward_s)
    exposed_s += (accumulation - scatters) * max(0.0, model.layers * gather - backward_s)
    exposed_s += scatters * max(0.0, model.layers * (gather + scatter) - backward_s)
    ends_s = tables * (accumulation * head_gather + scatters * head_scatter)  # nothing to hide behind
    tensor_s = accumulation * model.layers * _tensor_s(model, machine, tokens, t, recompute)
    replica_s = _sum_s(machine, mesh, REDUCED_BYTES * model.weights / (mesh.shard * t))
    replica_s = max(0.0, replica_s - max(0.0, backward_s - model.layers * (gather + scatter)))
    held = model.weights / (mesh.shard * t)
    update_s = 40 * held / (machine.memory_per_s * machine.moved)  # the norm, clipping, and AdamW's reads and writes
    parts = {
        "computing": accumulation * compute_s,
        "tensor": tensor_s,
        "gathering": exposed_s + ends_s,
        "replicas": replica_s,
        "optimizer": update_s,
    }
    alone_s = sum(parts.values())
    nodes = max(1.0, mesh.ranks / GPUS_A_NODE)
    parts["stragglers"] = alone_s * machine.straggling * math.log2(nodes)
    step_s = sum(parts.values())
    rate = accumulation * tokens / t / step_s
    memory = memory_bytes(model, mesh, micro_batch, recompute, accumulation, habits)
    shares = {name: seconds / step_s for name, seconds in parts.items()}
    return Cost(step_s, shares, memory, rate, rate * model.model_flops / machine.flops)


def _compute_s(model: Decoder, machine: Machine, tokens: float, recompute: str, habits: Habits) -> float:
    """All that one rank computes for a micro-batch, if it has no tensor peers."""
    layers = 2 * model.layers * model.layer_weights
    head = 2 * model.width * model.vocab * (4 if habits.chunked_loss else 3)  # a chunk's logits are computed twice
    products = layers * (3 + AGAIN[recompute]) + head
    # Half of it, as it is causal; the backward computes five products for the forward's two.
    attention = 2 * model.layers * model.width * model.sequence * (3.5 + (recompute == "blocks"))
    passes = 3 + (recompute != "none")  # norms, rotation, sums and the MLP's gate: bytes to memory and back
    moved = (
        model.layers * passes * (model.width * (6 * habits.residual_bytes + 12) + (3 * model.matrices - 3) * model.mlp)
    )
    moved += 24 * model.vocab
    seconds = products / machine.used / machine.flops + attention / machine.attending / machine.flops
    return tokens * (seconds + moved / (machine.memory_per_s * machine.moved))


def _forward_share(recompute: str) -> float:
    return 1 / (3 + AGAIN[recompute])


def _ring_s(machine: Machine, ranks: int, stride: int, size: float) -> float:
    """Gathering `size` bytes, or scattering their sum, over ranks that are so far apart."""
    if ranks == 1:
        return 0.0
    rate, latency_s = _link(machine, ranks, stride)
    return (ranks - 1) * (latency_s + size / ranks / rate)


def _sum_s(machine: Machine, mesh: Mesh, size: float) -> float:
    """Summing `size` bytes over the replicas: in a ring, or up and down a tree in small pieces."""
    ranks = mesh.replicate
    if ranks == 1:
        return 0.0
    rate, latency_s = _link(machine, ranks, mesh.shard * mesh.tensor)
    ring_s = 2 * (ranks - 1) * (latency_s + size / ranks / rate)
    return min(ring_s, 2 * math.log2(ranks) * latency_s + 2 * size / rate)


def _link(machine: Machine, ranks: int, stride: int) -> tuple[float, float]:
    """Bytes a second of one of the rings that run at the same time, and the mean latency of its messages."""
    inside = machine.node_per_s * machine.moved
    if ranks * stride <= GPUS_A_NODE:
        return inside, machine.node_s
    rings = min(stride, GPUS_A_NODE)  # that leave a node
    within = GPUS_A_NODE // rings  # ranks of a ring in a node, of which one sends out
    latency_s = ((within - 1) * machine.node_s + machine.network_s) / within
    outside = machine.cards * machine.card_per_s * machine.moved / rings
    return (min(inside, outside) if within > 1 else outside), latency_s


def _tensor_s(model: Decoder, machine: Machine, tokens: float, ranks: int, recompute: str) -> float:
    """What tensor peers send for a layer: the sequence's parts are gathered and scattered around attention and around
    the MLP, in bfloat16; in the backward as often, gathering twice, as what was gathered is not kept."""
    one = _ring_s(machine, ranks, 1, 2 * tokens * model.width)
    return one * (4 + 6 + (4 if recompute == "blocks" else 0))


def memory_bytes(
    model: Decoder, mesh: Mesh, micro_batch: int, recompute: str, accumulation: int, habits: Habits = OURS
) -> float:
    """Of a rank at its peak: state, gathered weights, activations and logits."""
    t, tokens = mesh.tensor, micro_batch * model.sequence
    state = STATE_BYTES * model.weights / (mesh.shard * t)
    if accumulation > 1 and habits.whole_gradients and mesh.shard > 1:
        state += REDUCED_BYTES * model.weights / t
    layer, table = model.layer_weights / t, model.width * model.vocab / t
    gathered = 0.0
    if mesh.shard > 1:
        gathered = habits.gathered_bytes * (2 * layer + (1 if model.tied else 2) * table)
        gathered += REDUCED_BYTES * max(2 * layer, table)  # gradients that are about to be scattered
    copies = 2 * layer if habits.gathered_bytes == 4 else 0.0  # of the layer at hand, in bfloat16
    kept = model.layers * tokens * _kept(model, recompute, t, habits)
    working = tokens * _kept(model, "none", t, habits) if recompute != "none" else 0.0  # of the layer computed again
    logits = CHUNK_BYTES if habits.chunked_loss else 10 * model.vocab * tokens / t
    return HELD * (state + gathered + copies + kept + max(working, logits))


def _kept(model: Decoder, recompute: str, tensor: int, habits: Habits) -> float:
    """Bytes of a token that a layer keeps on a rank for its backward; its products are in bfloat16."""
    entry = habits.residual_bytes * model.width / tensor
    if recompute == "blocks":
        return entry
    if recompute == "selective":  # what enters, every other product, and attention
        return entry + 2 * (model.width * (3 + model.kv_share) + (model.matrices - 2 or 1) * model.mlp) / tensor
    products = 2 * (model.width * (2 + 2 * model.kv_share) + (2 * model.matrices - 2) * model.mlp) / tensor
    return 2 * entry + products + 4 * model.width  # what the two groups of products take is whole on each tensor peer


# -- held against what others measured --------------------------------------------------------------------------------

LLAMA_8B = Decoder(32, 4096, 0.25, 14336, 3, 128256, False, 8192)
LLAMA_70B = Decoder(80, 8192, 0.125, 28672, 3, 128256, False, 8192)
MPT_7B = Decoder(32, 4096, 1.0, 16384, 2, 50368, True, 2048)
OLMO_7B = Decoder(32, 4096, 1.0, 11008, 3, 100352, False, 4096)
H100 = Machine()
GRAND_TETON = Machine(memory_bytes=96e9, memory_per_s=2.4e12)


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Args:
        source: whose.
        model: shapes.
        machine: what it ran on.
        mesh: of ranks.
        micro_batch: samples of a data rank.
        recompute: see `predict`.
        tokens_per_s: of a GPU.
        memory_bytes: of a GPU; None where it is not told.
        fitted: one of those that the model was fitted to.
    """

    source: str
    model: Decoder
    machine: Machine
    mesh: Mesh
    micro_batch: int
    recompute: str
    tokens_per_s: float
    memory_bytes: float | None = None
    fitted: bool = False

    def predicted(self) -> Cost:
        """By the model."""
        return predict(self.model, self.machine, self.mesh, self.micro_batch, self.recompute, habits=THEIRS)


GIB = 2**30
PUBLISHED = (
    Published("torchtitan, 8B", LLAMA_8B, GRAND_TETON, Mesh(1, 8, 1), 2, "selective", 6667, 77.0 * GIB, fitted=True),
    Published("torchtitan, 8B", LLAMA_8B, GRAND_TETON, Mesh(1, 128, 1), 2, "selective", 6514, 62.0 * GIB),
    Published("torchtitan, 8B", LLAMA_8B, GRAND_TETON, Mesh(1, 8, 8), 12, "selective", 4378),
    Published("torchtitan, 70B", LLAMA_70B, GRAND_TETON, Mesh(1, 32, 8), 16, "blocks", 597.3),
    Published("llm-foundry, MPT-7B", MPT_7B, H100, Mesh(1, 8, 1), 6, "none", 10643, fitted=True),
    Published("llm-foundry, MPT-7B", MPT_7B, H100, Mesh(1, 128, 1), 6, "none", 10475),
    Published("llm-foundry, MPT-7B", MPT_7B, H100, Mesh(1, 256, 1), 6, "none", 10119),
    Published("llm-foundry, MPT-7B", MPT_7B, H100, Mesh(1, 512, 1), 6, "none", 9670, fitted=True),
    Published("OLMo-core, 7B", OLMO_7B, H100, Mesh(1, 128, 1), 2, "none", 9850),
)


# -- which mesh -------------------------------------------------------------------------------------------------------

FULL = 0.95  # of a GPU's memory that a plan may take
BATCHES = (512, 2048)  # samples of a step: 4.2 and 16.8 million tokens
WORLDS = (8, 64, 512, 4096)


@dataclass(frozen=True)
class Plan:
    """A way to run a step, and what it costs."""

    mesh: Mesh
    micro_batch: int
    accumulation: int
    recompute: str
    cost: Cost


def plans(model: Decoder, machine: Machine, ranks: int, batch: int, habits: Habits = OURS) -> Iterator[Plan]:
    """All that fit into memory, of powers of two.

    Args:
        model: shapes.
        machine: rates.
        ranks: all of which are used.
        batch: samples of a step, over all ranks.
        habits: of the program.
    """
    for tensor, recompute in itertools.product((1, 2, 4, 8), AGAIN):
        data_ranks = ranks // tensor
        if batch % data_ranks:
            continue
        each = batch // data_ranks
        for shard, micro_batch in itertools.product(_powers(data_ranks), _powers(min(each, 16))):
            mesh, accumulation = Mesh(data_ranks // shard, shard, tensor), each // micro_batch
            cost = predict(model, machine, mesh, micro_batch, recompute, accumulation, habits)
            if cost.memory_bytes <= FULL * machine.memory_bytes:
                yield Plan(mesh, micro_batch, accumulation, recompute, cost)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def fastest(found: Iterable[Plan]) -> Plan:
    """The one with the shortest step."""
    return min(found, key=lambda plan: plan.cost.step_s)


# -- shown ------------------------------------------------------------------------------------------------------------

ONE_CARD = Machine(cards=1)
COMPARED = ((512, 512), (4096, 512))  # ranks and samples of a step, of which other meshes are shown too
OTHERS = 6
BLUE, ORANGE = "#4c78a8", "#f58518"
SPENT = ("computing", "tensor", "gathering", "replicas", "stragglers")


def tables() -> str:
    """As they stand in docs/scaling.md."""
    out = [
        "| published by | mesh | samples at once, computed again | tokens/s a GPU | predicted | memory | predicted |"
    ]
    out += ["|---|---|---|---|---|---|---|"]
    for row in PUBLISHED:
        cost = row.predicted()
        cells = [f"{row.source}{', fitted' * row.fitted}", str(row.mesh), f"{row.micro_batch}, {row.recompute}"]
        cells += [
            f"{row.tokens_per_s:,.0f}",
            f"{cost.tokens_per_s:,.0f} ({cost.tokens_per_s / row.tokens_per_s - 1:+.0%})",
        ]
        memory = [f"{row.memory_bytes / GIB:.0f} GiB"] if row.memory_bytes else ["not told"]
        cells += [*memory, f"{cost.memory_bytes / GIB:.0f} GiB"]
        out += [f"| {' | '.join(cells)} |"]
    for machine in (H100, ONE_CARD):
        out += [
            "",
            f"| GPUs | samples a step | mesh | at once, accumulated | computed again | step | {_RATES} | memory |",
        ]
        out += ["|---" * 10 + "|"]
        for batch, ranks in itertools.product(BATCHES, WORLDS):
            best = fastest(plans(LLAMA_8B, machine, ranks, batch))
            out += [f"| {ranks:,} | {batch:,} {_row(best, _of_node(machine, batch))}"]
    for ranks, batch in COMPARED:
        out += [
            "",
            f"| {ranks:,} GPUs, {batch:,} samples: mesh | computed again | step | {' | '.join(SPENT)} | memory |",
        ]
        out += ["|---" * (4 + len(SPENT)) + "|"]
        for plan in best_of_each_mesh(LLAMA_8B, H100, ranks, batch)[:OTHERS]:
            spent = [f"{plan.cost.shares[name]:.0%}" for name in SPENT]
            cells = [str(plan.mesh), plan.recompute, f"{plan.cost.step_s:.2f} s", *spent, _gigabytes(plan.cost)]
            out += [f"| {' | '.join(cells)} |"]
    return "\n".join(out)


_RATES = "tokens/s a GPU | utilisation | efficiency"


def best_of_each_mesh(model: Decoder, machine: Machine, ranks: int, batch: int) -> list[Plan]:
    """The fastest plan of each mesh, the fastest first."""
    found: dict[Mesh, list[Plan]] = {}
    for plan in plans(model, machine, ranks, batch):
        found.setdefault(plan.mesh, []).append(plan)
    return sorted(map(fastest, found.values()), key=lambda plan: plan.cost.step_s)


def _of_node(machine: Machine, batch: int) -> float:
    """Tokens a second of each GPU of a single node."""
    return fastest(plans(LLAMA_8B, machine, GPUS_A_NODE, batch)).cost.tokens_per_s


def _row(plan: Plan, of_node: float) -> str:
    cost = plan.cost
    cells = [str(plan.mesh), f"{plan.micro_batch}, {plan.accumulation}", plan.recompute, f"{cost.step_s:.2f} s"]
    cells += [f"{cost.tokens_per_s:,.0f}", f"{cost.utilisation:.2f}", f"{cost.tokens_per_s / of_node:.2f}"]
    return f"| {' | '.join([*cells, _gigabytes(cost)])} |"


def _gigabytes(cost: Cost) -> str:
    return f"{cost.memory_bytes / 1e9:.0f} GB"


def picture(path: Path) -> None:
    """Left: published against predicted. Right: the best mesh on more GPUs, and sharding over all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    names = [f"{row.source}\n{row.mesh}{' (fitted)' * row.fitted}" for row in PUBLISHED]
    places = range(len(names))
    left.barh([i - 0.2 for i in places], [row.tokens_per_s for row in PUBLISHED], 0.38, color=BLUE, label="published")
    predicted = [row.predicted().tokens_per_s for row in PUBLISHED]
    left.barh([i + 0.2 for i in places], predicted, 0.38, color=ORANGE, label="predicted")
    left.set_yticks(places, names, fontsize=7)
    left.invert_yaxis()
    left.set(xlabel="tokens/s a GPU", title="Held against what others measured")
    worlds = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    for (machine, cards, colour), (batch, style) in itertools.product(
        ((H100, "8 cards a node", BLUE), (ONE_CARD, "1 card a node", ORANGE)), zip(BATCHES, ("--", "-"), strict=True)
    ):
        rates = [fastest(plans(LLAMA_8B, machine, ranks, batch)).cost.tokens_per_s for ranks in worlds]
        right.plot(worlds, rates, style, marker="o", ms=3, color=colour, label=f"{batch:,} samples, {cards}")
    right.set(
        xscale="log", xlabel="GPUs, 8 a node", ylabel="tokens/s a GPU", title="Llama 3 8B's shapes, all predicted"
    )
    right.set_ylim(0)
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
