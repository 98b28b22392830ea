"""The random generators of a rank, which a model may draw from in training (dropout), as tensors."""

import random

import numpy as np
import torch


def state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators of torch, of the device, of numpy and of Python."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        tensors["device"] = torch.get_device_module(device).get_rng_state(device)
    _, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.array([*keys, position, has_gauss], np.int64))
    tensors["numpy.gauss"] = torch.tensor(gauss, dtype=torch.float64)
    _, words, next_gauss = random.getstate()
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    tensors["python.gauss"] = torch.tensor(float("nan") if next_gauss is None else next_gauss, dtype=torch.float64)
    return tensors


def restore(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Sets what `state` gave. The device's is left as it is if it is not among them."""
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors["device"], device)
    *keys, position, has_gauss = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(tensors["numpy.gauss"])))
    gauss = float(tensors["python.gauss"])
    random.setstate((3, tuple(tensors["python"].tolist()), None if gauss != gauss else gauss))
