"""Make the tokenizer and warm up the CLIPTextModel on recognising (thing, artist) in every wording, without
images.

    python train_text.py --data DATA --output TEXT --minutes 3

The denoiser then reads a frozen encoder whose outputs it can cache. Two linear classifiers are trained with
the encoder, on every position from which the name has been read in full: the name's own last token, all later
tokens, the end token and the padding. The classifiers are thrown away. TEXT/tokenizer and TEXT/text_encoder
are what counts.
"""

import copy
import json
import random

import torch
from dataset import THING_ONLY, Caption, EmojiData, draw_caption, load_dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from training import Trainer, add_arguments, generator, start
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from more_hf_bench.script import argument_parser


MAX_TOKENS = 40
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own splitting


def build_tokenizer(captions: list[str], vocab_size: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learned from the captions; every byte stays spellable."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    for token in [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]], model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder) -> None:
    """Also as vocab.json and merges.txt, which transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def build_text_encoder(tokenizer: CLIPTokenizer, smoke: bool) -> CLIPTextModel:
    width = 32 if smoke else 256
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=1 if smoke else 3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(b, 40) int64, padded as StableDiffusionPipeline pads."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


class Recogniser(torch.nn.Module):
    """The text encoder and the two linear classifiers on its last hidden state."""

    def __init__(self, encoder: CLIPTextModel, artists: int, things: int):
        super().__init__()
        self.encoder = encoder
        self.artist = torch.nn.Linear(encoder.config.hidden_size, artists)
        self.thing = torch.nn.Linear(encoder.config.hidden_size, things)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (b, 40) -> logits (b, 40, artists), (b, 40, things)."""
        hidden = self.encoder(ids)[0]
        return self.artist(hidden), self.thing(hidden)


def label_positions(
    tokenizer: CLIPTokenizer, captions: list[Caption], artists: list[int], things: list[int]
) -> torch.Tensor:
    """(2, b, 40) int64: the artist's and the thing's number at every position from which on the caption has
    said it in full; -100, which the loss skips, before that or where it does not say it."""

    def after(text: str, words: str) -> int:
        """The position of the last token of `words`."""
        end = text.index(words) + len(words)
        return len(tokenizer(text[:end]).input_ids) - 2  # without the end token

    labels = torch.full((2, len(captions), MAX_TOKENS), -100)
    for row, caption in enumerate(captions):
        if caption.artist is not None:
            labels[0, row, after(caption.text, caption.artist) :] = artists[row]
        if caption.thing is not None:
            labels[1, row, after(caption.text, caption.thing) :] = things[row]
    return labels


def sample_captions(data: EmojiData, names: list[str]) -> list[str]:
    """Captions for the tokenizer's merges: every artist's with every thing's, five times, and every other
    name twice, so that most of these words get tokens, too."""
    rng = random.Random(0)
    pairs = [(a, t) for a in range(len(data.artists)) for t in range(len(data.things))]
    drawn = [draw_caption(data, a, t, rng).text for a, t in pairs for _ in range(5)]
    others = [rng.choice(THING_ONLY).format(thing=name.replace("-", " ")) for name in names for _ in range(2)]
    return drawn + others


def main() -> None:
    parser = argument_parser(__doc__)
    add_arguments(parser, steps=500, batch_size=128, learning_rate=1e-3)
    parser.add_argument(
        "--vocab_size", type=int, default=3000, help="of the merges and letters, before byte completion"
    )
    args, accelerator = start(parser, smoke_steps=80, smoke_batch_size=16)
    vocab_size = 400 if args.smoke else args.vocab_size

    data = load_dataset(args.data)
    names = json.loads((args.data / "meta.json").read_text())["names"]
    captions = sample_captions(data, names)
    tokenizer = build_tokenizer(captions, vocab_size)
    save_tokenizer(tokenizer, args.output / "tokenizer")
    longest = max(map(len, tokenizer(captions).input_ids))
    print(f"{len(tokenizer)} tokens; the longest caption has {longest}", flush=True)

    recogniser = Recogniser(build_text_encoder(tokenizer, args.smoke), len(data.artists), len(data.things))
    # The words of held-out pairs stay unseen together.
    train = torch.nonzero(data.chosen & ~data.held_out).flatten()
    trainer = Trainer(
        args, accelerator, recogniser, copy.deepcopy(recogniser), ("artist_acc", "thing_acc"), 1e-2
    )
    while trainer.running():
        draw = generator(args.seed, trainer.step)
        picked = train[torch.randint(len(train), (args.batch_size,), generator=draw)]
        rng = random.Random(f"{args.seed} {trainer.step}")
        artists, things = data.artist[picked].tolist(), data.thing[picked].tolist()
        captions = [draw_caption(data, a, t, rng) for a, t in zip(artists, things, strict=True)]
        labels = label_positions(tokenizer, captions, artists, things).to(accelerator.device)
        ids = encode(tokenizer, [caption.text for caption in captions])
        with accelerator.autocast():
            logits = trainer.model(ids.to(accelerator.device))
        losses, accuracies = [], []
        for logit, label in zip(logits, labels, strict=False):
            losses.append(
                torch.nn.functional.cross_entropy(
                    logit.float().flatten(0, 1), label.flatten(), ignore_index=-100
                )
            )
            read = label >= 0
            accuracies.append(100 * (logit.argmax(-1)[read] == label[read]).float().mean().item())
        trainer.update(sum(losses), artist_acc=accuracies[0], thing_acc=accuracies[1])

    trainer.save()
    trainer.ema.encoder.save_pretrained(args.output / "text_encoder")


if __name__ == "__main__":
    main()
