"""Other pipelines of the families' denoisers: with a picture, of a film, or drawn in another way."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from support import language_models
from support.bare import shortened
from support.families import build, language_model, plain_vae, stirred, umt5, with_parts
from support.language_models import HEADERS, qwen_processor, qwen_tokenizer
from support.pipelines import random_ip_adapter


class Sister(NamedTuple):
    """
    A pipeline that shares a family's denoiser: its class in diffusers, what its call takes besides the
    prompt, what is other in the denoiser's configuration, and `(its parts so far) -> other parts`.
    """

    family: str
    pipeline: str
    call: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}
    parts: Callable[[dict[str, Any]], dict[str, Any]] = lambda parts: {}

    @property
    def cls(self):
        return getattr(diffusers, self.pipeline)


PICTURE = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 16:] = 1
DRAWN = Image.linear_gradient("L").convert("RGB").resize((64, 64))
CHANGE = {"image": PICTURE, "strength": 0.9, "num_inference_steps": 4}
FILL = {**CHANGE, "mask_image": MASK}
CONTROL = {"control_image": PICTURE}
NO_RESIZE = {"max_area": 32 * 32, "_auto_resize": False}
FILM = {"num_frames": 5}
LONG_FILM = {"num_frames": 21}


# Other parts of a pipeline


def changed(model, **config):
    """Another one of its class, with a configuration that differs in this."""
    own = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return type(model)(**{**own, **config}).eval()


def scheduler(name, **options):
    return lambda parts: {"scheduler": getattr(diffusers, name)(**options)}


def low_res_scheduler(parts):
    return {"low_res_scheduler": diffusers.DDPMScheduler()}


def ip_adapter(parts):
    parts["unet"]._load_ip_adapter_weights([random_ip_adapter(parts["unet"])])
    return {}


def t2i_adapter(**options):
    sizes = {"in_channels": 3, "channels": [4, 8], "num_res_blocks": 1}
    return lambda parts: {"adapter": diffusers.T2IAdapter(**sizes, **options).eval()}


def told_of_guidance(parts):
    """The pipeline asks the transformer's configuration for what only FLUX has."""
    parts["transformer"].register_to_config(guidance_embeds=False)
    return {}


def layered_parts(parts):
    """Pictures with an alpha channel, and more channels than that inside."""
    scales = {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    vae = changed(parts["vae"], **scales, z_dim=8, input_channels=4)
    return {"vae": vae, "processor": qwen_processor()}


def picture_reader(parts):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def film_parts(parts):
    sizes = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    vae = diffusers.AutoencoderKLHunyuanVideo(latent_channels=4, **sizes).eval()
    return {"vae": vae, **language_model("qwen_vl", qwen_processor(language_models.FILM))}


def refiner_parts(parts):
    sizes = {"latent_channels": 2}  # of two frames together
    sizes |= {"block_out_channels": (32, 32), "layers_per_block": 1}
    sizes |= {"spatial_compression_ratio": 2, "temporal_compression_ratio": 1}
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(**sizes).eval()
    return {"vae": vae, **language_model("qwen_vl", qwen_tokenizer(HEADERS))}


def controlnet(name, **config):
    """With a ControlNet of the denoiser's sizes."""
    cls = getattr(diffusers, name)

    def parts(parts):
        takes = inspect.signature(cls.__init__).parameters
        denoiser = parts["unet"] if "unet" in parts else parts["transformer"]
        sizes = {key: value for key, value in denoiser.config.items() if key in takes}
        return {"controlnet": stirred(cls(**{**sizes, **config}))}

    return parts


def without(*names):
    return lambda parts: dict.fromkeys(names)


SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
LCM = {"config": {"time_cond_proj_dim": 8}, "parts": scheduler("LCMScheduler")}
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}
TRAILING = scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
EMBEDS = {"ip_adapter_image_embeds": [torch.ones(1, 1, 12)]}
ADAPTED = {"sd": t2i_adapter(downscale_factor=2, adapter_type="full_adapter")}
ADAPTED["sdxl"] = t2i_adapter(downscale_factor=4, adapter_type="full_adapter_xl")
UPSCALED = {"in_channels": 7, "num_class_embeds": 1000}
SMALL = {"image": PICTURE[..., :16, :16]}
SIXTEEN = {"in_channels": 16, "out_channels": 16}
REFINER = {"in_channels": 8, "patch_size": (1, 1, 1), "rope_axes_dim": (2, 2, 4)}
REFINER |= {"guidance_embeds": True, "text_embed_2_dim": None}
TWICE = {**SIXTEEN, "in_channels": 32}
SISTERS = {
    "sd image-to-image": Sister("sd-1", "StableDiffusionImg2ImgPipeline", CHANGE),
    "sd inpainting": Sister("sd-1", "StableDiffusionInpaintPipeline", FILL),
    "sd inpainting UNet": Sister("sd-1", "StableDiffusionInpaintPipeline", FILL, {"in_channels": 9}),
    "lcm": Sister("sd-1", "LatentConsistencyModelPipeline", {"guidance_scale": 8.5}, **LCM),
    "lcm image-to-image": Sister("sd-1", "LatentConsistencyModelImg2ImgPipeline", CHANGE, **LCM),
    "sd turbo": Sister("sd-1", "StableDiffusionPipeline", ONE_STEP, parts=TRAILING),
    "sd ip-adapter": Sister("sd-1", "StableDiffusionPipeline", EMBEDS, parts=ip_adapter),
    "sd pag": Sister("sd-1", "StableDiffusionPAGPipeline", {"pag_scale": 3.0}),
    "sd t2i-adapter": Sister("sd-1", "StableDiffusionAdapterPipeline", {"image": PICTURE}, {}, ADAPTED["sd"]),
    "sd upscaler": Sister("sd-1", "StableDiffusionUpscalePipeline", SMALL, UPSCALED, low_res_scheduler),
    "sdxl image-to-image": Sister("sdxl", "StableDiffusionXLImg2ImgPipeline", CHANGE),
    "sdxl inpainting": Sister("sdxl", "StableDiffusionXLInpaintPipeline", FILL),
    "sdxl turbo": Sister("sdxl", "StableDiffusionXLPipeline", ONE_STEP, parts=TRAILING),
    "sdxl lcm": Sister("sdxl", "StableDiffusionXLPipeline", parts=scheduler("LCMScheduler")),
    "sdxl ip-adapter": Sister("sdxl", "StableDiffusionXLPipeline", EMBEDS, parts=ip_adapter),
    "sdxl pag": Sister("sdxl", "StableDiffusionXLPAGPipeline", {"pag_scale": 3.0}),
    "sdxl t2i-adapter": Sister(
        "sdxl", "StableDiffusionXLAdapterPipeline", {"image": PICTURE}, parts=ADAPTED["sdxl"]
    ),
    "sdxl instruct": Sister(
        "sdxl", "StableDiffusionXLInstructPix2PixPipeline", {"image": PICTURE}, {"in_channels": 8}
    ),
    "sd3 image-to-image": Sister("sd3", "StableDiffusion3Img2ImgPipeline", CHANGE),
    "sd3 inpainting": Sister(
        "sd3",
        "StableDiffusion3InpaintPipeline",
        FILL,
        SIXTEEN,
        lambda _: {"vae": plain_vae(latent_channels=16)},
    ),
    "sd3 pag": Sister(
        "sd3", "StableDiffusion3PAGPipeline", parts=lambda parts: {"pag_applied_layers": ["blocks.1"]}
    ),
    "flux image-to-image": Sister("flux", "FluxImg2ImgPipeline", CHANGE),
    "flux inpainting": Sister("flux", "FluxInpaintPipeline", FILL),
    "flux kontext": Sister("flux", "FluxKontextPipeline", {"image": PICTURE, **NO_RESIZE}),
    "flux kontext inpainting": Sister("flux", "FluxKontextInpaintPipeline", {**FILL, **NO_RESIZE}),
    "flux fill": Sister(
        "flux", "FluxFillPipeline", {"image": PICTURE, "mask_image": MASK}, {**SIXTEEN, "in_channels": 48}
    ),
    "flux control": Sister("flux", "FluxControlPipeline", CONTROL, TWICE),
    "flux control image-to-image": Sister("flux", "FluxControlImg2ImgPipeline", {**CHANGE, **CONTROL}, TWICE),
    "flux control inpainting": Sister("flux", "FluxControlInpaintPipeline", {**FILL, **CONTROL}, TWICE),
    "pixart-α": Sister("pixart", "PixArtAlphaPipeline"),
    "pixart pag": Sister(
        "pixart", "PixArtSigmaPAGPipeline", {"pag_scale": 3.0}, parts=lambda _: {"pag_applied_layers": "1"}
    ),
    "chroma image-to-image": Sister("chroma", "ChromaImg2ImgPipeline", CHANGE),
    "chroma inpainting": Sister("chroma", "ChromaInpaintPipeline", FILL, parts=told_of_guidance),
    "z-image image-to-image": Sister("z-image", "ZImageImg2ImgPipeline", CHANGE),
    "z-image inpainting": Sister("z-image", "ZImageInpaintPipeline", FILL),
    "qwen-image image-to-image": Sister("qwen-image", "QwenImageImg2ImgPipeline", CHANGE),
    "qwen-image inpainting": Sister("qwen-image", "QwenImageInpaintPipeline", FILL),
    "qwen-image layered": Sister(
        "qwen-image",
        "QwenImageLayeredPipeline",
        {"image": DRAWN.convert("RGBA").resize((32, 32)), "layers": 2, "resolution": 640},
        {"use_additional_t_cond": True, "use_layer3d_rope": True, "in_channels": 32, "out_channels": 8},
        layered_parts,
    ),
    "klein with a picture": Sister("klein", "Flux2KleinKVPipeline", {"image": DRAWN}),
    "klein inpainting": Sister("klein", "Flux2KleinInpaintPipeline", FILL),
    "sana pag": Sister("sana", "SanaPAGPipeline", {"pag_scale": 3.0}),
    "sana sprint": Sister("sana", "SanaSprintPipeline", {}, SPRINT, scheduler("SCMScheduler")),
    "sana sprint image-to-image": Sister(
        "sana", "SanaSprintImg2ImgPipeline", {"image": PICTURE}, SPRINT, scheduler("SCMScheduler")
    ),
    "kolors image-to-image": Sister("kolors", "KolorsImg2ImgPipeline", CHANGE),
    "kolors pag": Sister("kolors", "KolorsPAGPipeline", {"pag_scale": 0.3}),  # more magnifies rounding
    "cogview-4 control": Sister("cogview-4", "CogView4ControlPipeline", CONTROL, {"in_channels": 8}),
    "hunyuan-image refiner": Sister(
        "hunyuan-image", "HunyuanImageRefinerPipeline", {"image": PICTURE}, REFINER, refiner_parts
    ),
    "wan image-to-video 2.1": Sister(
        "wan",
        "WanImageToVideoPipeline",
        # it counts the prompt's positions from behind, 512 of them
        {**FILM, "image": DRAWN, "max_sequence_length": 512, "num_inference_steps": 4},
        {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24},
        picture_reader,
    ),
    "wan image-to-video 2.2": Sister(
        "wan", "WanImageToVideoPipeline", {**FILM, "image": PICTURE}, {"in_channels": 12}
    ),
    "wan video-to-video": Sister("wan", "WanVideoToVideoPipeline", {**CHANGE, "video": [DRAWN]}),
    "lucy edit": Sister("wan", "LucyEditPipeline", {"video": [DRAWN], "num_frames": 1}, {"in_channels": 8}),
    "kandinsky-5 text-to-video": Sister(
        "kandinsky-5", "Kandinsky5T2VPipeline", FILM, {"visual_cond": True}, film_parts
    ),
    "kandinsky-5 image-to-video": Sister(
        "kandinsky-5",
        "Kandinsky5I2VPipeline",
        {**LONG_FILM, "image": PICTURE},
        {"visual_cond": True},
        film_parts,
    ),
}
# Pipelines that an edit of the denoiser would not be enough for, or that it cannot be proved on, and words of
# the reason
SEES = ["sees a picture before the prompt"]
BEHIND = ["sees a picture behind the prompt"]
ALSO = "also reads the prompt"
NO_PROMPT = "takes no `prompt`"
PLACES = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
Z_IMAGE_INPAINT = controlnet(
    "ZImageControlNetModel", **PLACES, control_in_dim=9, add_control_noise_refiner="control_layers"
)
WITH_CONTROLNET = [
    Sister("sdxl", "StableDiffusionXLControlNetPipeline", parts=controlnet("ControlNetModel")),
    Sister("sd3", "StableDiffusion3ControlNetPipeline", parts=controlnet("SD3ControlNetModel", num_layers=1)),
    Sister("flux", "FluxControlNetPipeline", parts=controlnet("FluxControlNetModel", num_single_layers=0)),
    Sister("qwen-image", "QwenImageControlNetPipeline", parts=controlnet("QwenImageControlNetModel")),
    Sister("qwen-image", "QwenImageControlNetInpaintPipeline", parts=controlnet("QwenImageControlNetModel")),
    Sister("sana", "SanaControlNetPipeline", parts=controlnet("SanaControlNetModel")),
    Sister(
        "z-image",
        "ZImageControlNetPipeline",
        parts=controlnet("ZImageControlNetModel", **PLACES, control_in_dim=4),
    ),
    Sister("z-image", "ZImageControlNetInpaintPipeline", parts=Z_IMAGE_INPAINT),
]
REFUSED = [
    *((sister, ["`controlnet`", "ControlNetModel", ALSO]) for sister in WITH_CONTROLNET),
    (
        Sister("sdxl", "StableDiffusionXLImg2ImgPipeline", parts=without("text_encoder", "tokenizer")),
        ["without its text encoder `text_encoder`", "all of its text encoders"],
    ),
    (
        Sister("sd3", "StableDiffusion3Pipeline", parts=without("text_encoder_3", "tokenizer_3")),
        ["without its text encoder `text_encoder_3`", "What it says to the model would stay"],
    ),
    (Sister("sd-1", "StableDiffusionInstructPix2PixPipeline"), [NO_PROMPT, "text-to-image pipeline"]),
    (Sister("sd-1", "StableDiffusionLatentUpscalePipeline"), ["takes no `num_images_per_prompt`"]),
    (Sister("flux", "VisualClozePipeline", parts=lambda parts: {"resolution": 384}), [NO_PROMPT]),
    (Sister("sd-1", "LEditsPPPipelineStableDiffusion"), [NO_PROMPT]),
    (
        Sister(
            "sd-1",
            "StableDiffusionPipeline",
            {},
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        ),
        ["class_embed_type='projection'"],
    ),
    (Sister("sd-1", "StableDiffusionPipeline", {}, {"attention_type": "gated"}), ["attention_type='gated'"]),
    (
        Sister("sd-1", "StableDiffusionPipeline", parts=lambda parts: umt5()),
        ["reads prompts of CLIPTextModel", "encodes them with UMT5EncoderModel", "right text encoder"],
    ),
    (
        Sister("", "CogView3PlusPipeline"),
        [
            "FLUX (FluxTransformer2DModel)",
            "transformer: CogView3PlusTransformer2DModel",
            "as wide as the text encoder's features (48)",
            "transformer.patch_embed.text_proj",
            "more_hf.register_family",
        ],
    ),
    (Sister("qwen-image", "QwenImageEditPipeline"), SEES),
    (Sister("qwen-image", "QwenImageEditInpaintPipeline"), SEES),
    (Sister("qwen-image", "QwenImageEditPlusPipeline"), SEES),
    (Sister("kandinsky-5", "Kandinsky5I2IPipeline"), BEHIND),
    (Sister("z-image", "ZImageOmniPipeline"), ["puts pictures between the tokens"]),
    (Sister("z-image", "ZImagePipeline", {}, {"siglip_feat_dim": 8}), ["reads pictures between the tokens"]),
]


def build_sister(sister):
    """The pipeline. Does not change the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = build(sister.family).components
        if sister.config:
            name = "unet" if "unet" in parts else "transformer"
            parts[name] = stirred(changed(parts[name], **sister.config))
        return shortened(with_parts(sister.cls, parts | sister.parts(parts)), sister.family)
