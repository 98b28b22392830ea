"""Several parts of a model, each with an optimizer of its own, as one backend: the networks of a GAN, an actor and its
critic. Each part is prepared by a backend of its own; together they have the state of the whole model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from dist_train.backends.base import Backend, OptimizerFactory, Reader, SavedTensors
from dist_train.backends.shards import Shards
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.ranks.dist import World

Make = Callable[[str], Backend]


class Several(Backend):
    """A backend for each part.

    Args:
        config: of the run.
        world: this rank's place.
        make: gives the backend of a part, by its name.
        factories: of the optimizer of each part, by the name of a child of the model. Together they have all weights.
    """

    def __init__(self, config: Config, world: World, make: Make, factories: Mapping[str, OptimizerFactory]):
        super().__init__(config, world)
        self.factories = factories
        self.parts = {name: make(name) for name in factories}
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.pending: set[str] = set()  # parts with gradients that no update has taken

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend. The optimizers are those of the parts; what is returned is the first one."""
        children = dict(model.named_children())
        _check(model, children, self.factories)
        for name, part in self.parts.items():
            self.models[name], self.optimizers[name] = part.prepare(children[name], self.factories[name])
        self.model, self.optimizer = model, next(iter(self.optimizers.values()))
        self.parameters = [p for part in self.parts.values() for p in part.parameters]
        return model, self.optimizer

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See Backend."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.accumulate(last))
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Not without the part that it is for."""
        raise AssertionError("use backward_of")

    def backward_of(self, name: str, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss` to those of a part. What the graph gives the others, such as a discriminator that
        a generator's loss goes through, is left out. Raises ConfigError."""
        others = self.pending - {name}
        if others:
            raise ConfigError(
                f"session: got a backward of {name} while gradients of {', '.join(sorted(others))} wait for their "
                f"update, which would mix with it; expected update({sorted(others)[0]!r}) before; with micro-batches, "
                f"go through the step once for each part"
            )
        self.parts[name].backward(loss)
        self.pending.add(name)
        for other, part in self.parts.items():
            if other != name:
                for parameter in part.parameters:
                    parameter.grad = None

    def differentiate(self, loss: torch.Tensor) -> None:
        """Not without the part that it is for."""
        raise AssertionError("use backward_of")

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """Not without the part that it is for."""
        raise AssertionError("use step_of")

    def step_of(self, name: str, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend.step, of a part. Raises ConfigError where it has no gradients."""
        if name not in self.pending:
            raise ConfigError(f"session: got update({name!r}) without a backward of {name} before it; expected one")
        self.pending.discard(name)
        norm = self.parts[name].step(max_norm, measure)
        self.taken = all(part.taken for part in self.parts.values())
        return norm

    def weights(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        every = {name: part.weights() for name, part in self.parts.items()}
        return {f"{name}.{key}": value for name, found in every.items() for key, value in found.items()}

    def state(self) -> dict[str, Shards]:
        """See Backend."""
        return {
            _whole(name, path): shards for name, part in self.parts.items() for path, shards in part.state().items()
        }

    def load(self, saved: SavedTensors, read: Reader) -> list[str]:
        """See Backend."""
        lines = []
        for name, part in self.parts.items():
            mine = {_of_part(name, path): entry for path, entry in saved.items() if _is_of(name, path)}

            def read_mine(shards: Mapping[str, Shards], name: str = name) -> None:
                read({_whole(name, path): value for path, value in shards.items()})

            lines += [f"{name}: {line}" for line in part.load(mine, read_mine)]
        return lines

    def updated(self) -> list[torch.Tensor]:
        """See Backend."""
        return [tensor for part in self.parts.values() for tensor in part.updated()]

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
        """See Backend."""
        found, left = {}, list(tensors)
        for name, part in self.parts.items():
            count = len(part.updated())
            found |= {f"{name}.{key}": shards for key, shards in part.named(left[:count]).items()}
            left = left[count:]
        return found

    def refresh(self) -> None:
        """See Backend."""
        for part in self.parts.values():
            part.refresh()


def _check(model: nn.Module, children: Mapping[str, nn.Module], parts: Mapping[str, OptimizerFactory]) -> None:
    """Raises ConfigError where the parts are not the whole of the model, each by itself."""
    for name in parts:
        if name not in children:
            raise ConfigError(f"optimizers: got {name!r}, expected children of the model: {', '.join(children)}")
    owner: dict[torch.Tensor, str] = {}
    for name in parts:
        for parameter in children[name].parameters():
            if owner.setdefault(parameter, name) != name:
                raise ConfigError(
                    f"optimizers: got a weight that {owner[parameter]} and {name} share, expected parts with weights "
                    f"of their own"
                )
    loose = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if name.split(".")[0] not in parts]
    if loose:
        raise ConfigError(
            f"optimizers: got no optimizer for {loose[0]}, expected all of the model in {', '.join(parts)}"
        )


def _is_of(name: str, path: str) -> bool:
    section, _, rest = path.partition(".")
    return section in ("model", "optim") and rest.startswith(f"{name}.")


def _of_part(name: str, path: str) -> str:
    """model.NAME.x is model.x to the part."""
    section, _, rest = path.partition(".")
    return f"{section}.{rest.removeprefix(name + '.')}"


def _whole(name: str, path: str) -> str:
    section, _, rest = path.partition(".")
    return f"{section}.{name}.{rest}"
