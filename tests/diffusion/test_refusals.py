"""What cannot be edited safely is refused by name, with a remedy, and the pipeline stays as it was."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    TaylorSeerCacheConfig,
    UNet2DModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from support.families import build
from support.language_models import mistral, mistral_processor
from support.pipelines import erase
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import more_hf
from more_hf.core.registry import find_erasure


CPU = torch.device("cpu")
SITE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


def as_bytes(value):
    if type(value) is torch.Tensor and not value.is_quantized and not value.is_meta:
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def snapshot(pipe):
    """Every tensor of every component as bytes, quantized and float8 ones too."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        f"{part}.{name}": as_bytes(value)
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }


def changed(pipe, before):
    """Names of the tensors that differ from a snapshot."""
    after = snapshot(pipe)
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def random_lora(unet):
    lora = {}
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_k"):
            lora[f"unet.{name}.lora_A.weight"] = torch.full((1, module.in_features), 0.1)
            lora[f"unet.{name}.lora_B.weight"] = torch.full((module.out_features, 1), 0.1)
    return lora


# Preparations: each takes a pipeline and a folder, and gives the pipeline to refuse.


def fused_projections(pipe, folder):
    pipe.fuse_qkv_projections(vae=False)
    return pipe


def unfused_projections(pipe, folder):
    pipe.fuse_qkv_projections(vae=False)
    pipe.unfuse_qkv_projections(vae=False)
    return pipe


def fused_lora(pipe, folder):
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="style")
    pipe.fuse_lora()
    return pipe


def merged_lora_of_peft(pipe, folder):
    pipe.load_lora_weights(random_lora(pipe.unet), adapter_name="style")
    pipe.unet.get_submodule(SITE.replace("to_v", "to_k")).merge()
    return pipe


def quantized_module(pipe, folder):
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, dtype=torch.qint8)
    return pipe


class PackedTensor(torch.Tensor):
    """Stands for the tensor subclasses of quantization libraries."""


def quantized_tensor(pipe, folder):
    layer = pipe.unet.get_submodule(SITE)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(PackedTensor), requires_grad=False)
    return pipe


def group_offloaded_to_disk(pipe, folder, offload_type="leaf_level", **kwargs):
    apply_group_offloading(pipe.unet, CPU, CPU, offload_type, offload_to_disk_path=str(folder), **kwargs)
    return pipe


def group_offloaded_to_disk_by_block(pipe, folder):
    return group_offloaded_to_disk(pipe, folder, "block_level", num_blocks_per_group=1)


def not_loaded(pipe, folder):
    pipe.unet.to("meta")
    return pipe


def custom_diffusion(pipe, folder):
    processors = dict(pipe.unet.attn_processors)
    for name in processors:
        if "attn2" in name:
            layer = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k
            sizes = {"hidden_size": layer.out_features, "cross_attention_dim": layer.in_features}
            processors[name] = CustomDiffusionAttnProcessor(**sizes)
    pipe.unet.set_attn_processor(processors)
    return pipe


def shared_weight(pipe, folder):
    pipe.unet.get_submodule(SITE).weight = pipe.unet.get_submodule(SITE.replace("to_v", "to_k")).weight
    return pipe


def controlnet(pipe, folder):
    return StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=ControlNetModel.from_unet(pipe.unet), requires_safety_checker=False
    )


def without_text_encoder(pipe, folder):
    pipe.text_encoder = None
    return pipe


def unsupported_denoiser(pipe, folder):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, **blocks)
    return DDPMPipeline(unet, DDIMScheduler())


PREPARED = {
    fused_projections: ["attn2", "fused projections", "without `fuse_qkv_projections()`"],
    unfused_projections: ["attn2", "fused projections", "Load the pipeline again"],
    fused_lora: ["1 LoRA(s) are fused", "unfuse_lora()"],
    merged_lora_of_peft: ["attn2.to_k", "merged LoRA", "unfuse_lora()"],
    quantized_module: ["attn2.to_k", "quantized", "Erase from the unquantized model"],
    quantized_tensor: [SITE, "PackedTensor", "Erase from the full-precision model"],
    group_offloaded_to_disk: ["denoiser", "group-offloaded to disk", "without it"],
    group_offloaded_to_disk_by_block: ["denoiser", "group-offloaded to disk", "without it"],
    not_loaded: ["attn2.to_k", "meta", "not loaded", "Erase from"],
    custom_diffusion: ["attn2", "Custom Diffusion", "set_default_attn_processor()"],
    shared_weight: [SITE, "shared", "its own copy"],
    controlnet: ["`controlnet` (ControlNetModel)", "also reads the prompt", "from_pipe"],
    without_text_encoder: ["StableDiffusionPipeline", "without its text encoder"],
    unsupported_denoiser: ["DDPMPipeline", "unet: UNet2DModel", "UNet2DConditionModel"],
}


def assert_refused(pipe, words):
    before = snapshot(pipe)
    with pytest.raises(more_hf.SiteNotFoundError) as error:
        erase(pipe)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert changed(pipe, before) == []
    assert find_erasure(pipe.unet) is None
    assert more_hf.core.registry.ERASED not in vars(pipe.unet)
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("prepare", PREPARED, ids=lambda prepare: prepare.__name__)
def test_refused(tiny_sd, tmp_path, prepare):
    assert_refused(prepare(tiny_sd(), tmp_path), PREPARED[prepare])


def tensor_parallel(model, mesh):
    parallelize_module(model.get_submodule(SITE.removesuffix(".to_v")), mesh, {"to_v": ColwiseParallel()})


def fsdp(model, mesh):
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("shard", "said"),
    [(tensor_parallel, f"{SITE}.*FSDP or tensor parallelism"), (fsdp, "`unet` .*is sharded by FSDP")],
)
def test_what_several_processes_share_is_refused_by_name(tiny_sd, tmp_path, shard, said):
    pipe = tiny_sd()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        shard(pipe.unet, init_device_mesh("cpu", (1,)))
        with pytest.raises(more_hf.SiteNotFoundError, match=said):
            erase(pipe)
    finally:
        dist.destroy_process_group()


XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
XL["projection_class_embeddings_input_dim"] = 56
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
PLAIN["mid_block_type"] = "UNetMidBlock2D"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (XL, ["Stable Diffusion XL", "CLIPTextModelWithProjection", "right text encoder"]),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32}, ["encoder_hid_dim_type='text_proj'"]),
        ({"cross_attention_dim": 48}, ["attn2.to_k", "32 features", "right text encoder"]),
        (PLAIN, ["UNet2DConditionModel", "no attention that reads text"]),
    ],
    ids=["sdxl", "text_proj", "other_width", "no_cross_attention"],
)
def test_refused_denoisers(tiny_sd, options, words):
    assert_refused(tiny_sd(**options), words)


class FrozenCopy(AttnProcessor):
    """Projects text with a private copy of a projection."""

    def __init__(self, attn):
        super().__init__()
        self.to_v = copy.deepcopy(attn.to_v)

    def __call__(self, attn, *args, **kwargs):
        real, attn.to_v = attn.to_v, self.to_v
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            attn.to_v = real


def frozen_processor(pipe, folder):
    attn = pipe.unet.get_submodule(SITE.removesuffix(".to_v"))
    attn.set_processor(FrozenCopy(attn))


def features_that_bypass_sites(unet):
    extra = nn.Linear(32, 4)

    def bypass(module, args, kwargs):
        added = extra(kwargs["encoder_hidden_states"]).mean(1)[:, :, None, None]
        return (args[0] + added, *args[1:]), kwargs

    unet.register_forward_pre_hook(bypass, with_kwargs=True)


@pytest.mark.parametrize("router", [None, "random", "hash"])
def test_proof_by_run_rolls_back(tiny_sd, tmp_path, router):
    pipe = tiny_sd()
    frozen_processor(pipe, tmp_path)
    before = snapshot(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="proof by run failed"):
        erase(pipe, router=router)
    assert changed(pipe, before) == []
    assert more_hf.get_erasure(pipe) is None
    assert not pipe.unet._forward_pre_hooks


def test_a_denoiser_that_ignores_its_prompt_is_refused(tiny_sd, monkeypatch):
    pipe = tiny_sd()
    monkeypatch.setattr(pipe.unet, "forward", lambda sample, *args, **kwargs: UNet2DConditionOutput(sample))
    with pytest.raises(more_hf.SiteNotFoundError, match="8 of 8 edited layers are not called"):
        erase(pipe)


CACHES = [
    FirstBlockCacheConfig(threshold=0.1),
    TaylorSeerCacheConfig(),
    PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 500),
]


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: type(cache).__name__)
def test_caches_are_refused_by_name(cache):
    pipe = build("flux")
    pipe.transformer.enable_cache(cache)
    with pytest.raises(more_hf.SiteNotFoundError, match="disable_cache"):
        more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet")


def test_an_ip_adapter_of_flux_is_refused_by_name():
    pipe = build("flux")
    pipe.transformer.encoder_hid_proj = nn.Linear(4, 4)
    with pytest.raises(more_hf.SiteNotFoundError, match="unload_ip_adapter"):
        more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet")


def test_pictures_larger_than_the_denoiser_draws_are_refused():
    pipe = build("auraflow")
    options = {"reach": "denoiser", "sampling": {"height": 1024, "width": 1024, "num_inference_steps": 1}}
    with pytest.raises(more_hf.SiteNotFoundError, match="sampling"):
        more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet", everyday=("a dog",), **options)


def test_the_refiner_of_xl_is_refused_for_what_it_is():
    base = build("sdxl")
    parts = {**base.components, "text_encoder": None, "tokenizer": None}
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    with pytest.raises(more_hf.SiteNotFoundError, match="refiner"):
        more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet")


def test_an_unknown_family_whose_encoder_has_a_nested_configuration(cogview_3):
    cogview_3.register_modules(text_encoder=mistral(mistral_processor().tokenizer))
    with pytest.raises(more_hf.SiteNotFoundError, match="CogView3PlusTransformer2DModel"):
        more_hf.erase_concept(cogview_3, "van gogh", remap_to="claude monet")


def test_proof_by_run_sees_text_that_bypasses_the_layers(tiny_sd):
    pipe = tiny_sd()
    features_that_bypass_sites(pipe.unet)
    before = snapshot(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="by other ways than the 8 layers"):
        erase(pipe)
    assert changed(pipe, before) == []


def assert_still_in_force(pipe, erasure, before):
    assert changed(pipe, before) == []
    assert more_hf.get_erasure(pipe) is erasure
    hooks = [] if erasure.hook is None else [erasure.hook]
    assert [hook for hook in pipe.unet._forward_pre_hooks.values() if hook in hooks] == hooks
    assert all(hook.enabled for hook in hooks)


def test_a_lora_that_was_fused_and_unloaded_is_part_of_the_weights(tiny_sd, tmp_path):
    pipe, same, without = fused_lora(tiny_sd(), tmp_path), tiny_sd(), tiny_sd()
    pipe.unload_lora_weights()
    same.unet.load_state_dict(pipe.unet.state_dict())
    name = SITE.replace("to_v", "to_k")
    merged, expected, plain = (erase(p).unet.get_submodule(name).weight for p in (pipe, same, without))
    assert torch.equal(merged, expected)
    assert not torch.allclose(merged, plain, atol=1e-3)


SPOILED = [fused_projections, unfused_projections, fused_lora, frozen_processor]


@pytest.mark.slow
@pytest.mark.parametrize("router", [None, "random"])
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_an_earlier_erasure_survives_a_refusal(tiny_sd, tmp_path, spoil, router):
    pipe = erase(tiny_sd(), router=router)
    erasure = more_hf.get_erasure(pipe)
    spoil(pipe, tmp_path)
    before = snapshot(pipe)
    with pytest.raises(more_hf.MoreError):
        erase(pipe, "pablo picasso", router=router)
    assert_still_in_force(pipe, erasure, before)


def test_denoiser_that_fails_during_the_proof(tiny_sd, monkeypatch):
    pipe = erase(tiny_sd(), router="random")
    erasure, before = more_hf.get_erasure(pipe), snapshot(pipe)
    pipe.unet.train()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.unet, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        erase(pipe, "pablo picasso", router="random")
    assert_still_in_force(pipe, erasure, before)
    assert all(module.training for module in pipe.unet.modules())
