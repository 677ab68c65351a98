"""The floor: the products of a task and no others, in chunks that a GPU likes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import providers
from bench.cases import TASKS, Case, Shape
from bench.inputs import IGNORED, Inputs, make
from bench.providers import Abilities, bare_products, chunkings

GPU = SimpleNamespace(is_cuda=True)


@pytest.mark.parametrize("tokens", (1, 300, 8192, 32768, 2**20))
def test_chunks_on_a_gpu_are_alike_and_of_whole_tiles(tokens):
    vocab = 151936
    (rows,) = chunkings(tokens, vocab, GPU)
    count = -(-tokens // rows)
    assert rows == tokens or rows % 256 == 0
    assert rows * vocab <= 2**31 + 256 * vocab and count == -(-tokens * vocab // 2**31)
    assert tokens - (count - 1) * rows > rows - 256 * count  # the last one


def test_chunks_on_a_cpu_stay_below_a_gigabyte():
    like = torch.empty(0)
    assert chunkings(512, 49152, like) == [512]
    assert chunkings(2048, 49152, like) == [512, 2048]
    assert max(chunkings(2**20, 49152, like)) * 49152 * 4 <= 10**9


@pytest.mark.parametrize("task, products", [("scoring", 1), ("frozen head", 2), ("cross entropy", 3), ("two pass", 4)])
def test_the_floor_is_its_products(task, products, monkeypatch):
    inputs = make(Case("full loss", task, Shape(48, 16, 128), live=0.5), "cpu", torch.float32)
    floor, done = bare_products(inputs, TASKS[task]), []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append((*a.shape, b.shape[1])) or mm(a, b, out=out))
    floor(inputs)
    assert len(done) == products and all(sorted(shape) == [16, 24, 128] for shape in done)  # 24 live tokens


def test_the_faster_chunks_are_the_floor(monkeypatch):
    tried = []
    monkeypatch.setattr(providers, "seconds_of", lambda call, inputs: tried.append(call) or -len(tried))
    monkeypatch.setattr(providers, "chunkings", lambda *_: [8, 16])
    inputs = make(Case("full loss", "srft", Shape(16, 8, 64)), "cpu", torch.float32)
    assert bare_products(inputs, TASKS["srft"]) is tried[1] and len(tried) == 2


@pytest.mark.parametrize("compacts", [False, True])
@pytest.mark.parametrize("live", [1.0, 0.5])
def test_tokens_are_only_picked_where_some_are_ignored(live, compacts, monkeypatch):
    """Indexing by a mask waits for the device; where all are live the result is that of picking all."""
    inputs = make(Case("full loss", "srft", Shape(48, 16, 128), live=live), "cpu", torch.float32)
    call = Abilities(statistics=statistics, compacts=compacts).call("srft")
    given = call(replace(inputs, live_tokens=None))  # nobody knows how many: they are looked for
    asked = []
    monkeypatch.setattr(Inputs, "live", property(lambda self: asked.append(1) or self.target != IGNORED))
    found = call(inputs)
    assert len(asked) == (live < 1)
    for name, value in found.items():
        if name in ("loss", "dx", "dW"):
            assert torch.equal(value, given[name]), name


def statistics(x, weight, target):
    logp = (x @ weight.t()).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
