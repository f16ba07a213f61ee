"""
Pipelines of the newer families: the real classes with random weights, 32x32 images and features a few numbers
wide.
"""

import copy
import inspect
import string

import numpy as np
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    KolorsPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

import more_hf
from support.compare import state
from support.language_models import (
    chat_glm,
    chat_glm_tokenizer,
    gemma,
    gemma_tokenizer,
    glm,
    glm_tokenizer,
    llama,
    llama_tokenizer,
    mistral,
    mistral_processor,
    qwen3,
    qwen_processor,
    qwen_tokenizer,
    qwen_vl,
)
from support.pipelines import NOISE, TEXT_LENGTH, WORDS, tiny_tokenizer


T5_LENGTH = 24  # of the prompts of these tests; `max_sequence_length` is an argument of every call
SYSTEM_LENGTH = 48  # with a system message in front
T5_WIDTH = 48
LLM_WIDTH = 64
LOUD = 2.0  # of the newer denoisers' weights


def t5_tokenizer():
    """Every printable character, and the words of the CLIP tokenizer."""
    words = [(f"▁{word}", -3.0) for word in WORDS.split()]
    characters = [(character, -9.0) for character in string.printable if not character.isspace()]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0), *words, *characters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


T5_SIZES = {"d_model": T5_WIDTH, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def t5_encoder(vocabulary):
    return T5EncoderModel(T5Config(vocab_size=vocabulary, **T5_SIZES, feed_forward_proj="gated-gelu")).eval()


def umt5_encoder(vocabulary):
    return UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **T5_SIZES)).eval()


def clip_encoder(cls, tokenizer, width, projection=None, length=TEXT_LENGTH):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config).eval()


def tiny_vae(cls=AutoencoderKL, **options):
    return cls(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        **{"sample_size": 32, "latent_channels": 4, **options},
    ).eval()


def plain_vae(**options):
    """Without the convolutions around the latents, which the newer models left out."""
    return tiny_vae(use_quant_conv=False, use_post_quant_conv=False, **options)


def second_tokenizer():
    """SDXL's second tokenizer pads with another token."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    return tokenizer


def tiny_sdxl(cls=StableDiffusionXLPipeline, **unet_options):
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        **{
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "attention_head_dim": 2,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 16 + 24,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 20 + 6 * 4,
            **unet_options,
        }
    ).eval()
    return cls(
        vae=tiny_vae(),
        text_encoder=clip_encoder(CLIPTextModel, tokenizer, 16),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection, tokenizer, 24, projection=20),
        tokenizer=tokenizer,
        tokenizer_2=second_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**NOISE),
        add_watermarker=False,
    )


def tiny_kolors(cls=KolorsPipeline):
    """Stable Diffusion XL's UNet, which reads a language model through one projection."""
    tokenizer = chat_glm_tokenizer()
    unet = tiny_sdxl(
        cross_attention_dim=24,
        encoder_hid_dim=LLM_WIDTH,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=LLM_WIDTH + 6 * 4,
    ).unet
    return cls(tiny_vae(), chat_glm(tokenizer, LLM_WIDTH), tokenizer, stirred(unet), DDIMScheduler(**NOISE))


def tiny_sd3(channels=4):
    tokenizer, t5 = tiny_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        out_channels=channels,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=plain_vae(latent_channels=channels, shift_factor=0.06),
        text_encoder=clip_encoder(CLIPTextModelWithProjection, tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection, tokenizer, 24),
        tokenizer_2=second_tokenizer(),
        text_encoder_3=t5_encoder(len(t5)),
        tokenizer_3=t5,
    )


def tiny_flux():
    tokenizer, t5 = tiny_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=plain_vae(shift_factor=0.1),
        text_encoder=clip_encoder(CLIPTextModel, tokenizer, 32),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(len(t5)),
        tokenizer_2=t5,
        transformer=transformer,
    )


def tiny_pixart(cls=PixArtSigmaPipeline):
    t5 = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=T5_WIDTH,
    ).eval()
    return cls(
        tokenizer=t5,
        text_encoder=t5_encoder(len(t5)),
        vae=tiny_vae(),
        transformer=transformer,
        scheduler=DDIMScheduler(**NOISE),
    )


def stirred(model, loud=LOUD):
    """
    The same model: no norm multiplies by 1, which would hide one that is left out, and the weights are large
    enough for the text to be seen in the picture.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=loud * module.in_features**-0.5)
        elif "RMSNorm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    return model.eval()


def tiny_chroma():
    t5 = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=plain_vae(shift_factor=0.1),
        text_encoder=t5_encoder(len(t5)),
        tokenizer=t5,
        transformer=transformer,
    )


def tiny_z_image(cls=ZImagePipeline):
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=LLM_WIDTH,
        axes_dims=[2, 2, 4],
        axes_lens=[128, 32, 32],
    ).eval()
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=plain_vae(shift_factor=0.1),
        text_encoder=qwen3(tokenizer, LLM_WIDTH),
        tokenizer=tokenizer,
        transformer=stirred(transformer),
    )


def tiny_qwen_image(cls=QwenImagePipeline):
    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=LLM_WIDTH,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=qwen_vl(tokenizer, LLM_WIDTH),
        tokenizer=tokenizer,
        transformer=stirred(transformer),
    )


def flux_2_parts(width, guidance):
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": tiny_vae(AutoencoderKLFlux2, layers_per_block=1),
        "transformer": stirred(transformer),
    }


def tiny_klein():
    """Layers 9, 18 and 27 of the language model, as in the real one, side by side."""
    tokenizer = qwen_tokenizer()
    encoder = qwen3(tokenizer, 24, layers=28)
    parts = flux_2_parts(24, guidance=False)
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, is_distilled=True, **parts)


def tiny_flux_2():
    """Layers 10, 20 and 30."""
    processor = mistral_processor()
    parts = flux_2_parts(48, guidance=True)
    return Flux2Pipeline(text_encoder=mistral(processor, 48), tokenizer=processor, **parts)


def tiny_wan():
    t5 = t5_tokenizer()
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=T5_WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    return WanPipeline(
        tokenizer=t5,
        text_encoder=umt5_encoder(len(t5)),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=stirred(transformer),
    )


def tiny_wan_2_2(cls=WanPipeline, **options):
    """Two transformers, one for the noisy steps and one for the others, each with weights of its own."""
    parts = tiny_wan().components
    parts |= {
        name: stirred(WanTransformer3DModel.from_config({**parts["transformer"].config, **options}))
        for name in ("transformer", "transformer_2")
    }
    takes = inspect.signature(cls.__init__).parameters
    return cls(**{name: part for name, part in parts.items() if name in takes}, boundary_ratio=0.9)


def tiny_hunyuan_image():
    tokenizer = qwen_tokenizer()
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=LLM_WIDTH,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    ).eval()
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=1.0,
    ).eval()
    letters = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=qwen_vl(tokenizer, LLM_WIDTH),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(letters).eval(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=stirred(transformer),
        guider=AdaptiveProjectedMixGuidance(),
    )


def tiny_sana():
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=LLM_WIDTH,
        sample_size=16,
    )
    blocks = {"block_type": "ResBlock", "block_out_channels": (8, 8), "qkv_multiscales": ((), ())}
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=1.0,
        **{key.replace("block_type", "block_types"): value for key, value in sizes.items()},
    ).eval()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer, LLM_WIDTH),
        vae=vae,
        transformer=stirred(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def tiny_lumina_2():
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(256, 32, 32),
        cap_feat_dim=LLM_WIDTH,
    )
    return Lumina2Pipeline(
        transformer=stirred(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=plain_vae(shift_factor=0.1),
        text_encoder=gemma(tokenizer, LLM_WIDTH),
        tokenizer=tokenizer,
    )


def tiny_cogview_4():
    tokenizer = glm_tokenizer()
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=LLM_WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=16,
        rope_axes_dim=(32, 32),
    )
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=glm(tokenizer, LLM_WIDTH),
        vae=tiny_vae(),
        transformer=stirred(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def tiny_kandinsky_5():
    processor, tokenizer = qwen_processor(), tiny_tokenizer()
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=LLM_WIDTH,
        in_text_dim2=20,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
    )
    return Kandinsky5T2IPipeline(
        transformer=stirred(transformer),
        vae=plain_vae(),
        text_encoder=qwen_vl(processor.tokenizer, LLM_WIDTH),
        tokenizer=processor,
        text_encoder_2=clip_encoder(CLIPTextModel, tokenizer, 20, length=77),
        tokenizer_2=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def tiny_hidream():
    """Of the layers 0 to 3 of its Llama it reads three, the last twice."""
    tokenizer, t5, words = tiny_tokenizer(), t5_tokenizer(), llama_tokenizer()
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[T5_WIDTH, LLM_WIDTH],
        text_emb_dim=16 + 24,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 2, 3, 3],
    )
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=plain_vae(shift_factor=0.1),
        text_encoder=clip_encoder(CLIPTextModelWithProjection, tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection, tokenizer, 24),
        tokenizer_2=second_tokenizer(),
        text_encoder_3=t5_encoder(len(t5)),
        tokenizer_3=t5,
        text_encoder_4=llama(words, LLM_WIDTH),
        tokenizer_4=words,
        transformer=stirred(transformer, 1.0),  # louder ones overflow float16
    )


def tiny_auraflow():
    t5 = t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=T5_WIDTH,
        pos_embed_max_size=64,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    return AuraFlowPipeline(t5, umt5_encoder(len(t5)), tiny_vae(), stirred(transformer), scheduler)


def tiny_cogview_3():
    """A pipeline of a family that the package does not know."""
    t5 = t5_tokenizer()
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=T5_WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
    )
    return CogView3PlusPipeline(
        t5, t5_encoder(len(t5)), tiny_vae(), stirred(transformer), CogVideoXDDIMScheduler()
    )


BUILDERS = {
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "pixart": tiny_pixart,
    "chroma": tiny_chroma,
    "wan": tiny_wan,
    "wan-2.2": tiny_wan_2_2,
    "z-image": tiny_z_image,
    "qwen-image": tiny_qwen_image,
    "hunyuan-image": tiny_hunyuan_image,
    "klein": tiny_klein,
    "flux-2": tiny_flux_2,
    "sana": tiny_sana,
    "lumina-2": tiny_lumina_2,
    "cogview-4": tiny_cogview_4,
    "kandinsky-5": tiny_kandinsky_5,
    "hidream": tiny_hidream,
    "auraflow": tiny_auraflow,
    "kolors": tiny_kolors,
}


def build(family="", **options):
    """
    A pipeline of this family, or of one that the package does not know. Does not change the global random
    state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILDERS.get(family, tiny_cogview_3)(**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def copied(pipe):
    """A pipeline with a denoiser of its own; what no edit touches is shared, which is most of a copy."""
    twin = copy.copy(pipe)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    twin.register_modules(**{name: copy.deepcopy(getattr(pipe, name))})
    return twin


class Built(dict):
    """Pipelines of families, each made when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, family):
        self[family] = self.make(family)
        return self[family]


SHORTENED = (
    StableDiffusion3Pipeline,
    FluxPipeline,
    PixArtSigmaPipeline,
    ChromaPipeline,
    WanPipeline,
    ZImagePipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    SanaPipeline,
    CogView4Pipeline,
    AuraFlowPipeline,
    KolorsPipeline,
    HiDreamImagePipeline,
)


def shorten(monkeypatch, *classes, length=None):
    """
    Fewer ordinary prompts, and let `encode_prompt` of pipelines that pad the prompt give it so many positions
    by default, not 226 to 512.
    """
    monkeypatch.setattr(
        "more_hf.diffusion.ordinary.everyday_prompts",
        lambda tokenizer: ("a dog and a tree", "a house by picasso", "a car"),
    )
    for cls in classes or SHORTENED:
        encode = getattr(cls, "encode_prompt", None)
        if encode is None or "max_sequence_length" not in inspect.signature(encode).parameters:
            continue
        short = length or (SYSTEM_LENGTH if cls is Flux2Pipeline else T5_LENGTH)
        defaults = [p for p in inspect.signature(encode).parameters.values() if p.default is not p.empty]
        values = tuple(short if p.name == "max_sequence_length" else p.default for p in defaults)
        monkeypatch.setattr(encode, "__defaults__", values)


def embeds(remaps, name, masked=False):
    """
    A made-up prompt for a pipeline's call: its features are exactly the prototypes of a name, and those that
    always stay.
    """

    def features(space):
        P = remaps[space].prototypes
        stay = () if space == "pooled" else ("begin token", "empty prompt", "T5 empty prompt")
        return P.matrix[
            :, [i for i, column in enumerate(P.names) if column.startswith((f"{name} · ", *stay))]
        ].T.float()

    found = {"prompt_embeds": features("tokens")[None]}
    if "pooled" in remaps:
        found["pooled_prompt_embeds"] = features("pooled")
    if masked:
        tokens, mask = found["prompt_embeds"], torch.ones(found["prompt_embeds"].shape[:2])
        found |= {
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": tokens,
            "negative_prompt_attention_mask": mask,
        }
        found["negative_prompt"] = None
    return found


FAMILIES = ["sdxl", "sd3", "flux", "pixart"]
NEWER = ["chroma", "wan", "z-image", "qwen-image", "hunyuan-image", "klein", "flux-2"]
NEWER += ["sana", "lumina-2", "cogview-4", "kandinsky-5", "hidream", "auraflow", "kolors"]
FORGET, TARGET, RETAINED = "van gogh", "claude monet", "cat"
CALL = {
    "sdxl": {},
    "sd3": {"max_sequence_length": T5_LENGTH},
    "flux": {"max_sequence_length": T5_LENGTH},
    "pixart": {"max_sequence_length": T5_LENGTH, "use_resolution_binning": False, "clean_caption": False},
    "chroma": {"max_sequence_length": T5_LENGTH},
    "wan": {"max_sequence_length": T5_LENGTH, "num_frames": 1},
    "z-image": {"max_sequence_length": T5_LENGTH, "guidance_scale": 0.0},
    "qwen-image": {},
    "hunyuan-image": {},
    "klein": {"max_sequence_length": T5_LENGTH},
    "flux-2": {"max_sequence_length": SYSTEM_LENGTH},
    "sana": {"max_sequence_length": T5_LENGTH, "use_resolution_binning": False},
    "lumina-2": {},
    "cogview-4": {"max_sequence_length": T5_LENGTH},
    "kandinsky-5": {},
    "hidream": {"max_sequence_length": T5_LENGTH},
    "auraflow": {"max_sequence_length": T5_LENGTH},
    "kolors": {"max_sequence_length": T5_LENGTH},
}


def erase(pipe, concepts=FORGET, **kwargs):
    return more_hf.erase_concept(
        pipe, concepts, **{"remap_to": TARGET, "retain": [RETAINED], "solver": "pinv", **kwargs}
    )


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def weights(pipe):
    return state(denoiser_of(pipe))


def images(pipe, family, prompt=None, **kwargs):
    generator, takes = torch.Generator().manual_seed(0), inspect.signature(pipe.__call__).parameters
    options = {
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
        "output_type": "np",
        **CALL[family],
    }
    options = {name: value for name, value in {**options, **kwargs}.items() if name in takes}
    if family == "kandinsky-5":
        pipe.resolutions = [(32, 32)]  # it draws no other sizes than those that it knows
    drawn = np.asarray(pipe(prompt=prompt, generator=generator, **options)[0])  # or a list, of layers
    return torch.from_numpy(drawn).double()


def spaces(pipe):
    """Space -> the factors."""
    erasure = more_hf.get_erasure(pipe)
    return {site.space: erasure.remap_of(name) for name, site in erasure.sites.items()}
