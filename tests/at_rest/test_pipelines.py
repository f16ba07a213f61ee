"""Whatever saves, copies, casts, offloads, compiles or extends an erased pipeline, the concept stays erased.

The evidence is always the denoiser's output: on the forget prototypes it must be what the original gives on
their targets.
"""

import copy
import pickle
import sys

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor
from support.compare import changed, state
from support.pipelines import ONE_ATTENTION, TARGETS, erase, random_ip_adapter

import more_hf


CPU = torch.device("cpu")
ONE_ATTENTION |= {"mid_block_type": None, "block_out_channels": (4,)}


def texts(pipe, expert=None):
    """Two samples of text features: the forget prototypes, and what they are sent to."""
    remap = more_hf.get_erasure(pipe).remap
    forget = remap.prototypes.matrix[:, list(remap.forget)]
    return torch.stack([forget.T, (forget + remap.shift(expert)).T])


@torch.no_grad()
def outputs(unet, text, **kwargs):
    """The denoiser's output for each sample of text features, on one fixed latent."""
    dtype = next(p.dtype for p in unet.parameters() if p.is_floating_point())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(len(text), 1, 1, 1)
    if kwargs:
        kwargs = {"added_cond_kwargs": {"image_embeds": [kwargs["image_embeds"].to(dtype)]}}
    kwargs["encoder_hidden_states"] = text.to(dtype)
    return unet(latents.to(dtype), torch.tensor(500), **kwargs).sample.double()


def assert_erased(unet, original, text, tolerance=1e-3, **kwargs):
    forget, target = outputs(unet, text, **kwargs)
    old_forget, old_target = outputs(original, text, **kwargs)
    difference = (old_forget - old_target).norm()
    assert difference > 0.01 * old_target.norm()  # the original tells them apart
    assert (forget - target).norm() < tolerance * difference
    assert (forget - old_target).norm() < tolerance * difference


def assert_same(unet, original, text, **kwargs):
    found, expected = (outputs(model, text, **kwargs) for model in (unet, original))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def assert_erased_until_restored(pipe, original, text):
    assert_erased(pipe.unet, original.unet, text)
    with more_hf.disabled(pipe):
        assert_same(pipe.unet, original.unet, text)
    assert_erased(pipe.unet, original.unet, text)
    more_hf.restore(pipe)
    assert_same(pipe.unet, original.unet, text)


@pytest.fixture
def pipe(tiny_sd):
    return tiny_sd()


@pytest.fixture
def original(tiny_sd):
    return tiny_sd()


@pytest.mark.parametrize("router", [None, "random", "hash"])
@pytest.mark.parametrize(
    "copied",
    [
        lambda pipe: copy.deepcopy(pipe).unet,
        lambda pipe: copy.deepcopy(pipe.unet),
        lambda pipe: pickle.loads(pickle.dumps(pipe.unet)),
    ],
    ids=["deepcopy_pipe", "deepcopy_unet", "pickle_unet"],
)
def test_copies_keep_the_mean_expert(pipe, original, copied, router):
    erase(pipe, router=router)
    text = texts(pipe)
    unet = copied(pipe)

    assert_erased(unet, original.unet, text)
    assert [hook.enabled for hook in unet._forward_pre_hooks.values()] == [False] * (router is not None)
    assert more_hf.core.registry.find_erasure(unet) is None
    with pytest.raises(more_hf.AlreadyErasedError, match="copy"):
        more_hf.core.registry.require_editable(unet)


def test_copy_of_a_routed_pipeline_leaves_its_hook_working(pipe, original):
    erase(pipe, router="random")
    copy.deepcopy(pipe)

    with more_hf.routing(pipe, seeds=[0]):
        routed = outputs(pipe.unet, texts(pipe)[:1])
    targets = [outputs(original.unet, texts(pipe, expert)[1:]) for expert in (0, 1)]
    assert min((routed - target).norm() for target in targets) < 1e-3 * (targets[0] - targets[1]).norm()


@pytest.mark.slow
# The tolerances are about 20 rounding steps of the dtype's mantissa.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 2e-1), (torch.float64, 1e-3)]
)
def test_cast_and_back(pipe, original, dtype, tolerance):
    text = texts(erase(pipe))

    pipe.to(dtype)
    assert_erased(copy.deepcopy(pipe.unet).float(), original.unet, text, tolerance)
    assert outputs(pipe.unet, text).isfinite().all()
    pipe.to(torch.float32)
    assert_erased(pipe.unet, original.unet, text, tolerance)


def test_moved_to_a_device(pipe, original):
    text = texts(erase(pipe))
    assert_erased(pipe.to("cpu").unet, original.unet, text)


@pytest.mark.slow
def test_saved_and_loaded_where_more_hf_is_missing(pipe, original, tmp_path, monkeypatch):
    """`docs/test_examples.py` does so in a process of its own."""
    text = texts(erase(pipe, router="random"))
    pipe.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "plain", variant="fp16")
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    monkeypatch.setitem(sys.modules, "more_hf", None)
    for name, variant, tolerance in (("plain", None, 1e-3), ("plain", "fp16", 1e-3), ("half", "fp16", 2e-2)):
        unet = StableDiffusionPipeline.from_pretrained(tmp_path / name, variant=variant).unet.float()
        assert not unet._forward_pre_hooks
        assert_erased(unet, original.unet, text, tolerance)


def attention_processor_and_back(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.unet.set_default_attn_processor()


# Each changes how the denoiser runs, not what it knows.
TOOLS = {
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "attention_slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "attention_processor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "attention_processor_and_back": attention_processor_and_back,
    "channels_last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "gradient_checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    "model_offload": lambda pipe: cpu_offload_with_hook(pipe.unet, CPU),
    "sequential_offload": lambda pipe: cpu_offload(pipe.unet, CPU),
    "group_offload_block": lambda pipe: apply_group_offloading(
        pipe.unet, CPU, CPU, "block_level", num_blocks_per_group=1
    ),
    "group_offload_leaf": lambda pipe: apply_group_offloading(pipe.unet, CPU, CPU, "leaf_level"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("when", "router"), [("before", None), ("after", "hash")])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools(pipe, original, tool, when, router):
    TOOLS[tool](original)
    if when == "before":
        TOOLS[tool](pipe)
    erase(pipe, router=router, remap_to=TARGETS[0])
    if when == "after":
        TOOLS[tool](pipe)

    text = texts(pipe)
    assert_erased_until_restored(pipe, original, text)


def test_gradient_checkpointing_stays_as_it_was(pipe):
    pipe.unet.enable_gradient_checkpointing()
    more_hf.restore(erase(pipe))
    assert pipe.unet.is_gradient_checkpointing


class Transfers(dict):
    """An offload map like one on another device: what it hands out is a copy."""

    def __getitem__(self, key):
        return super().__getitem__(key).clone()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_sequential_offload_with_real_transfers(pipe, original, when):
    if when == "after":
        erase(pipe)
    weights = Transfers(state(pipe.unet))
    cpu_offload(pipe.unet, CPU, state_dict=weights)
    if when == "before":
        erase(pipe)

    text = texts(pipe)
    assert_erased(pipe.unet, original.unet, text)
    more_hf.restore(pipe)
    assert_same(pipe.unet, original.unet, text)


def test_sequential_offload_control(pipe, original):
    erased = erase(copy.deepcopy(pipe))
    text, remap = texts(erased), more_hf.get_erasure(erased).remap
    weights = Transfers(state(pipe.unet))
    cpu_offload(pipe.unet, CPU, state_dict=weights)

    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            assert module.weight.is_meta
            weight = weights[f"{name}.weight"]
            weight.copy_(remap.merged(weight))  # lost: the map handed out a copy
    assert_same(pipe.unet, original.unet, text)


COMPILE = {
    "wrapped": lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")),
    "in_place": lambda pipe: pipe.unet.compile(backend="eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "router"), [("wrapped", None), ("in_place", "hash")])
def test_compiled_before(tiny_sd, compiled, router):
    pipe, original = tiny_sd(**ONE_ATTENTION), tiny_sd(**ONE_ATTENTION)
    text = texts(erase(copy.deepcopy(pipe), remap_to=TARGETS[0]))
    COMPILE[compiled](pipe)
    assert_same(pipe.unet, original.unet, text)  # traced here, without the edit

    erase(pipe, remap_to=TARGETS[0], router=router)
    assert_erased(pipe.unet, original.unet, text)
    more_hf.restore(pipe)
    assert_same(pipe.unet, original.unet, text)


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "router"), [("in_place", None), ("wrapped", "random")])
def test_compiled_after(tiny_sd, compiled, router):
    pipe, original = tiny_sd(**ONE_ATTENTION), tiny_sd(**ONE_ATTENTION)
    text = texts(erase(pipe, remap_to=TARGETS[0], router=router))
    COMPILE[compiled](pipe)

    assert_erased_until_restored(pipe, original, text)


@pytest.mark.slow
def test_routing_seeds_change_experts_in_compiled_code(tiny_sd):
    pipe = tiny_sd(**ONE_ATTENTION)
    erase(pipe, router="random")
    forget = texts(pipe)[:1].expand(8, -1, -1)

    def routed(seeds):
        with more_hf.routing(pipe, seeds=seeds):
            return outputs(pipe.unet, forget).flatten(1)

    eager = [routed(range(8)), routed(range(8, 16))]
    assert not torch.allclose(*eager, rtol=1e-3)
    assert torch.cdist(eager[0][:1], eager[0]).max() > 0.005 * eager[0][0].norm()  # two experts at least
    pipe.unet.compile(backend="eager")
    assert torch.allclose(routed(range(8)), eager[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(routed(range(8, 16)), eager[1], rtol=1e-5, atol=1e-6)


def random_lora(unet, rank=2, scale=0.3):
    generator, lora = torch.Generator().manual_seed(1), {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v")):
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            for factor, shape in shapes.items():
                lora[f"unet.{name}.{factor}.weight"] = scale * torch.randn(shape, generator=generator)
    return lora


@pytest.mark.slow
@pytest.mark.parametrize("router", [None, "hash"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(pipe, original, when, router):
    lora = random_lora(pipe.unet)
    expected = erase(copy.deepcopy(pipe), remap_to=TARGETS[0]).unet.state_dict()
    if when == "before":
        pipe.load_lora_weights(lora, adapter_name="style")
    erase(pipe, remap_to=TARGETS[0], router=router)
    if when == "after":
        pipe.load_lora_weights(lora, adapter_name="style")
    text = texts(pipe)

    with_lora = copy.deepcopy(original)
    with_lora.load_lora_weights(lora, adapter_name="style")
    if router is not None:  # the LoRA reads the routed features, too
        assert_erased(pipe.unet, with_lora.unet, text)
    for name in more_hf.get_erasure(pipe).sites:  # the edit is in the base layer
        base = pipe.unet.get_submodule(name).get_base_layer()
        assert torch.allclose(base.weight, expected[f"{name}.weight"], rtol=1e-5, atol=1e-6)
    if when == "before":
        reads = "still reads the unedited prompt" if router is None else "reads the routed features"
        assert f"LoRA beside them, which {reads}" in more_hf.get_erasure(pipe).to_markdown()

    pipe.unload_lora_weights()
    assert_erased(pipe.unet, original.unet, text)
    more_hf.restore(pipe)
    assert_same(pipe.unet, original.unet, text)


@pytest.mark.slow
def test_lora_fused_after_the_edit_is_refused_until_unfused(pipe, original):
    text = texts(erase(pipe))
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="style")
    pipe.fuse_lora()
    with pytest.raises(more_hf.IncompatibleBaseError, match="unfuse_lora"):
        more_hf.restore(pipe)

    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_same(more_hf.restore(pipe).unet, original.unet, text)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_ip_adapter(pipe, original, when):
    adapter = random_ip_adapter(pipe.unet)
    original.unet._load_ip_adapter_weights([adapter])
    if when == "before":
        pipe.unet._load_ip_adapter_weights([adapter])
    text = texts(erase(pipe))
    if when == "after":
        pipe.unet._load_ip_adapter_weights([adapter])

    image = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(3))[:1].expand(2, -1, -1)
    assert_erased(pipe.unet, original.unet, text, image_embeds=image)
    adapted = [name for name in state(original.unet) if "_ip" in name or "encoder_hid_proj" in name]
    assert len(adapted) > 8
    assert changed(pipe.unet, state(original.unet)).isdisjoint(adapted)
    more_hf.restore(pipe)
    assert_same(pipe.unet, original.unet, text, image_embeds=image)


def test_from_pipe_shares_the_erasure(pipe, original):
    text = texts(erase(pipe))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert more_hf.get_erasure(other) is more_hf.get_erasure(pipe)
    assert_erased(other.unet, original.unet, text)

    more_hf.restore(other)
    assert_same(pipe.unet, original.unet, text)


@pytest.mark.slow
def test_from_pipe_with_a_cast_can_be_restored(pipe, original):
    text = texts(erase(pipe))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float16)
    assert other.unet.dtype == torch.float16
    assert_erased(copy.deepcopy(other.unet).float(), original.unet, text, 2e-2)

    more_hf.restore(other)
    original.unet.to(torch.float16)
    assert_same(other.unet, original.unet, text)
