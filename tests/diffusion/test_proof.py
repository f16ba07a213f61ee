"""The proof by run, on every family and in every precision: what it must see, and what it must not refuse."""

import pytest
import torch
from support.families import TINY
from support.proofs import denoiser_in, erasure_by_chance, proof_of, sees_left_out, sees_old_weight

from more_hf.diffusion.proof import prover


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", TINY)
def test_each_layer_is_seen_and_correct_edits_pass(family, dtype):
    pipe, denoiser = denoiser_in(family, dtype)
    erasure = erasure_by_chance(pipe, denoiser, seed=0)
    prove = prover(denoiser, erasure, None)
    for name in erasure.sites:
        assert sees_old_weight(denoiser, erasure, name, prove)
        if dtype == torch.bfloat16:  # by any bit of the output: it has the fewest to show it
            assert sees_left_out(denoiser, erasure, name)
    for seed, close in enumerate((False, True)):
        for router in (None, "random"):
            proof = proof_of(denoiser, erasure_by_chance(pipe, denoiser, seed, close, router))
            assert proof["other_ways"] == 0.0
            assert proof["layer_error"] < 4 < proof["layer_changed"]
            assert ("expert_error" in proof) == (router is not None)
