"""The loss in chunks: the same numbers, in less memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from dist_train.models import chunked_loss as chunks
from dist_train.models.chunked_loss import chunked_loss


def made(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden [2, 9, 16], weight [50, 16], targets, and a factor for each loss."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16, generator=g, dtype=dtype), torch.randn(50, 16, generator=g, dtype=dtype)
    targets = torch.randint(50, (2, 9), generator=g)
    targets[0, 3:6] = targets[1, -1] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(2, 9, generator=g, dtype=dtype)


def found(loss_of, dtype=torch.float32, short=None) -> list[torch.Tensor]:
    """Losses and gradients."""
    hidden, weight, targets, factors = made(dtype)
    with torch.autocast("cpu", short, enabled=short is not None):
        losses = loss_of(hidden, weight, targets)
    (losses * factors).sum().backward()
    return [losses.detach(), hidden.grad, weight.grad]


def plain(hidden, weight, targets):
    logits = F.linear(hidden, weight).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


@pytest.mark.parametrize("at_once", [1, 150, 200, 1 << 20])  # a row; three, which divide 18; four, which do not; all
def test_it_is_the_cross_entropy(monkeypatch, at_once):
    monkeypatch.setattr(chunks, "AT_ONCE", at_once)
    for dtype, near in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        ours, theirs = found(chunked_loss, dtype), found(plain, dtype)
        assert ours[0].dtype == dtype and (ours[0][made()[2] == -100] == 0).all()
        for mine, wanted in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, wanted, rtol=near, atol=near)
    ours, theirs = found(chunked_loss, short=torch.bfloat16), found(plain, short=torch.bfloat16)
    assert ours[0].dtype == torch.float32
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-6)  # logits are rounded as they are
    for mine, wanted in zip(ours[1:], theirs[1:], strict=True):
        assert (mine - wanted).norm() < 0.01 * wanted.norm()


def test_what_is_not_trained(monkeypatch):
    monkeypatch.setattr(chunks, "AT_ONCE", 100)
    hidden, weight, targets, _ = made()
    weight.requires_grad_(False)
    chunked_loss(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, targets).requires_grad


def test_compiled(monkeypatch):
    monkeypatch.setattr(chunks, "AT_ONCE", 150)
    compiled = torch.compile(chunked_loss, backend="aot_eager", fullgraph=True)
    for mine, wanted in zip(found(compiled), found(plain), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-6, atol=1e-6)


PEAK = """
    import torch, torch.nn.functional as F
    from pathlib import Path
    from dist_train.models.chunked_loss import chunked_loss
    def plain(hidden, weight, targets):
        return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    def peak(loss_of, rows):
        hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(60_000, 16, requires_grad=True)
        loss_of(hidden, weight, torch.zeros(rows, dtype=torch.int64)).sum().backward()
        # Of this program; getrusage has the process's that started it, as well.
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    first = peak(chunked_loss, 600)  # more than two chunks
    then = peak(chunked_loss, 1800)
    print(then - first, peak(plain, 1800) - then)
"""


def test_logits_are_never_whole():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK)], capture_output=True, text=True, timeout=300, check=True
    )
    (ours, theirs), logits = map(int, done.stdout.split()), 1800 * 60_000 * 4
    assert ours < logits / 10
    assert theirs > logits / 2  # beyond a few chunks: what the plain way takes is seen
