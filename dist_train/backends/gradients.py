"""Which parameters get a gradient, where DeepSpeed takes a missing one for zeros: one process leaves such a parameter
as it is, but with a gradient of zeros weight decay and momentum change it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dist_train.errors import ConfigError

# A backward within the backward: what it reaches is no part of the graph before.
REENTRANT = "CheckpointFunctionBackward"


class Whole:
    """ZeRO 1 to 3: holds every backward to what the shards take for granted, that each parameter gets a gradient, on
    every rank. Else ranks would sum gradients of different parameters, or wait for each other for ever.

    Args:
        trained: parameters of the optimizer, by name.
        left_out: parameters that ask for a gradient, but got none when the model was looked at, by name.
        stage: of ZeRO.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], left_out: Mapping[str, nn.Parameter], stage: int):
        self.trained, self.left_out, self.stage = trained, left_out, stage
        self.nodes = {name: torch.autograd.graph.get_gradient_edge(p).node for name, p in trained.items()}
        self.seen: set[torch.Tensor] = set()  # have a gradient, in the step at stage 1, else in the micro-batch
        self.late: set[str] = set()  # reached by a backward within the backward
        self.steps, self.since = 0, ""
        for parameter in [*trained.values(), *left_out.values()]:
            parameter.register_post_accumulate_grad_hook(self.seen.add)

    def resumed(self) -> None:
        """Steps are counted from here."""
        self.since = " since the run was resumed"

    def watch(self, loss: torch.Tensor, last: bool) -> None:
        """Before the backward of `loss`, the last of its step or not."""
        if self.stage > 1:
            self.seen.clear()
        if last or self.stage > 1:
            loss.register_hook(lambda _: self._begin(loss))  # a rank that raises here has reduced nothing yet

    def check(self, last: bool) -> None:
        """After it. Raises ConfigError."""
        for name, parameter in self.left_out.items():
            if parameter in self.seen:
                raise ConfigError(
                    f"model: got a gradient of {name} in step {self.steps + 1}{self.since}, but none when the model "
                    f"was first looked at, so ZeRO {self.stage} does not train it; {self._instead}"
                )
        if len(self.seen) < len(self.trained) and (last or self.stage > 1):
            self._refuse(name for name, p in self.trained.items() if p not in self.seen)
        if last:
            self.seen.clear()
            self.steps += 1

    def _begin(self, loss: torch.Tensor) -> None:
        comes = torch._C._will_engine_execute_node  # what torch's own register_multi_grad_hook asks
        missing = [
            name
            for name, node in self.nodes.items()
            if not comes(node) and name not in self.late and self.trained[name] not in self.seen
        ]
        if missing and not any(node.name() == REENTRANT for node in _nodes(loss.grad_fn)):
            self._refuse(iter(missing))
        self.late.update(missing)

    def _refuse(self, names: Iterator[str]) -> None:
        raise ConfigError(
            f"model: got no gradient of {next(names)} in step {self.steps + 1}{self.since}, which ZeRO {self.stage} "
            f"takes for a gradient of zeros, so that it would be decayed; {self._instead}"
        )

    @property
    def _instead(self) -> str:
        return "write torchrun ... --backend.name ddp, or --backend.zero_stage 0"


class Counted:
    """Stage 0, where every rank holds all gradients: one that no rank has is none, as in one process.

    How many ranks have each is summed together with the gradients.

    Args:
        engine: DeepSpeed's.
        parameters: that ask for a gradient.
    """

    def __init__(self, engine: Any, parameters: list[nn.Parameter]):
        self.parameters, self.missing = parameters, list[int]()
        given = engine._get_gradients_for_reduction

        def counted() -> tuple[list[torch.Tensor], dict]:
            self.missing = [i for i, p in enumerate(parameters) if p.grad is None]
            self.counts = torch.ones(len(parameters), device=parameters[0].device)
            if self.missing:
                self.counts[self.missing] = 0
            gradients, rest = given()
            # It sums real numbers alone.
            gradients = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
            return [*gradients, self.counts], rest

        engine._get_gradients_for_reduction = counted

    def settle(self) -> None:
        """Takes the zeros of those away that no rank has. Waits for the device, but only on a rank that misses any."""
        if self.missing:
            counts = self.counts.tolist()
            for i in self.missing:
                if not counts[i]:
                    self.parameters[i].grad = None


def _nodes(first: Any) -> Iterator[Any]:
    """The nodes of a graph, each once."""
    seen, left = {first}, [first]
    while left:
        node = left.pop()
        yield node
        new = {below for below, _ in node.next_functions if below is not None} - seen
        seen |= new
        left.extend(new)
