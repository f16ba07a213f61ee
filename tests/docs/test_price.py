"""What an edit inside the denoiser costs: the lines that two benchmarks share, as they stand there."""

import importlib
from pathlib import Path


FOLDER = Path(__file__).parents[2] / "benchmarks" / "attacks" / "pictures"


def cost(method, forget, moved):
    return {"method": method, "forget": forget, "lpips_r": moved, "lpips_none": "0.1", "content_r": "95.55"}


def attack(method, budget, recovered, *, forget="Noto", variant="1 token"):
    row = {"attack": "inversion", "method": method, "forget": forget, "variant": variant}
    return {**row, "budget": budget, "recovered": recovered}


def test_a_line_is_what_both_have(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    price = importlib.import_module("price")
    costs = [cost("more-denoiser", "Noto", "0.0384"), cost("more", "Noto", "0.0014")]
    costs.append(cost("more", "Fluent", "0"))  # which was not attacked
    costs[1]["lpips_none"] = ""  # no prompt without a name was drawn
    attacks = [attack("more", "15", "55.0"), attack("more", "150", "70.0")]
    attacks.append(attack("more", "150", "99.0", variant="never forgotten"))
    attacks += [attack("more-denoiser", "15", "0.0"), attack("more-denoiser", "15", "0.0")]
    attacks += [attack("more-denoiser", "150", "20.0"), attack("more-denoiser", "150", "30.0")]  # two runs
    lines = price.prices(costs, attacks)
    first, second = lines
    steps = {"after 15 steps": 55.0, "after 150 steps": 70.0}
    moved = {"lpips_r": 0.001, "lpips_none": None, "content_r": 95.5}
    assert first == {"method": "more", "forget": "Noto", **moved, **steps}
    steps = {"after 15 steps": 0.0, "after 150 steps": 25.0}
    moved = {"lpips_r": 0.038, "lpips_none": 0.1, "content_r": 95.5}
    assert second == {"method": "more-denoiser", "forget": "Noto", **moved, **steps}
    (panel,) = price.price_figure(lines).axes
    assert panel.lines[0].get_xydata().tolist() == [[0.001, 70.0], [0.038, 25.0]]
