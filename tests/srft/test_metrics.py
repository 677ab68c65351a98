import math

import torch

from srft.metrics import mean, peak_memory_mb, std


def test_means():
    assert mean([1.0, 2.0]) == 1.5 and std([1.0, 3.0]) == 1.0 and std([2.0]) == 0.0
    assert math.isnan(mean([])) and math.isnan(std([]))
    assert 10 < peak_memory_mb(torch.device("cpu")) < 1e6
