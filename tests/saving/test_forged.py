"""Records and files of a stranger: only what the files bear out is believed, and every error is ours."""

import copy
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.hub import erase
from support.records import list_files_again, read_record, write_record
from support.texts import CHARACTERS

import more_hf
from more_hf.core.record import RECORD, Record
from more_hf.core.site import fingerprint


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
EDITED = "each sends p_f where p_t goes"
TEXT = st.text(CHARACTERS, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
ODD = [None, True, 0, -1, float("nan"), "", ".", "..", "../other/unet", "/etc", [], [None], {}, {"a": None}]


def places(value, path=()):
    """Every place in a record."""
    yield path
    if isinstance(value, dict):
        for key, element in value.items():
            yield from places(element, (*path, key))
    elif isinstance(value, list):
        for i, element in enumerate(value):
            yield from places(element, (*path, i))


def changed(record, path, value):
    record = copy.deepcopy(record)
    if not path:
        return value
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


def only_our_errors(call):
    try:
        return call()
    except more_hf.MoreError as error:
        return error


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_record_is_read_or_refused(saved_once, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("record")
    record = read_record(saved_once[0])
    path = data.draw(st.sampled_from(list(places(record))))
    write_record(folder, changed(record, path, data.draw(JSON | st.sampled_from(ODD))))
    found = only_our_errors(lambda: Record.read(folder))
    if isinstance(found, Record):  # what is accepted can be written and read again
        (folder / RECORD).write_text(found.to_json(), "utf-8")
        assert Record.read(folder) == found


@pytest.mark.parametrize("read", [more_hf.load, more_hf.verify])
@pytest.mark.parametrize(
    "content", [b"", b"\xef\xbb\xbf", b"\xff\xfe{\x00", b"{", b"[]", b"null", b"[" * 10**5, b"\x00" * 100]
)
def test_a_file_that_is_no_record(saved, read, content):
    (saved / RECORD).write_bytes(content)
    with pytest.raises(more_hf.IncompatibleBaseError, match="is not a record"):
        read(saved)


def test_a_record_with_a_byte_order_mark_is_read(saved):
    (saved / RECORD).write_bytes(b"\xef\xbb\xbf" + (saved / RECORD).read_bytes())
    assert more_hf.verify(saved)


@pytest.mark.slow
def test_verify_and_load_with_every_place_of_the_record_changed(saved):
    """No more than our errors, and a change of what is compared is found."""
    record = read_record(saved)
    for path in places(record):
        for value in (None, "../other", {"a": [1]}):
            write_record(saved, changed(record, path, value))
            only_our_errors(lambda: more_hf.verify(saved))
            only_our_errors(lambda: more_hf.load(saved))


@pytest.mark.parametrize(
    "denoiser", ["../other/unet", "/other/unet", "unet/../unet", "..", "", "unet2", "vae"]
)
def test_a_denoiser_elsewhere(saved, denoiser):
    write_record(saved, {**read_record(saved), "denoiser": denoiser})
    for read in (more_hf.load, more_hf.verify):
        found = only_our_errors(lambda read=read: read(saved))
        assert not found or isinstance(found, more_hf.MoreError)


@pytest.mark.parametrize(
    "name",
    ["../other/x.json", "/etc/x.json", "a/../../x", "", ".", "a//b", "a\\b", "C:x", "a\0b", ".git/config"],
)
def test_a_file_outside_the_folder(saved, name):
    record = read_record(saved)
    write_record(saved, {**record, "files": {**record["files"], name: "0" * 64}})
    for read in (more_hf.load, more_hf.verify):
        with pytest.raises(more_hf.IncompatibleBaseError, match="is no file in the folder"):
            read(saved)


def forge(folder, original, layers):
    """The original's weights, with a record that is consistent with them as far as fingerprints go."""
    save_file(original, folder / WEIGHTS)
    list_files_again(folder)
    record = read_record(folder)
    record["sites"] = {name: record["sites"][name] for name in layers}
    record["edited"] = fingerprint({name: original[f"{name}.weight"] for name in layers})
    record["facts"]["separation"] = dict.fromkeys(layers, 1e30)
    write_record(folder, record)


def test_the_originals_weights_with_their_own_fingerprint(saved, saved_once):
    forge(saved, saved_once[1], read_record(saved)["sites"])
    verification = more_hf.verify(saved)
    assert [check.name for check in verification.checks if not check.passed] == [EDITED]


@pytest.mark.parametrize("tokens", ["nonsense", "last"])
def test_a_record_of_tokens_that_its_request_cannot_have_led_to(saved, tokens):
    record = read_record(saved)
    record["facts"]["tokens"] = tokens
    write_record(saved, record)
    verification = more_hf.verify(saved)
    assert [check.name for check in verification.checks if not check.passed] == [EDITED]
    assert tokens in verification.failures


def test_a_record_that_names_the_edited_layers_alone(saved, saved_once):
    """Which layers must be edited is the class's to say, not the record's."""
    erased = load_file(saved / WEIGHTS)
    first, *others = read_record(saved)["sites"]
    mixed = {**saved_once[1], f"{first}.weight": erased[f"{first}.weight"]}
    forge(saved, mixed, [first])
    verification = more_hf.verify(saved)
    failed = {check.name for check in verification.checks if not check.passed}
    assert failed == {"every edited layer is there", EDITED}


def test_a_text_encoder_of_another_model(saved):
    path = saved / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    save_file(drawn, path, {"format": "pt"})
    list_files_again(saved)
    assert [check.name for check in more_hf.verify(saved).checks if not check.passed] == [EDITED]


def test_a_text_encoder_that_changed_since_the_erasure_is_not_saved(tiny_sd, tmp_path):
    pipe = erase(tiny_sd())
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.5)
    with pytest.raises(more_hf.ExportError, match="text encoder"):
        more_hf.save(pipe, tmp_path / "erased")
    assert not (tmp_path / "erased").exists()


class Pickled:
    """A pickle that would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickles_are_named_and_not_opened(saved, tmp_path, component):
    for path in (saved / component).glob("*.safetensors"):
        name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
        path.with_name(name).write_bytes(pickle.dumps(Pickled(tmp_path / "ran")))
        path.unlink()
    verification = more_hf.verify(saved)
    assert not verification
    assert "pytorch_model.bin" in str(verification)
    assert isinstance(only_our_errors(lambda: more_hf.load(saved)), more_hf.IncompatibleBaseError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 5, 100, 5000])
@pytest.mark.parametrize(
    "name", [WEIGHTS, "text_encoder/model.safetensors", "more_hf_delta.safetensors", "vae/config.json"]
)
def test_truncated_files(saved, name, size):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: min(size, len(content) // 2)])
    verification = only_our_errors(lambda: more_hf.verify(saved))
    if name in (WEIGHTS, "text_encoder/model.safetensors"):  # what verify reads
        assert not verification
        assert "cannot be read (SafetensorError" in str(verification)
    elif not isinstance(verification, more_hf.MoreError):
        assert name in verification.failures
    assert isinstance(only_our_errors(lambda: more_hf.load(saved)), more_hf.IncompatibleBaseError)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "text_encoder/config.json"]
)
@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{}", b"\xff"])
def test_missing_and_damaged_configurations(saved, name, content):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    for read in (more_hf.verify, more_hf.load):
        only_our_errors(lambda read=read: read(saved))
