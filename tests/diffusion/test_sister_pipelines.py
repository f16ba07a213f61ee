"""
Other pipelines of the supported denoisers: each is erased as the text-to-image pipeline is, or refused by
name.
"""

import copy
import inspect

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LEditsPPPipelineStableDiffusion,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGPipeline,
    T2IAdapter,
    VisualClozePipeline,
)
from support.compare import same, state
from support.families import T5_LENGTH, build, embeds, shorten, umt5_encoder
from support.pipelines import build_tiny_sd, random_ip_adapter

import more_hf


FORGET, TARGET = "van gogh", "claude monet"
IMAGE = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 16:] = 1
SHORT = {"max_sequence_length": T5_LENGTH}


@pytest.fixture(scope="module", autouse=True)
def short_prompts():
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, *(cls for name, cls in globals().items() if name.endswith("Pipeline")))
        yield


@pytest.fixture(scope="module")
def bases():
    """Text-to-image pipelines. Not to be modified."""
    return {"sd": build_tiny_sd(), **{family: build(family) for family in ("sdxl", "sd3", "flux", "pixart")}}


def with_parts(cls, pipe, **parts):
    """A pipeline of another class with this one's components, as far as it takes them, and others."""
    takes = inspect.signature(cls.__init__).parameters
    return cls(**{name: part for name, part in {**pipe.components, **parts}.items() if name in takes})


def plain_sd(cls, pipe, **parts):
    return with_parts(cls, pipe, requires_safety_checker=False, **parts)


def lcm(cls):
    return lambda pipe: plain_sd(cls, build_tiny_sd(time_cond_proj_dim=8), scheduler=LCMScheduler())


def turbo(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    return pipe


def ip_adapter(pipe):
    pipe.unet._load_ip_adapter_weights([random_ip_adapter(pipe.unet)])
    return pipe


def inpainting_unet(pipe):
    return StableDiffusionInpaintPipeline.from_pipe(
        build_tiny_sd(in_channels=9), requires_safety_checker=False
    )


def upscaling_unet(pipe):
    unet = build_tiny_sd(in_channels=7, num_class_embeds=1000).unet
    return with_parts(StableDiffusionUpscalePipeline, pipe, unet=unet, low_res_scheduler=DDPMScheduler())


def pix2pix_unet(pipe):
    return with_parts(StableDiffusionXLInstructPix2PixPipeline, build("sdxl", in_channels=8))


def adapter(cls, **options):
    return lambda pipe: plain_sd(
        cls, pipe, adapter=T2IAdapter(in_channels=3, channels=[4, 8], num_res_blocks=1, **options).eval()
    )


def sd3_of_16_channels(pipe):
    return StableDiffusion3InpaintPipeline.from_pipe(build("sd3", channels=16))


def wider(cls, channels):
    """FLUX with a transformer that reads more than the latents beside each other."""

    def make(pipe):
        pipe = build("flux")
        transformer = type(pipe.transformer)(
            **{**pipe.transformer.config, "in_channels": channels, "out_channels": 16}
        ).eval()
        return with_parts(cls, pipe, transformer=transformer)

    return make


def control(cls):
    return wider(cls, 32)


def from_pipe(cls):
    return lambda pipe: cls.from_pipe(pipe)


EDIT = {"image": IMAGE, "strength": 0.9}
INPAINT = {"image": IMAGE, "mask_image": MASK, "strength": 0.9}
SIZE = {"height": 32, "width": 32}
PIXART = {**SIZE, **SHORT, "use_resolution_binning": False, "clean_caption": False}
IP = {"ip_adapter_image_embeds": [torch.ones(1, 1, 12)]}

# name -> (base, how to make the pipeline, what its call takes besides the prompt)
ERASED = {
    "image-to-image": ("sd", from_pipe(StableDiffusionImg2ImgPipeline), EDIT),
    "inpainting": ("sd", from_pipe(StableDiffusionInpaintPipeline), {**INPAINT, **SIZE}),
    "inpainting UNet": ("sd", inpainting_unet, {**INPAINT, **SIZE}),
    "LCM": ("sd", lcm(LatentConsistencyModelPipeline), {**SIZE, "guidance_scale": 8.5}),
    "LCM image-to-image": (
        "sd",
        lcm(LatentConsistencyModelImg2ImgPipeline),
        {"image": IMAGE, "num_inference_steps": 4},
    ),
    "turbo": ("sd", turbo, {**SIZE, "num_inference_steps": 1, "guidance_scale": 0.0}),
    "IP-Adapter": ("sd", ip_adapter, {**SIZE, **IP}),
    "PAG": ("sd", from_pipe(StableDiffusionPAGPipeline), {**SIZE, "pag_scale": 3.0}),
    "T2I-Adapter": (
        "sd",
        adapter(StableDiffusionAdapterPipeline, downscale_factor=2, adapter_type="full_adapter"),
        {**SIZE, "image": IMAGE},
    ),
    "upscaler": ("sd", upscaling_unet, {"image": IMAGE[..., :16, :16]}),
    "XL image-to-image": ("sdxl", from_pipe(StableDiffusionXLImg2ImgPipeline), EDIT),
    "XL inpainting": ("sdxl", from_pipe(StableDiffusionXLInpaintPipeline), {**INPAINT, **SIZE}),
    "XL turbo": ("sdxl", turbo, {**SIZE, "num_inference_steps": 1, "guidance_scale": 0.0}),
    "XL LCM": ("sdxl", lambda pipe: with_parts(type(pipe), pipe, scheduler=LCMScheduler()), SIZE),
    "XL IP-Adapter": ("sdxl", ip_adapter, {**SIZE, **IP}),
    "XL PAG": ("sdxl", from_pipe(StableDiffusionXLPAGPipeline), {**SIZE, "pag_scale": 3.0}),
    "XL T2I-Adapter": (
        "sdxl",
        adapter(StableDiffusionXLAdapterPipeline, downscale_factor=4, adapter_type="full_adapter_xl"),
        {**SIZE, "image": IMAGE},
    ),
    "XL InstructPix2Pix": ("sdxl", pix2pix_unet, {**SIZE, "image": IMAGE}),
    "3 image-to-image": ("sd3", from_pipe(StableDiffusion3Img2ImgPipeline), {**EDIT, **SIZE, **SHORT}),
    "3 inpainting": ("sd3", sd3_of_16_channels, {**INPAINT, **SIZE, **SHORT}),
    "3 PAG": (
        "sd3",
        lambda pipe: with_parts(StableDiffusion3PAGPipeline, pipe, pag_applied_layers=["blocks.1"]),
        {**SIZE, **SHORT},
    ),
    "FLUX image-to-image": ("flux", from_pipe(FluxImg2ImgPipeline), {**EDIT, **SIZE, **SHORT}),
    "FLUX inpainting": ("flux", from_pipe(FluxInpaintPipeline), {**INPAINT, **SIZE, **SHORT}),
    "FLUX Kontext": (
        "flux",
        from_pipe(FluxKontextPipeline),
        {**SIZE, **SHORT, "image": IMAGE, "max_area": 32 * 32, "_auto_resize": False},
    ),
    "FLUX Fill": ("flux", wider(FluxFillPipeline, 48), {"image": IMAGE, "mask_image": MASK, **SIZE, **SHORT}),
    "FLUX Kontext inpainting": (
        "flux",
        from_pipe(FluxKontextInpaintPipeline),
        {**INPAINT, **SIZE, **SHORT, "max_area": 32 * 32, "_auto_resize": False},
    ),
    "FLUX Control": ("flux", control(FluxControlPipeline), {**SIZE, **SHORT, "control_image": IMAGE}),
    "FLUX Control image-to-image": (
        "flux",
        control(FluxControlImg2ImgPipeline),
        {**EDIT, **SIZE, **SHORT, "control_image": IMAGE},
    ),
    "FLUX Control inpainting": (
        "flux",
        control(FluxControlInpaintPipeline),
        {**INPAINT, **SIZE, **SHORT, "control_image": IMAGE},
    ),
    "PixArt-α": ("pixart", lambda pipe: with_parts(PixArtAlphaPipeline, pipe), PIXART),
    "PixArt PAG": (
        "pixart",
        lambda pipe: with_parts(PixArtSigmaPAGPipeline, pipe, pag_applied_layers="1"),
        {**PIXART, "pag_scale": 3.0},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERASED)
def test_erases(bases, name):
    base, make, options = ERASED[name]
    original, pipe = make(copy.deepcopy(bases[base])), make(copy.deepcopy(bases[base]))
    for part, module in pipe.components.items():  # some are made here, with weights of their own
        if isinstance(module, torch.nn.Module):
            original.components[part].load_state_dict(module.state_dict())
    more_hf.erase_concept(pipe, FORGET, remap_to=TARGET, solver="pinv")
    erasure = more_hf.get_erasure(pipe)
    remaps = {site.space: erasure.remap_of(name) for name, site in erasure.sites.items()}
    assert set(remaps) == ({"tokens", "pooled"} if base in ("sdxl", "sd3", "flux") else {"tokens"})

    def image(pipe, prompt):
        pipe.set_progress_bar_config(disable=True)
        generator, fixed = (
            torch.Generator().manual_seed(0),
            {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"},
        )
        found = embeds(remaps, prompt, masked=base == "pixart")
        return torch.from_numpy(pipe(generator=generator, **{**fixed, **found, **options}).images).double()

    forgotten, wanted = image(original, FORGET), image(original, TARGET)
    apart = (forgotten - wanted).norm()
    assert apart > 1e-4 * wanted.norm()
    assert (image(pipe, FORGET) - wanted).norm() < 0.01 * apart
    assert (image(pipe, TARGET) - wanted).norm() < 0.01 * apart


# What is refused


def controlnet_xl(bases):
    pipe = copy.deepcopy(bases["sdxl"])
    return with_parts(
        StableDiffusionXLControlNetPipeline, pipe, controlnet=ControlNetModel.from_unet(pipe.unet)
    )


def controlnet_3(bases):
    pipe = copy.deepcopy(bases["sd3"])
    return with_parts(
        StableDiffusion3ControlNetPipeline,
        pipe,
        controlnet=SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=1),
    )


def controlnet_flux(bases):
    pipe = copy.deepcopy(bases["flux"])
    config = {
        key: pipe.transformer.config[key]
        for key in ("in_channels", "attention_head_dim", "num_attention_heads", "axes_dims_rope")
    }
    widths = {key: pipe.transformer.config[key] for key in ("joint_attention_dim", "pooled_projection_dim")}
    controlnet = FluxControlNetModel(patch_size=1, num_layers=1, num_single_layers=0, **config, **widths)
    return with_parts(FluxControlNetPipeline, pipe, controlnet=controlnet)


def refiner(bases):
    return with_parts(
        StableDiffusionXLImg2ImgPipeline, copy.deepcopy(bases["sdxl"]), text_encoder=None, tokenizer=None
    )


def without_t5(bases):
    return with_parts(type(bases["sd3"]), copy.deepcopy(bases["sd3"]), text_encoder_3=None, tokenizer_3=None)


def instruct_pix2pix(bases):
    return StableDiffusionInstructPix2PixPipeline.from_pipe(
        copy.deepcopy(bases["sd"]), requires_safety_checker=False
    )


def latent_upscaler(bases):
    return with_parts(StableDiffusionLatentUpscalePipeline, copy.deepcopy(bases["sd"]))


def ledits(bases):
    return plain_sd(LEditsPPPipelineStableDiffusion, copy.deepcopy(bases["sd"]))


def visual_cloze(bases):
    return with_parts(VisualClozePipeline, copy.deepcopy(bases["flux"]), resolution=384)


def image_embeddings(bases):
    return build_tiny_sd(class_embed_type="projection", projection_class_embeddings_input_dim=8)


def layout_phrases(bases):
    return build_tiny_sd(attention_type="gated")


def other_text_encoder(bases):
    pipe = copy.deepcopy(bases["sd"])
    pipe.register_modules(text_encoder=umt5_encoder(256))
    return pipe


def unknown_family(bases):
    return build()


REFUSED = {
    controlnet_xl: ["`controlnet` (ControlNetModel)", "also reads the prompt"],
    controlnet_3: ["`controlnet` (SD3ControlNetModel)", "also reads the prompt"],
    controlnet_flux: ["`controlnet` (FluxControlNetModel)", "also reads the prompt"],
    refiner: ["without its text encoder `text_encoder`", "all of its text encoders"],
    without_t5: ["without its text encoder `text_encoder_3`", "What it says to the model would stay"],
    instruct_pix2pix: [
        "StableDiffusionInstructPix2PixPipeline",
        "takes no `prompt`",
        "text-to-image pipeline",
    ],
    latent_upscaler: ["StableDiffusionLatentUpscalePipeline", "takes no `num_images_per_prompt`"],
    visual_cloze: ["VisualClozePipeline", "takes no `prompt`"],
    ledits: ["LEditsPPPipelineStableDiffusion", "takes no `prompt`"],
    image_embeddings: ["class_embed_type='projection'"],
    layout_phrases: ["attention_type='gated'"],
    other_text_encoder: [
        "reads prompts with UMT5EncoderModel",
        "Supported are CLIPTextModel; CLIPTextModel + CLIPTextModelWithProjection",
    ],
    unknown_family: [
        "CogView3PlusPipeline is not supported yet",
        "FLUX (FluxTransformer2DModel)",
        "transformer: CogView3PlusTransformer2DModel",
        "linear layers are as wide as the text encoder's features (48)",
        "transformer.patch_embed.text_proj",
        "To add this family",
        "more_hf.register_family",
    ],
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_refuses(bases, make):
    pipe = make(bases)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    before = [state(module) for module in modules]
    with pytest.raises(more_hf.SiteNotFoundError) as error:
        more_hf.erase_concept(pipe, FORGET, remap_to=TARGET)
    missing = [word for word in REFUSED[make] if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    for module, as_it_was in zip(modules, before, strict=True):
        assert same(module, as_it_was)
