"""SCRUB, Bad Teacher, boundary shrink and layer attack unlearning."""

import copy

import torch
from support.compare import changed, state
from support.squares import head_inputs, pixels, unlearn
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from more_hf_bench.methods.classification.teachers import lau_attack, nearest_class, scrub, softened_kl
from more_hf_bench.methods.classification.training import reinitialised


def test_softened_kl_against_its_definition():
    teacher, student = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    assert torch.allclose(softened_kl(teacher, student, 3.0), 9 * (p * (p / q).log()).sum(1).mean())
    assert softened_kl(teacher, teacher, 3.0).abs() < 1e-12


def test_scrub_without_ascent_and_with_its_own_answers_stays_near_the_teacher(model, splits):
    far, near = copy.deepcopy(model), copy.deepcopy(model)
    scrub(far, splits, lr=0.02, max_epochs=3)
    scrub(near, splits, lr=0.02, max_epochs=0)
    with torch.no_grad():
        original, *edited = (m(pixels(splits.f)).log_softmax(1) for m in (model, near, far))
    distances = [kl_div(log_q, original, log_target=True, reduction="batchmean") for log_q in edited]
    assert distances[1] > 10 * distances[0]


def test_bad_teacher_moves_to_the_bad_one_on_forget_and_to_the_good_one_on_remain(model, splits):
    good, bad = model, reinitialised(model, seed=0).eval()
    model = unlearn("bad-teacher", model, splits, lr=0.005, epochs=150, share=1.0)
    for part, teacher, other in ((splits.f, bad, good), (splits.r, good, bad)):
        with torch.no_grad():
            answers = [m(pixels(part)).softmax(1) for m in (model, teacher, other)]
        assert (answers[0] - answers[1]).abs().mean() < 0.25 * (answers[0] - answers[2]).abs().mean()


def test_boundary_shrink_attacks_along_the_gradient():
    """Logits ±w·x: the attack moves every pixel by the bound against its class, which has a closed form."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(25, 2, bias=False))
    w = torch.linspace(-1, 1, 25)
    with torch.no_grad():
        flat[1].weight.copy_(torch.stack([w, -w]))
    images = torch.rand(50, 1, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    score = images.flatten(1) @ w
    labels = (score < 0).long()
    moved = (images.flatten(1) - 0.1 * w.sign() * score.sign()[:, None]).clamp(images.min(), images.max()) @ w
    found = nearest_class(flat, images, labels, bound=0.1)
    assert torch.equal(found, (moved < 0).long())
    assert (found != labels).any()
    assert (found == labels).any()


def test_lau_attack_stays_in_its_box_and_raises_the_loss(model, splits):
    head = model[-1]
    Z = head_inputs(model, splits.f).float()
    attacked = lau_attack(head, Z, splits.f.labels, bound=0.3, step=0.4, steps=5)
    assert (attacked - Z).abs().max() <= 0.3 + 1e-6
    before, after = (cross_entropy(head(z), splits.f.labels, reduction="none") for z in (Z, attacked))
    assert (after > before).all()


def test_lau_changes_the_head_alone(model, splits):
    before = state(model)
    model = unlearn("lau", model, splits, lr=0.1)
    assert changed(model, before) == {"4.weight", "4.bias"}
