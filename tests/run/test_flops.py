"""What is counted of a decoder by arithmetic, against what torch counts."""

import dataclasses

import pytest
import torch
from token_cells import config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_train.models.decoder import Decoder
from dist_train.run import flops

from parity_cells import ALONE


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_token(tied: bool):
    model = Decoder(257, 16, layers=3, width=64, heads=4, kv_heads=2, head_size=24, tied=tied)
    rows = torch.zeros(2, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(rows, targets=rows).sum().backward()
    assert flops.of_token(model) * rows.numel() == counter.get_total_flops()


def test_utilisation(monkeypatch: pytest.MonkeyPatch):
    model = Decoder(257, 16, layers=1, width=64)
    assert flops.peak_s_of_sample(config(), ALONE, model) is None  # no peak is known of a CPU
    monkeypatch.setattr(flops, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    two = dataclasses.replace(ALONE, size=2, device=torch.device("cuda"))
    expected = flops.of_token(model) * 16 / (2 * 67e12)
    assert flops.peak_s_of_sample(config(), two, model) == pytest.approx(expected)
    assert flops.peak_s_of_sample(config(), two, torch.nn.Linear(2, 2)) is None
