"""Layer attack unlearning."""

from support.compare import changed, state
from support.squares import head_inputs
from torch.nn.functional import cross_entropy

from more_hf_bench.methods.classification import lau
from more_hf_bench.methods.registry import CLASSIFICATION


def test_lau_attack_stays_in_its_box_and_raises_the_loss(model, splits):
    head = model[-1]
    Z = head_inputs(model, splits.f).float()
    attacked = lau.attack(head, Z, splits.f.labels, bound=0.3, step=0.4, steps=5)
    assert (attacked - Z).abs().max() <= 0.3 + 1e-6
    before, after = (cross_entropy(head(z), splits.f.labels, reduction="none") for z in (Z, attacked))
    assert (after > before).all()


def test_lau_changes_the_head_alone(model, splits):
    before = state(model)
    CLASSIFICATION["lau"].load()(model, splits, lr=0.1)
    assert changed(model, before) == {"4.weight", "4.bias"}
