"""Features are the head's input: means of them, whatever the batches; looking changes nothing."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from support.compare import same, state
from support.processes import launched
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import more_hf
from more_hf.classification.features import features_of
from more_hf.core.errors import PrototypeError, SiteNotFoundError


ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def data(digits):
    images, labels = digits
    return TensorDataset(images[:200], labels[:200])


def reference(model, data):
    """Means of the pooled output of the backbone, one class after the other, and the second moment."""
    images, labels = data.tensors
    with torch.no_grad():
        pooled = model.eval().resnet(images).pooler_output.flatten(1).double()
    means = torch.stack([pooled[labels == i].mean(0) for i in range(10)], dim=1)
    return means, pooled.T @ pooled / len(pooled)


def test_prototypes_are_the_means_of_the_backbones_output(model, data):
    prototypes = more_hf.collect_prototypes(model, DataLoader(data, batch_size=64))
    means, moment = reference(model, data)

    torch.testing.assert_close(prototypes.matrix, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prototypes.second_moment, moment, rtol=1e-5, atol=1e-6)
    assert prototypes.names == tuple("zero one two three four five six seven eight nine".split())
    assert prototypes.counts.tolist() == torch.bincount(data.tensors[1]).tolist()
    assert more_hf.collect_prototypes(model, DataLoader(data), second_moment=False).second_moment is None


def test_same_features_in_other_batches_give_the_same_to_rounding(data):
    images, labels = data.tensors
    # its features are the images, however they are batched
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    one = more_hf.collect_prototypes(model, [(images, labels)])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    other = more_hf.collect_prototypes(model, [(images[rows], labels[rows]) for rows in order.split(7)])

    torch.testing.assert_close(other.matrix, one.matrix, **ROUNDING)
    torch.testing.assert_close(other.second_moment, one.second_moment, **ROUNDING)
    assert one.names == tuple("0123456789")


def test_tuples_and_mappings(model, data):
    images, labels = data.tensors
    forms = [
        (images, labels),
        [images, labels],
        {"pixel_values": images, "labels": labels},
        {"pixel_values": images, "label": labels, "path": [""] * 200},
    ]
    matrices = [more_hf.collect_prototypes(model, [form]).matrix for form in forms]

    assert all(torch.equal(matrix, matrices[0]) for matrix in matrices)
    assert matrices[0].any()


def test_negative_labels_are_left_out(model, data):
    images, labels = data.tensors
    some = labels.clone().index_fill_(0, torch.arange(100, 200), -100)
    half = more_hf.collect_prototypes(model, [(images[:100], labels[:100])])
    masked = more_hf.collect_prototypes(model, [(images, some)])

    torch.testing.assert_close(masked.matrix, half.matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked.second_moment, half.second_moment, rtol=1e-5, atol=1e-6)


def test_the_model_is_as_it_was(model, data):
    model.train()
    model.resnet.embedder.eval()  # a part that the user froze
    before = state(model)
    flags = [module.training for module in model.modules()]
    more_hf.collect_prototypes(model, DataLoader(data, batch_size=64))

    assert "resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean" in before
    assert same(model, before)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    model(data.tensors[0])  # the control: a pass in train mode overwrites BatchNorm's statistics
    assert not same(model, before)


def test_the_mode_is_set_once_for_all_batches(model, data, monkeypatch):
    """Walking over the modules costs the same for one image as for a thousand."""
    walks, train = [], type(model).train
    monkeypatch.setattr(type(model), "train", lambda self, mode=True: walks.append(mode) or train(self, mode))
    more_hf.collect_prototypes(model, DataLoader(data, batch_size=200))
    once = len(walks)
    more_hf.collect_prototypes(model, DataLoader(data, batch_size=10))
    assert len(walks) == 2 * once > 0


def test_an_error_in_a_later_batch_leaves_the_model_as_it_was(model, data):
    model.train()
    images, labels = data.tensors
    with pytest.raises(PrototypeError, match="float32"):
        more_hf.collect_prototypes(model, [(images, labels), (images, labels.float())])

    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_between_batches_of_features_the_model_is_in_its_own_mode(model, data):
    model.train()
    for _ in features_of(model, DataLoader(data, batch_size=100)):
        assert model.training
        assert torch.is_grad_enabled()
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_half_precision_models_take_float_images(model, data):
    exact = more_hf.collect_prototypes(model, DataLoader(data, batch_size=64)).matrix
    half = more_hf.collect_prototypes(model.bfloat16(), DataLoader(data, batch_size=64)).matrix

    assert half.dtype == torch.float64
    assert 1e-4 < (half - exact).norm() / exact.norm() < 3e-2


def test_features_at_an_inner_module(model, data):
    images, labels = data.tensors
    prototypes = more_hf.collect_prototypes(model, [(images, labels)], at="resnet.encoder.stages.1")
    with torch.no_grad():
        maps = model.resnet.encoder.stages[0](model.resnet.embedder(images))

    assert maps.shape[1:] == (16, 2, 2)
    expected = torch.stack([maps[labels == i].double().mean((0, 2, 3)) for i in range(10)], dim=1)
    torch.testing.assert_close(prototypes.matrix, expected, rtol=1e-5, atol=1e-6)


def test_tokens_of_an_inner_block_are_routed_one_by_one(digits):
    """The input of a ViT's last block: every token is remapped, so that the mean of a sample is too."""
    from support.classifiers import token_classifier  # not above: the two processes below import this file

    images, labels = digits[0][:100], digits[1][:100]
    model = token_classifier(num_hidden_layers=2)
    seen = []
    (place,) = [name for name, module in model.named_modules() if name.endswith("layers.1")]
    block = model.get_submodule(place)
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # the last to look
    with torch.no_grad():
        model(images)
        more_hf.erase_classes(model, [(images, labels)], [4], remap_to=[9], at=place, solver="covariance")
        seen[1:] = []
        model(images)
    handle.remove()

    before, after = seen
    assert before.shape == (100, 5, 16)
    torch.testing.assert_close(after, more_hf.get_erasure(model).remap.apply(before), rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 0.1
    mean = before[labels == 4].double().mean((0, 1))
    torch.testing.assert_close(more_hf.get_erasure(model).prototypes["LABEL_4"], mean, rtol=1e-5, atol=1e-6)


def test_features_after_an_edit_and_before(model, data):
    images, labels = data.tensors
    with torch.no_grad():
        pooled = model.resnet(images).pooler_output.flatten(1)
    before = more_hf.collect_prototypes(model, [(images, labels)])
    more_hf.erase_classes(model, before, "four", remap_to="nine")
    [(edited, _)] = features_of(model, [(images, labels)])

    expected = more_hf.get_erasure(model).remap.apply(pooled)
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5)
    assert (edited - pooled).abs().max() > 0.1
    again = more_hf.collect_prototypes(model, [(images, labels)])
    assert torch.equal(again.matrix, before.matrix)  # the original's


# Bad data


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda images, labels: images, "a batch is a Tensor"),
        (lambda images, labels: (images,), "a batch is a tuple"),
        (lambda images, labels: {"pixel_values": images}, r"a mapping with \['pixel_values'\]"),
        (lambda images, labels: {"pictures": images, "labels": labels}, "nothing that the model reads"),
        (lambda images, labels: (images, labels.float()), r"got \(200,\) torch.float32"),
        (lambda images, labels: (images, nn.functional.one_hot(labels)), r"got \(200, 10\) torch.int64"),
        (lambda images, labels: (images, ["four"] * 200), "`labels` of a batch holds no numbers"),
        (lambda images, labels: (images, labels + 1), "Label 10 has no name"),
        (
            lambda images, labels: (images[labels != 3], labels[labels != 3]),
            "No feature was seen for 'three'",
        ),
    ],
)
def test_bad_batches(model, data, batch, message):
    with pytest.raises(PrototypeError, match=message):
        more_hf.collect_prototypes(model, [batch(*data.tensors)])


def test_no_batches(model):
    with pytest.raises(PrototypeError, match="no sample"):
        more_hf.collect_prototypes(model, [])
    assert list(features_of(model, [])) == []


def test_bad_places(model, data):
    with pytest.raises(
        SiteNotFoundError, match=r"no module 'resnet.encoder.stages.7'.*'resnet.encoder.stages.1'"
    ):
        more_hf.collect_prototypes(model, DataLoader(data), at="resnet.encoder.stages.7")
    with pytest.raises(SiteNotFoundError, match="does not call `resnet.encoder.stages`"):
        more_hf.collect_prototypes(model, DataLoader(data), at="resnet.encoder.stages")

    class Keywords(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](x))

    with pytest.raises(SiteNotFoundError, match=r"`1` \(Linear\) is not called with a tensor"):
        more_hf.collect_prototypes(Keywords(nn.Flatten(), nn.Linear(64, 10)), DataLoader(data))


# Several processes


def shard(rank, environment, folder):
    """One of two processes, with 37 samples in batches of 8, loaded in four ways."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    from accelerate import PartialState

    state = PartialState(cpu=True)
    torch.manual_seed(rank)  # the processes do not share their random numbers
    model, data = flat_model(), flat_data()
    prepared = prepare_data_loader(DataLoader(data, batch_size=8))
    loaders = {
        "shuffled": DataLoader(data, batch_size=8, shuffle=True),
        "plain": DataLoader(data, batch_size=8),
        "prepared": prepared,
        "list": list(DataLoader(data, batch_size=8)),
    }
    for name, loader in loaders.items():
        more_hf.collect_prototypes(model, loader).save(folder / f"{name}{rank}")
    # the control: what the user's loader gives by itself is filled up
    (folder / f"padded{rank}").write_text(str(sum(len(labels) for _, labels in prepared)))
    try:
        more_hf.collect_prototypes(model, DataLoader(Stream(), batch_size=8))
    except PrototypeError as error:
        (folder / f"error{rank}").write_text(str(error))
    state.wait_for_everyone()  # who leaves first would end the connection under the other's threads
    state.destroy_process_group()


def flat_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.eye_(model[1].weight)
    return model


def flat_data():
    images = torch.randn(37, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(37) % 3)


class Stream(IterableDataset):
    def __iter__(self):
        yield from flat_data()


@pytest.mark.slow
def test_two_processes_count_every_sample_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=shard, args=(rank, environment, Path(tmp_path)))
        for rank, environment in enumerate(launched(2))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]

    images, labels = flat_data().tensors
    expected = torch.stack([images[labels == i].flatten(1).double().mean(0) for i in range(3)], dim=1)
    for name in ("shuffled", "plain", "prepared", "list"):
        for rank in range(2):
            prototypes = more_hf.Prototypes.load(tmp_path / f"{name}{rank}")
            torch.testing.assert_close(prototypes.matrix, expected, **ROUNDING)
            assert prototypes.counts.tolist() == [13, 12, 12]
            assert prototypes.moment_count == 37
    assert sum(int((tmp_path / f"padded{rank}").read_text()) for rank in range(2)) == 48
    assert "cannot be sharded" in (tmp_path / "error0").read_text()
