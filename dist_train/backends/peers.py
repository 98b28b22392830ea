"""Whether a weight that no layer splits has the same gradient on all ranks that split layers with each other."""

import math
from collections.abc import Mapping

import torch

from dist_train.backends.shards import local_of
from dist_train.errors import ConfigError
from dist_train.ranks import dist
from dist_train.ranks.dist import World

APART = 1e-3  # relative, which rounding is not
SMALL = 1e-6  # of the whole gradient: below, it is 0 but for rounding


def check_peers(gradients: Mapping[str, torch.Tensor], world: World) -> None:
    """Raises ConfigError where a gradient differs: its weight computes with what another layer has split, so that each
    rank has a part of the gradient alone, which nothing would sum. Collective.

    Args:
        gradients: by name, of weights of which each of these ranks has a copy, or the same part.
        world: this rank's place.
    """
    mine = [float(torch.linalg.vector_norm(local_of(g))) if g.numel() else 0.0 for g in gradients.values()]
    if not mine:
        return
    every = dist.gather_numbers(mine)
    for first in range(0, world.size, world.tensor):
        peers = every[first : first + world.tensor]
        whole = math.sqrt(sum(value * value for value in peers[0]))
        for name, *norms in zip(gradients, *peers, strict=True):
            apart = max(norms) - min(norms)
            if apart > APART * max(norms) and apart > SMALL * whole:
                least, most = (first + norms.index(of(norms)) for of in (min, max))
                raise ConfigError(
                    f"backend.mesh.tensor: got a gradient of {name} with norm {min(norms):.4g} on rank {least}, and "
                    f"{max(norms):.4g} on rank {most}, though its layer is not split: it computes with what another "
                    f"layer has split; expected it to be split too, or the layer before it to gather what it gives"
                )
