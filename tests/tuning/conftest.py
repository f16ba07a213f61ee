"""A painter in place of the pipeline's drawing: it paints what the edited weights say a prompt names."""

import pytest
import torch

from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.sites import find_denoiser, find_sites


COLORS = {"Noto": (200, 40, 40), "Fluent": (40, 200, 60), "Twemoji": (40, 60, 200), "": (120, 120, 120)}
SENTENCES = ["a fox in the style of {}", "a crab by {}", "a pizza in the style of {}", "a bus by {}"]


class Painter:
    """
    Paints each prompt in the color of the name that the first edited layer, asked for the prompt's end, reads
    most like: what the layer answered for that name before anything was edited.
    """

    def __init__(self, pipe):
        self.encoder = Encoder(pipe)
        self.layer = next(iter(find_sites(pipe, find_denoiser(pipe))))
        self.colors = dict(COLORS)
        self.drawn, self.stops_at = 0, None
        self.features, self.answers = {}, {}  # of prompts, which no edit changes; and of names
        for name in COLORS:
            prompts = [sentence.replace("{}", name) for sentence in [*SENTENCES, "a {}"]]
            self.answers[name] = [self.answer(pipe, prompt) for prompt in prompts]

    def answer(self, pipe, prompt):
        if prompt not in self.features:
            end = self.encoder.layout(prompt).end
            self.features[prompt] = self.encoder.encode([prompt])[0, end].double()
        return pipe.unet.get_submodule(self.layer).weight.detach().double() @ self.features[prompt]

    def __call__(self, pipe, prompts, seeds, sampling):
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            if self.drawn == self.stops_at:
                raise KeyboardInterrupt
            self.drawn += 1
            own, far = self.answer(pipe, prompt), {}
            for name, answers in self.answers.items():
                far[name] = min(float((own - answer).norm()) for answer in answers)
            noise = torch.randint(-30, 30, (3, 64, 64), generator=torch.Generator().manual_seed(seed))
            # the thing is a square in a corner
            thing = next((i for i, line in enumerate(SENTENCES) if line.split()[1] in prompt), 0)
            top, left = 32 * (thing // 2), 32 * (thing % 2)
            noise[:, top : top + 32, left : left + 32] += 50
            color = torch.tensor(self.colors[min(far, key=far.get)]).view(3, 1, 1)
            pictures.append((color + noise).clamp(0, 255).to(torch.uint8))
        return torch.stack(pictures)


@pytest.fixture
def quick_features(monkeypatch):
    """The judge by `quarters`."""
    for module in ("judge", "search", "evaluate"):
        monkeypatch.setattr(f"more_hf.tuning.{module}.features_of", quarters)


@pytest.fixture
def pipe(copy_of_emoji_sd):
    return copy_of_emoji_sd()


@pytest.fixture
def painter(pipe, monkeypatch, quick_features):
    painter = Painter(pipe)
    monkeypatch.setattr("more_hf.tuning.search.draw", painter)
    monkeypatch.setattr("more_hf.tuning.search.lpips_distance", difference)
    return painter


def quarters(pictures):
    """Features: the color of each quarter, which a test can afford."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures.double() / 255, 2).flatten(1)


def difference(before, after):
    return (before.double() - after.double()).abs().mean((1, 2, 3)) / 255
