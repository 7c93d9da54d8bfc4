import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from age_vlm.commands.planning.peak_memory import PeakMemory


def test_the_peak_is_of_what_is_alive_at_once():
    with PeakMemory({"all": {}}) as memory:
        first = torch.empty(1000)
        second = first * 2
        del first
        third = second + 1  # as many bytes as `first` left
        del second, third
        torch.empty(100)
    assert memory.peaks["all"] == {"other": 8000}


def test_views_are_not_memory_and_changes_in_place_neither():
    with PeakMemory({"all": {}}) as memory:
        whole = torch.empty(10, 100)
        part = whole[2:].transpose(0, 1)
        part.add_(1)
    assert memory.peaks["all"] == {"other": 4000}


def test_kinds_and_shares():
    held = torch.empty(100)
    memory = PeakMemory({"all": {}, "half": {"weights": 0.5}})
    memory.count_as("weights", held)
    with memory, memory.kind("inner"):
        torch.empty(25)
    assert memory.peaks == {"all": {"weights": 400, "inner": 100}, "half": {"weights": 200, "inner": 100}}


def test_each_share_has_its_own_moment():
    memory = PeakMemory({"all": {}, "divided": {"weights": 0.1}})
    with memory:
        with memory.kind("weights"):
            weights = torch.empty(100)
            del weights
        torch.empty(50)
    assert memory.peaks == {"all": {"weights": 400}, "divided": {"other": 200}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_saves_is_alive_and_fake_tensors_count_as_real_ones(dtype):
    def peak() -> dict:
        weight = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        with PeakMemory({"all": {}}) as memory:
            (torch.ones(8, 64, dtype=dtype) @ weight).exp().sin().sum().backward()
        return memory.peaks["all"]

    with FakeTensorMode():
        fake = peak()
    assert fake == peak()
    # The gradient is made from the input and the gradient of the product.
    assert fake["other"] >= (64 * 64 + 2 * 8 * 64) * dtype.itemsize
