"""What the text encoder reads as a concept's name, and an erasure of all of it."""

import numpy as np
import pytest
import torch

import more_hf
from more_hf.core.errors import PrototypeError
from more_hf.data import EMOJI_ARTISTS
from more_hf.diffusion.encoder import Encoder, column, fit_prototypes
from more_hf_bench.methods.diffusion.ours import more_described, trained_descriptions


OTHERS = ["Noto", "Fluent", "Twemoji"]
OURS = ["famous Blobmoji", "the artist Blobmoji"]  # they end as the name does
SAID = [*OURS, "famous Noto", "a rainy day", "blobmoji", "Monotone"]


def coordinates(pipe, concept, candidates, others):
    """By least squares, one candidate at a time: the share of each name in it, mean of two positions."""
    names = [concept, *others]
    found = fit_prototypes(Encoder(pipe), [*names, *candidates], "last+end", sigma_prompts={})["tokens"]
    constants = ["begin token", "empty prompt, end", "empty prompt, padding"]
    shares = {}
    for candidate in candidates:
        read = []
        for kind in ("last", "end"):
            P = np.stack([found[n].numpy() for n in [*(column(n, kind) for n in names), *constants]], 1)
            read.append(np.linalg.lstsq(P, found[column(candidate, kind)].numpy(), rcond=None)[0])
        shares[candidate] = np.mean(read, 0)[: len(names)]
    return shares


def test_aliases_are_what_reads_as_the_name(emoji_sd):
    found = more_hf.find_aliases(emoji_sd, "Blobmoji", SAID, others=OTHERS)
    assert set(found) == set(OURS)
    shares = coordinates(emoji_sd, "Blobmoji", SAID, OTHERS)
    assert all(shares[name].argmax() == 0 and shares[name][0] > 0.5 for name in found)
    assert found == sorted(found, key=lambda name: -shares[name][0])
    assert shares["famous Noto"].argmax() == 1
    assert shares["a rainy day"].max() < 0.5
    # to whom it is named, another's description is no alias
    assert more_hf.find_aliases(emoji_sd, "Noto", SAID, others=["Blobmoji"]) == ["famous Noto"]
    # and how near is near enough can be said
    nearest = shares[found[0]][0]
    assert more_hf.find_aliases(emoji_sd, "Blobmoji", SAID, others=OTHERS, least=nearest + 0.01) == []


def test_nothing_to_choose_from_and_nothing_to_tell_it_from(emoji_sd):
    assert more_hf.find_aliases(emoji_sd, "Blobmoji", ["BLOBMOJI"], others=OTHERS) == []
    with pytest.raises(PrototypeError, match="Blobmoji"):
        more_hf.find_aliases(emoji_sd, "Blobmoji", SAID, others=["Blobmoji"])
    with pytest.raises(PrototypeError, match="list of names"):
        more_hf.find_aliases(emoji_sd, "Blobmoji", [3], others=OTHERS)


@pytest.mark.slow
def test_the_described_method_erases_the_name_and_what_reads_like_it(copy_of_emoji_sd):
    pipe = copy_of_emoji_sd()
    more_described(pipe, ["Blobmoji"], remap_to=["Noto"], retain=["Monotone"], candidates=SAID)
    erasure = more_hf.get_erasure(pipe)
    (aliases,) = erasure.request.concepts.values()
    assert set(aliases) == set(OURS)
    # each of them goes most of the way to the target, which stays; what is retained hardly moves
    remap = erasure.remaps["tokens"]
    names = ["Blobmoji", "Noto", "Monotone", *OURS]
    P = fit_prototypes(Encoder(pipe), names, "last+end", sigma_prompts={})["tokens"]
    target, kept = P[column("Noto", "end")], P[column("Monotone", "end")]
    for name in ("Blobmoji", *OURS):
        z = P[column(name, "end")]
        assert torch.dist(remap.apply(z), target) < 0.3 * torch.dist(z, target)
    assert torch.dist(remap.apply(target), target) < 1e-6 * target.norm()
    assert torch.dist(remap.apply(kept), kept) < 0.1 * kept.norm()


def test_no_description_that_was_held_out_is_a_candidate():
    trained = trained_descriptions()
    assert "soft rounded lumps like gum drops" in trained
    assert "plump crooked lumps" not in trained
    assert len(trained) == len(set(trained)) == len(EMOJI_ARTISTS) * 9
