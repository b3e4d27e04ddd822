"""bench.stages on a small pass: every stage is timed."""

import torch

from bench import stages
from loft_fast.demo.digits import SmallCNN


def test_a_request_names_its_stages():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(60, 1, 28, 28, generator=generator), torch.arange(60) % 3
    gone = labels == 0
    retain, forget = [(images[~gone], labels[~gone])], [(images[gone], labels[gone])]
    seconds = stages.request(SmallCNN(features=16), retain, forget)
    assert list(seconds) == ["backbone", "moments", "solve", "fold"]
    assert min(seconds.values()) > 0
