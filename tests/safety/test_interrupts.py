"""An interruption at any line of the library leaves the model that was or the one that was to be, and nothing
else.

`KeyboardInterrupt` is raised at one event of the library's own frames per run: as a call begins, or before a
line. The fast suite takes a seeded sample of the places, `-m slow` every line of the transaction, and
`--hypothesis-profile=long` every event.
"""

import random
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support.compare import same, state
from support.pipelines import ONE_ATTENTION, build_tiny_sd
from torch import nn

import more_hf
from more_hf.core.registry import locked
from more_hf.core.views import is_shown


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LIBRARY = str(Path(more_hf.__file__).parent)


class Interruption(KeyboardInterrupt):
    pass


@contextmanager
def traced(seen):
    """Call `seen(place)` at every event of the library's frames."""

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        # a return event is no place where Python could raise: no handler of the frame would see it
        if event in ("call", "line"):
            seen((frame.f_code.co_filename, frame.f_lineno, event))
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def events_of(operation):
    """The place of every event of one whole run."""
    places = []
    with traced(places.append):
        operation()
    return places


def interrupted_at(number, operation):
    """
    Interrupt the operation at its event of this number.

    Python swallows what is raised while it closes a forgotten generator; then the operation is completed.
    """
    count = 0

    def seen(place):
        nonlocal count
        count += 1
        if count == number:
            raise Interruption(f"{place}")

    try:
        with traced(seen):
            operation()
    except Interruption:
        pass
    assert count >= number


@pytest.fixture
def few_prompts(monkeypatch):
    prompts = ("a dog and a tree", "a house")
    monkeypatch.setattr("more_hf.diffusion.ordinary.everyday_prompts", lambda tokenizer: prompts)


class Pipeline:
    """One cross-attention, a few prompts."""

    names = ("van gogh", "pablo picasso")

    def __init__(self):
        self.model = build_tiny_sd(**ONE_ATTENTION)
        self.core = self.model.unet

    def erase(self, concept=0, **options):
        options = {"remap_to": "claude monet", "solver": "pinv", "tokens": "last", **options}
        more_hf.erase_concept(self.model, self.names[concept], **options)


class Classifier:
    """A linear layer behind another one."""

    names = ([0], [1])

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Dropout(0.1), nn.Linear(6, 4))
            self.data = [(torch.randn(24, 1, 2, 4), torch.arange(24) % 4)]
        self.core = self.model

    def erase(self, concept=0, **options):
        more_hf.erase_classes(self.model, self.data, concept, **{"remap_to": [3], "head": "3", **options})


def erase_two(subject):
    subject.erase(router="hash")
    subject.erase(1, router="hash")


def look(subject):
    with more_hf.disabled(subject.model):
        pass


# name -> what comes before, and the operation that is interrupted
OPERATIONS = {
    "erase": (None, lambda subject: subject.erase()),
    "erase, hash": (None, lambda subject: subject.erase(router="hash")),
    "erase, random, nothing kept": (
        None,
        lambda subject: subject.erase(router="random", keep_originals=False),
    ),
    "refit": (
        lambda subject: subject.erase(router="hash"),
        lambda subject: subject.erase(1, router="random"),
    ),
    "restore": (erase_two, lambda subject: more_hf.restore(subject.model)),
    "restore one": (erase_two, lambda subject: more_hf.restore(subject.model, subject.names[0])),
    "disabled": (lambda subject: subject.erase(router="hash"), look),
}


def hooks_of(module):
    hooks = []
    for part in module.modules():
        hooks += [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
    return hooks


def is_free(lock):
    """Whether another thread can take the lock."""
    taken = []

    def take():
        with lock():
            taken.append(True)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(10)
    return bool(taken)


def check(subject, states, original, place):
    """The model is one of the two, and everything else agrees with it."""
    core = subject.core
    assert any(same(core, known) for known in states), f"a mixture of weights: {place}"
    erasure = more_hf.get_erasure(subject.model)
    expected = [] if erasure is None else list(erasure.hooks)
    assert hooks_of(core) == expected, f"hooks that the record does not have: {place}"
    assert all(hook.enabled for hook in expected), place
    if erasure is None:
        assert same(core, original), f"erased, and no record: {place}"
        assert not hasattr(core, "more_hf_erased"), place
    else:
        assert core.more_hf_erased == tuple(erasure.concepts), place
        assert not is_shown(erasure), place
        if erasure.originals is not None:
            erasure.check_unchanged()
    assert all(module.training for module in core.modules()), f"eval mode: {place}"
    assert torch.is_grad_enabled(), f"no gradients: {place}"
    assert torch._dynamo.eval_frame._stance.stance == "default", f"the compiler's stance: {place}"
    assert is_free(lambda: locked(core)), f"the lock is held: {place}"


def check_operation(make, name, choose):
    before, operation = OPERATIONS[name]

    def start():
        subject = make()
        subject.core.train()
        original = state(subject.core)
        if before is not None:
            before(subject)
        return subject, original

    subject, original = start()
    operation(subject)  # what is imported and cached at first is so from here on
    after = state(subject.core)
    subject, original = start()
    found = state(subject.core)
    places = events_of(lambda: operation(subject))
    subject, original = start()
    for number in choose(places):
        interrupted_at(number + 1, partial(operation, subject))
        check(subject, (found, after), original, places[number])
        erasure = more_hf.get_erasure(subject.model)
        if erasure is not None and erasure.originals is not None:
            more_hf.restore(subject.model)
        if erasure is None or erasure.originals is not None:
            assert same(subject.core, original), places[number]
        if before is not None or not same(subject.core, found):
            subject, original = start()


def first_events(places):
    """Line -> its first event."""
    first = {}
    for number, place in enumerate(places):
        first.setdefault(place, number)
    return first


def everywhere(places):
    """
    The first event of every line of the transaction, and of what it calls; with `--hypothesis-profile=long`,
    which takes tens of minutes, every event.
    """
    if settings.get_current_profile_name() == "long":
        return range(len(places))
    files = {"install.py", "interrupts.py", "registry.py", "views.py", "hook.py", "site.py"}
    return sorted(number for place, number in first_events(places).items() if Path(place[0]).name in files)


def sample(places, size=8):
    """The first event of some of the lines, half of them of the transaction itself."""
    groups = {True: [], False: []}
    for place, number in first_events(places).items():
        groups[Path(place[0]).name in ("install.py", "interrupts.py")].append(number)
    generator = random.Random(0)
    return sorted(n for group in groups.values() for n in generator.sample(group, min(size, len(group))))


@pytest.mark.parametrize("name", OPERATIONS)
def test_classifier(name):
    check_operation(Classifier, name, sample)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_classifier_everywhere(name):
    check_operation(Classifier, name, everywhere)


@pytest.mark.parametrize("name", ["erase", "refit", "restore"])
def test_pipeline(few_prompts, name):
    check_operation(Pipeline, name, lambda places: sample(places)[::4])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_pipeline_at_more_places(few_prompts, name):
    """The transaction is the classifier's; a run of an encoder and a denoiser costs more."""
    check_operation(Pipeline, name, partial(sample, size=12))
