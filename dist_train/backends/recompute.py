"""backend.recompute: activations that are not kept for the backward, but computed again there, to the same bits.

torch's own tools do it. What is ours is that nothing but the arithmetic is done twice: draws are made at the places
that they had (models/draw_places.py), and a buffer that forward changes is what it was then, and after that what it is
now. Norms that exchange statistics among the ranks exchange them again, on all ranks alike.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_train.config.tree import Config, budget_of
from dist_train.errors import ConfigError
from dist_train.models.blocks import blocks
from dist_train.models.draw_places import now

Contexts = tuple[AbstractContextManager, AbstractContextManager]  # of a forward, and of the same again
Place = tuple[nn.Module, str]  # of a buffer

aten = torch.ops.aten
# What `selective` keeps: every second product with a weight, as torchtitan does, and each of these. Not the products
# within attention that is written out, whose [tokens, tokens] numbers are what takes the memory (V. Korthikanti and
# others, "Reducing activation recomputation in large transformer models", 2022).
PRODUCTS = {aten.mm.default, aten.addmm.default}
KEPT = {
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def layers(model: nn.Module, config: Config) -> list[nn.Module]:
    """The layers that are computed again.

    Args:
        model: before it is sharded or wrapped.
        config: of the run.
    """
    if config.backend.recompute not in ("blocks", "selective"):
        return []
    return [layer for layer in blocks(model, config.model.blocks) if _gains(layer)]


def check(model: nn.Module, config: Config) -> None:
    """Raises ConfigError where a model has no layers that are worth to be computed again; see `layers`."""
    asked, named = config.backend.recompute, config.model.blocks
    if asked not in ("blocks", "selective") or layers(model, config):
        return
    kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in model.modules() if m is not model and _gains(m)))
    raise ConfigError(
        f"backend.recompute: got {asked}, but the model has {'no blocks' if named is None else f'none in {named}'} "
        f"that keep more than what they are called with, as a single layer of torch.nn does not; name larger ones as "
        f"--model.blocks, by names or classes{f' (it has {kinds})' if kinds else ''}, or write "
        f"--backend.recompute none"
    )


def _gains(layer: nn.Module) -> bool:
    """Whether a layer keeps more than what it is called with: a single one of torch's, such as nn.Linear, does not."""
    own = not type(layer).__module__.startswith("torch.nn.modules.") or isinstance(layer, nn.RNNBase)
    return (own or any(True for _ in layer.children())) and next(layer.parameters(), None) is not None


def apply(model: nn.Module, config: Config, changing: Iterable[Place], hooked: bool) -> None:
    """Has a model compute again what backend.recompute says. Names and hooks stay as they are; what is compiled or
    sharded after it goes around it.

    Args:
        model: before it is compiled, sharded or wrapped.
        config: of the run.
        changing: the buffers that forward changes.
        hooked: the layers within a block have hooks that belong together, before and after forward.
    """
    if config.compile.mode != "off":
        _tell_compiler(budget_of(config.backend))
    places, selective = list(changing), config.backend.recompute == "selective"
    for layer in layers(model, config):
        own = set(layer.modules())
        _wrap(layer, [(module, name) for module, name in places if module in own], selective, not hooked)


def _tell_compiler(budget: float | None) -> None:
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = 1.0 if budget is None else budget
    # A count of draws goes on in forward, which is all that is asked: the backward does what the graph of forward says.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # That contexts are given, and that these do not like a layer that writes in place, which a graph has none of.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def _wrap(layer: nn.Module, places: list[Place], selective: bool, early_stop: bool) -> None:
    """Has a layer keep what it is called with, and compute the rest again.

    Args:
        layer: of the model.
        places: its buffers that forward changes.
        selective: it also keeps what `Selective` says.
        early_stop: nothing is computed after the last tensor that the backward needs, and no hook called.
    """
    inner = layer.forward

    def contexts() -> Contexts:
        policy = Selective() if selective else _nothing
        if torch._guards.TracingContext.try_get() is not None:  # of a graph, which only marks what it computes again
            return create_selective_checkpoint_contexts(policy)
        if not isinstance(policy, Selective):
            return nullcontext(), _again(places, nullcontext())
        keeping, giving = create_selective_checkpoint_contexts(policy)
        return _both(keeping, Copies(policy)), _again(places, giving)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        of = {"use_reentrant": False, "context_fn": contexts, "early_stop": early_stop}
        return checkpoint(inner, *args, **of, **kwargs)

    layer.forward = forward


def _nothing(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


class Selective:
    """Says which results of a layer's forward are kept, being asked for each, in order.

    Attributes:
        keeps: the last one.
    """

    def __init__(self) -> None:
        self.keeps = False
        self.products = {False: 0, True: 0}  # in forward, and in forward again

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """What torch asks of a policy."""
        self.keeps = operator in KEPT and not _drops(operator, args, kwargs)
        if operator in PRODUCTS:
            self.products[context.is_recompute] += 1
            self.keeps = self.products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if self.keeps else CheckpointPolicy.PREFER_RECOMPUTE


class Copies(TorchDispatchMode):
    """Gives the layer a copy of what is kept, as it may write in place into what it is given. torch notices some of
    these writes, but not those into the product of three dimensions, which is a view that it does not know as one.

    Args:
        policy: has been asked about each result before it comes here.
    """

    def __init__(self, policy: Selective):
        super().__init__()
        self.policy = policy

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As the modes of torch's that it goes with."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.policy.keeps = False
        found = func(*args, **(kwargs or {}))
        if not self.policy.keeps:
            return found
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, found)


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def _drops(attention: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws: where it was left out, the generator would stand elsewhere for what draws after it."""
    arguments = [argument.name for argument in attention._schema.arguments]
    if "dropout_p" not in arguments:
        return False
    at = arguments.index("dropout_p")
    return bool(args[at] if at < len(args) else kwargs.get("dropout_p", 0.0))


def _again(places: list[Place], kept: AbstractContextManager) -> AbstractContextManager[None]:
    """Around a forward again, made before that forward for the first time.

    Args:
        places: buffers that it changes.
        kept: entered within.
    """
    mark, values = now.mark(), [module._buffers[name].detach().clone() for module, name in places]

    @contextmanager
    def again() -> Iterator[None]:
        changed = [module._buffers[name] for module, name in places]
        # Others in their place, as theirs may be kept for the backward.
        for (module, name), value in zip(places, values, strict=True):
            module._buffers[name] = value.clone()
        try:
            with now.from_(mark), kept:
                yield
        finally:
            for (module, name), value in zip(places, changed, strict=True):
                module._buffers[name] = value

    return again()
