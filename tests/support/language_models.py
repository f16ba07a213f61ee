"""Tokenizers and language models of the newest families: real classes, random weights, few numbers wide."""

import inspect
import io
import string
import tempfile
from pathlib import Path

import torch
from diffusers import SanaPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from sentencepiece import SentencePieceTrainer
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3Model,
)

from support.pipelines import WORDS


LLM_WIDTH = 64
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# the words of the templates, each one token as in the real tokenizer
TEMPLATES = (
    "user system assistant Describe the image by detailing color shape size texture quantity text spatial "
    "relationships of objects and background"
)
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object attribution and actions without speculation."
)
FILM = (
    "You are a prompt engineer Describe the video in detail how camera moves or shakes describe zoom and "
    "view angle whether it follows objects location of main characters their action dynamism presented "
    "actions Name visual style is professional footage generated content some kind animation game scren "
    "effects postprocessing transitions if they Pay attention to order key shown scene"
)
HEADERS = "start end header id eot _header _id _id|> <| |> |><|"
SUPERIOR = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start>"
)
SANA = " ".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
INSTRUCT = (
    "{{ '<s>' }}{% for message in messages %}{% set name = 'INST' if message['role'] == 'user' else "
    "'SYSTEM_PROMPT' %}{{ '[' + name + ']' + message['content'][0]['text'] + '[/' + name + ']' }}{% endfor %}"
)
MARKS = "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG] [IMG_BREAK] [IMG_END]"


def spelled(word, merges):
    """The pieces of a word: of the pairs that stand side by side, the first of the merges is joined first."""
    pieces = list(word)
    while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in merges]:
        first = min(pairs, key=merges.get)
        i = next(i for i in range(len(pieces)) if tuple(pieces[i : i + 2]) == first)
        pieces[i : i + 2] = ["".join(first)]
    return pieces


def byte_level(words, space="Ġ"):
    """Every byte as a printable character, and merges that make each word, with a space before it or none."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = {("Ċ", "Ċ"): 0}  # two line breaks; a pair -> its place in the list
    for word in words:
        # behind all earlier merges, which so keep making their words
        while len(pieces := spelled(word, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
        merges[space, word] = len(merges)
    tokens += [left + right for left, right in merges]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, list(merges)


def qwen_tokenizer(more=""):
    """With `more` words of a template."""
    vocab, merges = byte_level(dict.fromkeys([*TEMPLATES.split(), *WORDS.split(), *more.split()]))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def mistral_processor():
    """Pads on the left, and begins with a token that its template writes."""
    words = [word.strip(".,") for word in SYSTEM.split()]
    vocab, merges = byte_level(dict.fromkeys([*words, *WORDS.split()]))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="left")
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": MARKS.split()})
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=INSTRUCT)


def gemma_tokenizer():
    """Begins with a token, writes a space as ▁ in front of its word, and pads on the right."""
    words = [*SUPERIOR.split(), *WORDS.split(), *SANA.split()]  # else each letter is a token, 1800 of them
    vocab, merges = byte_level(dict.fromkeys(words), space="▁")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *vocab]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, padding_side="right", add_bos_token=True)
    assert tokenizer("a cat").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def glm_tokenizer():
    """Begins with two tokens, and pads on the left."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    begin = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[gMASK]", "<sop>")]
    processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=begin)
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.padding_side = "left"
    return tokenizer


def llama_tokenizer():
    """Begins with a token, and pads on the right, with its last."""
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    backend = qwen_tokenizer().backend_tokenizer
    backend.add_special_tokens([begin, end])
    special = [(begin, backend.token_to_id(begin))]
    backend.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end, pad_token=end)


def qwen_processor(more=""):
    """A Qwen2.5-VL processor around the tokenizer; its pictures are not used here."""
    tokenizer = qwen_tokenizer(more)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]})
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())


def gemma(tokenizer, width=LLM_WIDTH, layers=3):
    long = sizes(tokenizer, width, layers) | {"max_position_embeddings": 4096}
    return Gemma2Model(Gemma2Config(**long, head_dim=16)).eval()


def glm(tokenizer, width=LLM_WIDTH, layers=3):
    return GlmModel(GlmConfig(**sizes(tokenizer, width, layers), head_dim=16)).eval()


def llama(tokenizer, width=LLM_WIDTH, layers=4):
    return LlamaForCausalLM(LlamaConfig(**sizes(tokenizer, width, layers), head_dim=16)).eval()


def sizes(tokenizer, width, layers=3):
    found = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers}
    found |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    return found | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}


def qwen3(tokenizer, width=LLM_WIDTH, layers=3):
    return Qwen3Model(Qwen3Config(**sizes(tokenizer, width, layers), head_dim=16)).eval()


def qwen_vl(tokenizer, width=LLM_WIDTH, layers=3):
    """Qwen2.5-VL, whose language model alone is used here."""
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = sizes(tokenizer, width, layers) | {"rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": width})
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def mistral(tokenizer, width=48, layers=31):
    text = {"model_type": "mistral", **sizes(tokenizer, width, layers), "head_dim": 16}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision)
    return Mistral3ForConditionalGeneration(config).eval()


def chat_glm_tokenizer():
    """Kolors': every printable character, and CLIP's words. It is saved by copying its file."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, string.ascii_letters, string.digits, string.punctuation] * 20),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        user_defined_symbols=[f"▁{word}" for word in WORDS.split()],
        minloglevel=2,
    )
    path = Path(tempfile.mkdtemp()) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(path))


def chat_glm(tokenizer, width=LLM_WIDTH):
    sizes = {"hidden_size": width, "ffn_hidden_size": 2 * width, "kv_channels": width // 4}
    sizes |= {"num_layers": 3, "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 64}
    switches = ("multi_query_attention", "add_qkv_bias", "rmsnorm", "original_rope", "post_layer_norm")
    sizes |= {"padded_vocab_size": tokenizer.tokenizer.n_words, **dict.fromkeys(switches, True)}
    config = ChatGLMConfig(**sizes)
    model = ChatGLMModel(config, empty_init=False)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # which the class leaves to the checkpoint
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model.eval()
