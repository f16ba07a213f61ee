"""Features of prompts in tiny pipelines, by calling their text encoder, and the layers that read them."""

import torch


# Of texts that hypothesis draws: with all of Unicode it would first sort that for seconds, in every process.
CHARACTERS = "aZ09 .,-_/\\:;{}[]()<>|#%'\"`\0\n\t\x7fé\u0301ßİﬁ\u00a0\u200d\u202e漢😀"


def text_layers(pipe, ends=("to_k", "to_v")):
    """Keys and values of the cross-attentions, in float64: `attn2` is what tiny UNets call them."""
    named = pipe.unet.named_parameters()
    return {n: w.detach().double().clone() for n, w in named if "attn2" in n and n.split(".")[-2] in ends}


def padded_ids(pipe, text):
    length = pipe.tokenizer.model_max_length
    return pipe.tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").input_ids


@torch.no_grad()
def encode(pipe, text):
    """What the text encoder returns."""
    return pipe.text_encoder(padded_ids(pipe, text))


def features(pipe, text):
    """`(1, tokens, d)`."""
    return encode(pipe, text)[0]


def tokens(pipe, prompt):
    """Features `(tokens, d)` of a prompt in float64, and how many positions are not padding."""
    return features(pipe, prompt)[0].double(), len(pipe.tokenizer(prompt).input_ids)


def last(pipe, prompt):
    """The feature of the last content token."""
    z, used = tokens(pipe, prompt)
    return z[used - 2]
