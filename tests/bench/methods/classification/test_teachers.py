"""SCRUB and Bad Teacher."""

import copy

import torch
from support.squares import pixels
from torch.nn.functional import kl_div

from more_hf_bench.methods.classification import scrub
from more_hf_bench.methods.classification.training import reinitialised
from more_hf_bench.methods.registry import CLASSIFICATION


def test_softened_kl_against_its_definition():
    teacher, student = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    assert torch.allclose(scrub.softened_kl(teacher, student, 3.0), 9 * (p * (p / q).log()).sum(1).mean())
    assert scrub.softened_kl(teacher, teacher, 3.0).abs() < 1e-12


def test_scrub_without_ascent_and_with_its_own_answers_stays_near_the_teacher(model, splits):
    far, near = copy.deepcopy(model), copy.deepcopy(model)
    scrub.scrub(far, splits, lr=0.02, max_epochs=3)
    scrub.scrub(near, splits, lr=0.02, max_epochs=0)
    with torch.no_grad():
        original, *edited = (m(pixels(splits.f)).log_softmax(1) for m in (model, near, far))
    distances = [kl_div(log_q, original, log_target=True, reduction="batchmean") for log_q in edited]
    assert distances[1] > 10 * distances[0]


def test_bad_teacher_moves_to_the_bad_one_on_forget_and_to_the_good_one_on_remain(model, splits):
    good, bad = copy.deepcopy(model), reinitialised(model, seed=0).eval()
    CLASSIFICATION["bad-teacher"].load()(model, splits, lr=0.005, epochs=150, share=1.0)
    for part, teacher, other in ((splits.f, bad, good), (splits.r, good, bad)):
        with torch.no_grad():
            answers = [m(pixels(part)).softmax(1) for m in (model, teacher, other)]
        assert (answers[0] - answers[1]).abs().mean() < 0.25 * (answers[0] - answers[2]).abs().mean()
