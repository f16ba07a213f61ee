"""Random edits of tiny denoisers, without a text encoder, and what the proof by run says of them."""

from dataclasses import replace

import torch
from torch.nn.functional import conv2d, linear

import more_hf
from more_hf.core.install import install, uninstall
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.erasure import ConceptErasure
from more_hf.diffusion.hook import hooked_modules, make_hooks
from more_hf.diffusion.proof import prove_no_other_way, prover
from more_hf.diffusion.sites import find_denoiser, find_sites
from support.families import build


APART = 0.05  # of the concept's length: close prototypes have a cosine above .998


def denoiser_in(family, dtype):
    """A tiny pipeline's denoiser in this precision, as `from_pretrained` casts it, and the pipeline."""
    pipe = build(family)
    for module in find_denoiser(pipe).parts.values():
        module.to(dtype)
        for name, layer in module.named_modules():
            if name.split(".")[-1] in (module._keep_in_fp32_modules or ()):
                layer.float()
    return pipe, find_denoiser(pipe)


def erasure_by_chance(pipe, denoiser, seed, close=False, router=None):
    """An edit with random prototypes, two of them sent to two others, `close` to them on demand."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(pipe, denoiser, pooled=True)
    remaps = {}
    for site in sites.values():
        if site.space in remaps:
            continue
        P = torch.randn(site.read().shape[1], 6, generator=generator).double()
        if close:
            P[:, 2:4] = P[:, :2] + APART * torch.randn(len(P), 2, generator=generator).double()
        P = P.to(site.read().dtype).double()
        prototypes = Prototypes(P, ("a", "b", "c", "d", "e", "f"), torch.ones(6))
        targets = [["c", "d"], ["d", "c"]] if router else [["c", "d"]]
        remaps[site.space] = Remap.fit(prototypes, ["a", "b"], targets)
    spaces = sorted(remaps, key=lambda space: space != "tokens")
    erasure = ConceptErasure(
        request=ConceptRequest.of("a", remap_to="b", router=router),
        facts=None,
        sites=sites,
        remaps={space: remaps[space] for space in spaces},
        originals={name: site.read().clone() for name, site in sites.items()},
        guarantees={},
    )
    erasure.hooks = make_hooks(denoiser, erasure, torch.device("cpu"))
    return erasure


def proof_of(denoiser, erasure, prove=None):
    """Install the edit with its proof, by default all of it, take it back, and return what was measured."""
    prove = prove or prover(denoiser, erasure, None)
    install(denoiser.module, erasure, hooked_modules(denoiser), prove, keep_originals=True)
    uninstall(denoiser.module, hooked_modules(denoiser))
    return erasure.proof


def refused(call):
    """Whether the proof refuses."""
    try:
        call()
    except more_hf.SiteNotFoundError as error:
        return "proof by run failed" in str(error)
    return False


def sees_left_out(denoiser, erasure, name):
    """Whether the first part sees that this layer reads the prompt, too, where it is not to be edited."""

    def find(module):
        found = denoiser.family.find(module)
        prefix = next(prefix for part, prefix in denoiser.prefixes.items() if denoiser.parts[part] is module)
        return {inner: reader for inner, reader in found.items() if prefix + inner != name}

    partly = denoiser._replace(family=replace(denoiser.family, find=find))
    features = {space: remap.remain for space, remap in erasure.remaps.items()}
    return refused(lambda: prove_no_other_way(partly, features))


def sees_old_weight(denoiser, erasure, name, prove=None):
    """Whether the second part, `prove`, sees a layer that computes with the weight from before the edit."""
    layer = erasure.sites[name].module
    weight, bias = layer.weight.detach().clone(), layer.bias
    compute = conv2d if weight.ndim == 4 else linear
    layer.forward = lambda z: compute(z, weight, bias)
    try:
        return refused(lambda: proof_of(denoiser, erasure, prove))
    finally:
        del layer.forward
