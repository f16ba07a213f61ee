"""A pass that is killed goes on from its file, and gives what a pass without a break gives, bit for bit."""

import pytest
import torch
from support.compare import same, state
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset

import more_hf
from more_hf import PrototypeError


@pytest.fixture(autouse=True)
def write_after_every_batch(monkeypatch):
    monkeypatch.setattr("more_hf.classification.resumed.SAVED_EVERY", 0.0)


@pytest.fixture
def loader(digits):
    return DataLoader(TensorDataset(digits[0][:600], digits[1][:600]), batch_size=50)


class Killed(Exception):
    """In place of a signal."""


def stop_at(model, batch):
    """Let the model fail at its n-th call, and count its calls."""
    calls = []

    def count(*args):
        calls.append(None)
        if len(calls) == batch:
            raise Killed

    return calls, model.register_forward_pre_hook(count)


def test_a_killed_pass_goes_on(model, loader, tmp_path):
    whole = more_hf.collect_prototypes(model, loader)
    _, hook = stop_at(model, 8)
    with pytest.raises(Killed):
        more_hf.collect_prototypes(model, loader, resume=tmp_path / "pass")
    hook.remove()

    calls, hook = stop_at(model, 0)
    found = more_hf.collect_prototypes(model, loader, resume=tmp_path / "pass")
    # two to find the head and its width, and those of twelve that were missing
    assert len(calls) == 2 + 12 - 6
    assert torch.equal(found.matrix, whole.matrix)
    assert torch.equal(found.second_moment, whole.second_moment)
    calls.clear()
    more_hf.erase_classes(model, loader, "four", resume=tmp_path / "pass")
    assert len(calls) == 2
    hook.remove()
    once = more_hf.get_erasure(model).remap.D_F
    more_hf.restore(model)
    more_hf.erase_classes(model, whole, "four")
    assert torch.equal(more_hf.get_erasure(model).remap.D_F, once)


def test_another_pass_is_refused(model, loader, digits, tmp_path):
    before, file = state(model), tmp_path / "pass"
    more_hf.collect_prototypes(model, loader, resume=file)
    fewer = DataLoader(loader.dataset, batch_size=60)
    shuffled = DataLoader(loader.dataset, batch_size=50, shuffle=True)
    drawn = SubsetRandomSampler(range(600))
    subset = DataLoader(loader.dataset, batch_size=50, sampler=drawn)
    batches = DataLoader(loader.dataset, batch_sampler=BatchSampler(drawn, 50, drop_last=False))
    own = DataLoader(loader.dataset, batch_sampler=[list(range(50))] * 12)
    (tmp_path / "text").write_text("no sums")
    for data, where, words in (
        (fewer, file, "`batches` was 12 and is 10"),
        (shuffled, file, "may shuffle"),
        (subset, file, "may shuffle"),
        (batches, file, "may shuffle"),
        (own, file, "may shuffle"),
        ([digits], file, "may shuffle"),
        (loader, tmp_path / "text", "does not hold the sums"),
    ):
        with pytest.raises(PrototypeError, match=words):
            more_hf.erase_classes(model, data, "four", resume=where)
    assert same(model, before)
    with torch.no_grad():
        model.classifier[1].weight += 1
    with pytest.raises(PrototypeError, match="`heads` was"):
        more_hf.erase_classes(model, loader, "four", resume=file)
