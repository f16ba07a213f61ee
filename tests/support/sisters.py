"""
Other pipelines of the newer families' denoisers, which take a picture or make a film: the real classes at
tiny sizes.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo,
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    CogView4ControlPipeline,
    DiffusionPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    HunyuanImageRefinerPipeline,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    KolorsImg2ImgPipeline,
    KolorsPAGPipeline,
    LucyEditPipeline,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SCMScheduler,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from support import language_models
from support.families import LLM_WIDTH, build, stirred
from support.language_models import HEADERS, qwen_processor, qwen_tokenizer, qwen_vl


class Sister(NamedTuple):
    """
    A pipeline that shares a family's denoiser.

    Args:
        family (`str`):
            Of the denoiser.
        cls (`type`):
            The pipeline's.
        call (`Mapping[str, Any]`):
            What its call takes besides the prompt.
        config (`Mapping[str, Any]`):
            What is other in the denoiser's configuration.
        parts (`Callable`):
            `(its parts so far) -> other parts`.
    """

    family: str
    cls: type[DiffusionPipeline]
    call: Mapping[str, Any]
    config: Mapping[str, Any] = {}
    parts: Callable[[dict[str, Any]], dict[str, Any]] = lambda parts: {}


PICTURE = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 16:] = 1
DRAWN = Image.linear_gradient("L").convert("RGB").resize((64, 64))
CHANGE = {"image": PICTURE, "strength": 0.9, "num_inference_steps": 4}
FILL = {**CHANGE, "mask_image": MASK}


def sprint(parts):
    return {"scheduler": SCMScheduler()}


def changed(model, **config):
    """Another one of its class, with a configuration that differs in this."""
    own = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return type(model)(**{**own, **config}).eval()


def told_of_guidance(parts):
    """The pipeline asks the transformer's configuration for what only FLUX has."""
    parts["transformer"].register_to_config(guidance_embeds=False)
    return {}


def layered_parts(parts):
    """Pictures with an alpha channel, and more channels than that inside."""
    vae, scales = parts["vae"], {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    vae = changed(vae, **scales, z_dim=8, input_channels=4)
    return {"vae": vae, "processor": qwen_processor()}


def picture_reader(parts):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def film_parts(parts):
    sizes = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    processor = qwen_processor(language_models.FILM)
    return {
        "vae": AutoencoderKLHunyuanVideo(latent_channels=4, **sizes).eval(),
        "tokenizer": processor,
        "text_encoder": qwen_vl(processor.tokenizer, LLM_WIDTH),
    }


def refiner_parts(parts):
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=2,  # of two frames together
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    ).eval()
    tokenizer = qwen_tokenizer(HEADERS)
    return {"vae": vae, "tokenizer": tokenizer, "text_encoder": qwen_vl(tokenizer, LLM_WIDTH)}


def controlnet(cls, **config):
    """With a ControlNet of the transformer's sizes."""

    def parts(parts):
        takes = inspect.signature(cls.__init__).parameters
        sizes = {key: value for key, value in parts["transformer"].config.items() if key in takes}
        return {"controlnet": stirred(cls(**{**sizes, **config}))}

    return parts


PLACES = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
Z_IMAGE = controlnet(ZImageControlNetModel, **PLACES, control_in_dim=4)
Z_IMAGE_INPAINT = controlnet(
    ZImageControlNetModel, **PLACES, control_in_dim=9, add_control_noise_refiner="control_layers"
)


SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
FILM = {"num_frames": 5}
SISTERS = {
    "chroma image-to-image": Sister("chroma", ChromaImg2ImgPipeline, CHANGE),
    "chroma inpainting": Sister("chroma", ChromaInpaintPipeline, FILL, parts=told_of_guidance),
    "z-image image-to-image": Sister("z-image", ZImageImg2ImgPipeline, CHANGE),
    "z-image inpainting": Sister("z-image", ZImageInpaintPipeline, FILL),
    "qwen-image image-to-image": Sister("qwen-image", QwenImageImg2ImgPipeline, CHANGE),
    "qwen-image inpainting": Sister("qwen-image", QwenImageInpaintPipeline, FILL),
    "qwen-image layered": Sister(
        "qwen-image",
        QwenImageLayeredPipeline,
        {"image": DRAWN.convert("RGBA").resize((32, 32)), "layers": 2, "resolution": 640},
        {"use_additional_t_cond": True, "use_layer3d_rope": True, "in_channels": 32, "out_channels": 8},
        layered_parts,
    ),
    "klein with a picture": Sister("klein", Flux2KleinKVPipeline, {"image": DRAWN}),
    "klein inpainting": Sister("klein", Flux2KleinInpaintPipeline, FILL),
    "sana pag": Sister("sana", SanaPAGPipeline, {"pag_scale": 3.0}),
    "sana sprint": Sister("sana", SanaSprintPipeline, {}, SPRINT, sprint),
    "sana sprint image-to-image": Sister(
        "sana", SanaSprintImg2ImgPipeline, {"image": PICTURE}, SPRINT, sprint
    ),
    "kolors image-to-image": Sister("kolors", KolorsImg2ImgPipeline, CHANGE),
    "kolors pag": Sister("kolors", KolorsPAGPipeline, {"pag_scale": 0.3}),  # more magnifies rounding
    "cogview-4 control": Sister(
        "cogview-4", CogView4ControlPipeline, {"control_image": PICTURE}, {"in_channels": 8}
    ),
    "hunyuan-image refiner": Sister(
        "hunyuan-image",
        HunyuanImageRefinerPipeline,
        {"image": PICTURE},
        {
            "in_channels": 8,
            "patch_size": (1, 1, 1),
            "rope_axes_dim": (2, 2, 4),
            "guidance_embeds": True,
            "text_embed_2_dim": None,
        },
        refiner_parts,
    ),
    "wan image-to-video 2.1": Sister(
        "wan",
        WanImageToVideoPipeline,
        # it counts the prompt's positions from behind, 512 of them
        {**FILM, "image": DRAWN, "max_sequence_length": 512, "num_inference_steps": 4},
        {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24},
        picture_reader,
    ),
    "wan image-to-video 2.2": Sister(
        "wan", WanImageToVideoPipeline, {**FILM, "image": PICTURE}, {"in_channels": 12}
    ),
    "wan video-to-video": Sister("wan", WanVideoToVideoPipeline, {**CHANGE, "video": [DRAWN]}),
    "lucy edit": Sister("wan", LucyEditPipeline, {"video": [DRAWN], "num_frames": 1}, {"in_channels": 8}),
    "kandinsky-5 text-to-video": Sister(
        "kandinsky-5", Kandinsky5T2VPipeline, FILM, {"visual_cond": True}, film_parts
    ),
    "kandinsky-5 image-to-video": Sister(
        "kandinsky-5",
        Kandinsky5I2VPipeline,
        {"num_frames": 21, "image": PICTURE},
        {"visual_cond": True},
        film_parts,
    ),
}
# pipelines that an edit of the denoiser would not be enough for, and why
SEES = "sees a picture before the prompt, whose tokens go through the edited layer"
BEHIND = "sees a picture behind the prompt, whose tokens then hold the name"
ALSO = "also reads the prompt"
QWEN = controlnet(QwenImageControlNetModel)
REFUSED = [
    (Sister("qwen-image", QwenImageEditPipeline, {}), SEES),
    (Sister("qwen-image", QwenImageEditInpaintPipeline, {}), SEES),
    (Sister("qwen-image", QwenImageEditPlusPipeline, {}), SEES),
    (Sister("qwen-image", QwenImageControlNetPipeline, {}, parts=QWEN), ALSO),
    (Sister("qwen-image", QwenImageControlNetInpaintPipeline, {}, parts=QWEN), ALSO),
    (Sister("kandinsky-5", Kandinsky5I2IPipeline, {}), BEHIND),
    (Sister("sana", SanaControlNetPipeline, {}, parts=controlnet(SanaControlNetModel)), ALSO),
    (Sister("z-image", ZImageControlNetPipeline, {}, parts=Z_IMAGE), ALSO),
    (Sister("z-image", ZImageControlNetInpaintPipeline, {}, parts=Z_IMAGE_INPAINT), ALSO),
    (Sister("z-image", ZImageOmniPipeline, {}), "puts pictures between the tokens of the prompt"),
    (Sister("z-image", ZImagePipeline, {}, {"siglip_feat_dim": 8}), "reads pictures between the tokens"),
]
# parts that a pipeline takes besides those of the text-to-image pipeline, and does without
OPTIONAL = ("image_encoder", "image_processor", "feature_extractor", "guider", "processor")
OPTIONAL += ("siglip", "siglip_processor")


def build_sister(sister):
    """The pipeline. Does not change the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = dict.fromkeys(OPTIONAL) | build(sister.family).components
        if sister.config:
            parts["transformer"] = stirred(changed(parts["transformer"], **sister.config))
        parts |= sister.parts(parts)
        takes = inspect.signature(sister.cls.__init__).parameters
        pipe = sister.cls(**{part: value for part, value in parts.items() if part in takes})
    pipe.set_progress_bar_config(disable=True)
    return pipe
