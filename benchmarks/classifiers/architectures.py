"""Erase a class from every classifier that transformers lists, and from one of each family of timm.

    python benchmarks/classifiers/architectures.py    # architectures.csv and .md; twenty minutes on a CPU

Each model is built from its own configuration class, small and with random weights, and fed noise in the
form that its processor gives. An edit that is accepted is saved, opened by plain transformers, verified and
undone. The outcome is `works`, `refused` with the reason, `not built` here, or `raised`; with the last the
script ends with status 1. A model that is in the CSV file is not tried again.
"""

import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from timm.models import list_modules
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.models.auto import modeling_auto

import more_hf
from more_hf.classification.heads import evaluating, run
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf_bench.columns import read_cells, write_rows
from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
CLASSES, TOKENS = 4, 10
KINDS = {"image": "IMAGE", "video": "VIDEO", "sound": "AUDIO", "text": "SEQUENCE"}
# what makes a configuration small, wherever it has the argument
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# of images and sounds the configurations stay as they are but for the depth
SHALLOW = {
    **dict.fromkeys(("num_hidden_layers", "num_layers"), 2),
    **{f"num_{kind}_layers": 1 for kind in ("spatial", "temporal", "auxiliary", "pooler")},
    **{"num_frames": 4, "frames_per_clip": 4, "crop_size": 64},
}
# attention in a low-rank latent
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 8),
}
MIXED = {"num_hidden_layers": 4}  # every fourth layer is one of attention
# what a configuration needs besides
OWN: dict[str, dict[str, Any]] = {
    "AXK1Config": LATENT,
    "AXK2Config": LATENT,
    "DeepseekV2Config": LATENT,
    "DeepseekV3Config": LATENT,
    "EsmcConfig": {"num_key_value_heads": 4},
    "GPTJConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "JambaConfig": {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "LayoutLMv3Config": {"visual_embed": False, "coordinate_size": 5, "shape_size": 6},
    "LiltConfig": {"hidden_size": 24, "channel_shrink_ratio": 4},
    "MiniCPM3Config": LATENT,
    "Mistral4Config": LATENT,
    "Qwen3NextConfig": MIXED,
    "Qwen3_5TextConfig": MIXED,
    "PerceiverConfig": {"num_cross_attention_heads": 1},
    "ReformerConfig": {"axial_pos_embds": False},
    "SqueezeBertConfig": {"embedding_size": 32},
    "T5Config": {"decoder_start_token_id": 0},
}


LARGEST, WIDEST = 150_000_000, 512  # parameters of a model of timm, and pixels, which come in no other size
TOO_LARGE = {
    "ShieldGemma2ForImageClassification": "four billion parameters; it answers by tokens, without a head",
    "UltraVBertForSequenceClassification": "a part that keeps its full size",
}


def small(config_class: type, sizes: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a configuration and its parts small."""
    default = config_class()
    known = set(default.to_dict())
    if "vocab_size" in sizes:  # of images, depth has other meanings under its other names
        known |= set(getattr(default, "attribute_map", {}))
    arguments = {name: size for name, size in sizes.items() if name in known}
    for part, inner in getattr(config_class, "sub_configs", {}).items():
        if hasattr(inner, "model_type"):
            arguments[part] = small(inner, sizes)
    return arguments | OWN.get(config_class.__name__, {})


def listed() -> Iterator[tuple[str, str, Callable[[], PreTrainedModel]]]:
    """Kind, name and builder of every class in transformers' own lists, and of one of each family of timm."""
    for kind, word in KINDS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{word}_CLASSIFICATION_MAPPING_NAMES").values()
        for name in names:
            for one in name if isinstance(name, tuple) else (name,):
                yield kind, one, partial(build, kind, getattr(transformers, one))
    for module in list_modules():
        if names := timm.list_models(module=module):
            name = min(names, key=looks_large)
            yield "timm", name, partial(build_timm, name)


def build(kind: str, cls: type[PreTrainedModel]) -> PreTrainedModel:
    if cls.__name__ in TOO_LARGE:
        raise MemoryError(TOO_LARGE[cls.__name__])
    sizes = SMALL if kind == "text" else SHALLOW
    config = cls.config_class(**small(cls.config_class, sizes))
    config.num_labels = CLASSES
    text = getattr(config, "text_config", None)
    if text is not None:
        text.num_labels = CLASSES
    return cls(config).eval()


def samples(kind: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """A sample of noise of each class, in the form that the model's processor gives."""
    draw, config = torch.Generator().manual_seed(0), model.config
    name = model.main_input_name

    def noise(*shape: int) -> Tensor:
        return torch.randn(CLASSES, *shape, generator=draw)

    if name in ("input_ids", "inputs") and kind == "text":
        ids = torch.randint(3, 100, (CLASSES, TOKENS), generator=draw)
        ids[:, -1] = 2  # some read the token that ends a text
        given = {name: ids, "attention_mask": torch.ones_like(ids)}
    elif name == "input_ids":  # pictures as tokens
        given = {name: torch.randint(0, 500, (CLASSES, 64), generator=draw)}
    elif kind == "video":
        frames = getattr(config, "num_frames", None) or config.frames_per_clip
        size = getattr(config, "crop_size", None) or config.image_size
        given = {name: noise(frames, 3, size, size)}
    elif kind == "sound" and name == "input_values":
        length = (config.max_length, config.num_mel_bins) if hasattr(config, "num_mel_bins") else (4000,)
        given = {name: noise(*length)}
    elif kind == "sound":
        bins = getattr(config, "num_mel_bins", None) or config.feature_projection_input_dim
        given = {name: noise(bins, 2 * getattr(config, "max_source_positions", 25))}
        if not hasattr(config, "num_mel_bins"):
            given = {name: noise(50, bins)}
    else:
        size = getattr(getattr(config, "vision_config", config), "image_size", 64)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        given = {name: noise(getattr(config, "num_channels", 3), height, width)}
    return {**given, "labels": torch.arange(CLASSES)}


def settle(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """
    Give BatchNorm the statistics of these inputs, and tiny scales of layers the value 1: as they begin,
    random weights die away.
    """
    for parameter in model.parameters():
        if parameter.ndim == 1 and 0 < parameter.abs().max() < 1e-3:
            nn.init.ones_(parameter)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(**inputs)
    model.eval()


def outcome_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[str, str]:
    """What comes of an erasure, and in which words."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with evaluating(model):
            original = run(model, inputs)
        more_hf.erase_classes(model, [batch], [1], remap_to=[2], most_lost=100)
        head = ", ".join(more_hf.get_erasure(model).request.head)
        with evaluating(model):
            edited = run(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            more_hf.save(model, folder)
            plain = type(model).from_pretrained(folder).eval()
            with evaluating(plain):
                opened = run(plain, inputs)
            if not (verified := more_hf.verify(folder)).ok:
                return "raised", f"verify: {verified}"
        more_hf.restore(model)
    except more_hf.MoreError as error:
        return "refused", f"{error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "raised", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    now = model.state_dict()
    if not all(torch.equal(now[name], value) for name, value in before.items()):
        return "raised", "`restore` is not the original"
    off = float((opened - edited).abs().max() / original.abs().max())
    moved = float((edited - original).abs().max() / original.abs().max())
    if off > 1e-3 or moved < 1e-3:
        return "raised", f"opened again it is off by {off:.1e}, and the edit moved the logits by {moved:.1e}"
    return "works", f"head `{head}`"


def in_a_line(words: str) -> str:
    return " ".join(words.split())[:300]


def line_of(kind: str, name: str, make: Callable[[], PreTrainedModel]) -> dict[str, str]:
    line = {"kind": kind, "model": name}
    try:
        torch.manual_seed(0)
        model = make()
        batch = samples(kind, model)
        settle(model, {name: value for name, value in batch.items() if name != "labels"})
    except Exception as error:
        return {**line, "outcome": "not built", "words": in_a_line(f"{type(error).__name__}: {error}")}
    outcome, words = outcome_of(model, batch)
    return {**line, "outcome": outcome, "words": in_a_line(words)}


def looks_large(name: str) -> tuple[bool, int]:
    """How timm's names sort: those that say that they are small come first, then shorter ones."""
    small = ("test_", "atto", "nano", "tiny", "_xxs", "_s0", "small")
    return not any(word in name for word in small), len(name)


def build_timm(name: str) -> TimmWrapperForImageClassification:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    pixels = timm.get_pretrained_cfg(name).input_size[-1]
    if size > LARGEST or pixels > WIDEST:
        raise MemoryError(f"{size / 1e6:.0f} million parameters, pictures of {pixels} pixels")
    config = TimmWrapperConfig(architecture=name, num_labels=CLASSES, do_pooling=True)
    model = TimmWrapperForImageClassification(config).eval()
    model.config.image_size = model.timm_model.pretrained_cfg["input_size"][-1]
    return model


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default="", help="models whose name holds this word")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS, "timm"])
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    file = args.output / "architectures.csv"
    lines = read_cells(file)
    done = {line["model"] for line in lines}
    for kind, name, make in listed():
        if kind in args.kinds and args.only in name and name not in done:
            done.add(name)
            lines.append(line_of(kind, name, make))
            print(*lines[-1].values(), file=sys.stderr, flush=True)
            write_rows(file, lines)
    counts = Counter((line["kind"], line["outcome"]) for line in lines)
    outcomes = ("works", "refused", "not built", "raised")
    table = [{"kind": kind, **{what: counts[kind, what] for what in outcomes}} for kind in args.kinds]
    write_text(args.output / "architectures.md", markdown_table(table) + "\n")
    print(markdown_table(table))
    return int(any(line["outcome"] == "raised" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
