"""python -m dist_train explain [--config FILE.yaml] [--section.key value ...]: where torch.compile breaks the graph.

Traces the model on one micro-batch, without compiling or training it.
"""

import logging
import os
from collections.abc import Mapping

from dist_train.config.load import load
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the number of graphs and of breaks, and each break with its reason and place."""
    config = load(argv, "python -m dist_train explain")
    check(config, launcher, writes=False)

    import torch

    from dist_train.data.order import Plan
    from dist_train.ranks import dist
    from dist_train.run import assemble
    from dist_train.tasks.base import inputs_and_targets

    device = dist.resolve_device(config.train.device, launcher.local_rank)
    parts = assemble.build(config, device)
    alone = dist.World(0, 1, 0, 1, device, launcher.name)
    plan = Plan.of(len(parts.feed.split), config, alone)
    batch = next(parts.feed.steps(plan))
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it warns of breaks, which are printed below
    inputs, _ = inputs_and_targets(batch.tree)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    with parts.precision.autocast():
        found = torch._dynamo.explain(parts.model)(*args, **kwargs)
    print(f"graphs {found.graph_count}, breaks {found.graph_break_count}, operations {found.op_count}")
    for number, reason in enumerate(found.break_reasons, start=1):
        print(f"break {number}: {' '.join(reason.reason.split()).partition(' Hint:')[0]}")
        for frame in reason.user_stack:
            print(f"  {os.path.relpath(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}")
    return 0
