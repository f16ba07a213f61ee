"""Erase from every pipeline that diffusers' own tests build, and say what was accepted, refused or broke.

    pip install parameterized                          # which those tests import
    python benchmarks/proof/pipelines.py FOLDER        # pipelines.csv; about ten minutes on a CPU

FOLDER is a checkout of diffusers at the installed version. Its test classes build each pipeline from tiny
components (`get_dummy_components`). Tokenizers and encoders that they would fetch from the Hub are replaced
by ones of the same classes made here. Each accepted edit is restored and compared with the original bit for
bit. Ends with status 1 if anything but a refusal was raised.
"""

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas
import torch
from diffusers import DiffusionPipeline
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    T5Config,
)

from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from support import language_models as lm  # noqa: E402
from support.compare import state  # noqa: E402
from support.families import t5_tokenizer  # noqa: E402
from support.pipelines import tiny_tokenizer  # noqa: E402

import more_hf  # noqa: E402


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
EVERYDAY = ("a dog and a tree", "a house by picasso", "a car")  # few, since T5's prompts have 512 positions
# a word in the name of a repository -> what is made in its place
TOKENIZERS = {
    "clip": tiny_tokenizer,
    "t5": t5_tokenizer,
    "qwen": lm.qwen_tokenizer,
    "gemma": lm.gemma_tokenizer,
    "chatglm": lm.chat_glm_tokenizer,
    "llama": lm.llama_tokenizer,
    "glm-4": lm.glm_tokenizer,
}
PROCESSORS = {"qwen": lm.qwen_processor}


def made_for(table: dict[str, Any], repository: str) -> Any:
    """What stands in for a repository. Raises `LookupError` for one that is not known here."""
    for word, make in table.items():
        if word in repository.lower():
            return make()
    raise LookupError(f"nothing is made here in place of {repository}")


def tokenizer_of(cls: type, repository: str, *args: Any, **kwargs: Any) -> Any:
    return made_for(TOKENIZERS, str(repository))


def processor_of(cls: type, repository: str, *args: Any, **kwargs: Any) -> Any:
    return made_for(PROCESSORS, str(repository))


def config_of(cls: type, repository: str, *args: Any, **kwargs: Any) -> Any:
    return made_for({"t5": lambda: T5Config(**T5, feed_forward_proj="gated-gelu")}, str(repository))


def model_of(cls: type, repository: str, *args: Any, **kwargs: Any) -> Any:
    return cls(cls.config_class(**T5)) if "t5" in str(repository) else made_for({}, str(repository))


@contextmanager
def without_the_hub() -> Iterator[None]:
    """Inside the block, what the tests would fetch is made instead."""
    with ExitStack() as stack:
        for cls, make in (
            (AutoTokenizer, tokenizer_of),
            (PreTrainedTokenizerBase, tokenizer_of),
            (AutoProcessor, processor_of),
            (ProcessorMixin, processor_of),
            (AutoConfig, config_of),
            (PreTrainedModel, model_of),
        ):
            stack.enter_context(patch.object(cls, "from_pretrained", classmethod(make)))
        yield


def fit_vocabularies(pipe: DiffusionPipeline) -> None:
    """Give every text encoder as many embeddings as its tokenizer has tokens."""
    for name, encoder in pipe.components.items():
        tokenizer = pipe.components.get(name.replace("text_encoder", "tokenizer"))
        if isinstance(encoder, PreTrainedModel) and isinstance(tokenizer, PreTrainedTokenizerBase):
            if encoder.get_input_embeddings().num_embeddings < len(tokenizer):
                encoder.resize_token_embeddings(len(tokenizer))


def test_classes(folder: Path) -> Iterator[tuple[str, type]]:
    """Every test class of diffusers' pipelines that builds one, with its file."""
    sys.path.insert(0, str(folder))
    seen = set()
    for path in sorted((folder / "tests" / "pipelines").rglob("test_*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        if "get_dummy_components" not in path.read_text("utf-8"):
            continue
        try:
            module = importlib.import_module(name)
        except Exception as error:  # an optional package of that test
            print(f"{name}: not imported ({type(error).__name__}: {error})", file=sys.stderr)
            continue
        for cls in vars(module).values():
            if not isinstance(cls, type) or cls.__module__ != name:
                continue
            if not hasattr(cls, "get_dummy_components"):
                continue
            # classes that test one thing more of the same pipeline share its components
            built = cls.get_dummy_components, getattr(cls, "pipeline_class", None)
            if isinstance(built[1], type) and built not in seen:
                seen.add(built)
                yield path.name, cls


def unchanged(pipe: DiffusionPipeline, before: dict[str, torch.Tensor]) -> bool:
    """Whether every tensor is what it was; some of these pipelines have weights that are not numbers."""
    now = state(pipe)
    return all(torch.equal(now[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def cast(pipe: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline in a precision, as `from_pretrained` casts it: some modules stay in float32."""
    pipe.to(dtype)
    for part in pipe.components.values():
        kept = getattr(part, "_keep_in_fp32_modules", None) or ()
        for name, module in part.named_modules() if kept else ():
            if name.split(".")[-1] in kept:
                module.float()
    return pipe


def outcome_of(pipe: DiffusionPipeline) -> tuple[str, str]:
    """`accepted`, `refused` or `raised`, and in which words."""
    before = state(pipe)
    try:
        more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet", everyday=EVERYDAY)
        proof = more_hf.get_erasure(pipe).proof
        more_hf.restore(pipe)
        assert unchanged(pipe, before), "restore is not the original"
        return "accepted", f"{proof['layer_error']:.2f} of 4 roundings, {proof['layer_changed']:.0f} if old"
    except more_hf.MoreError as error:
        assert unchanged(pipe, before), "refused, but changed"
        return "refused", str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "raised", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def line_of(file: str, cls: type) -> dict[str, str]:
    """What comes of one test class's pipeline, in each precision."""
    line = {"file": file, "test": cls.__name__, "pipeline": cls.pipeline_class.__name__}
    try:
        torch.manual_seed(0)
        pipe = cls.pipeline_class(**cls().get_dummy_components())
        fit_vocabularies(pipe)
    except Exception as error:  # it needs a package or a repository that is not here
        return {**line, **dict.fromkeys(PRECISIONS, "not built"), "words": f"{type(error).__name__}: {error}"}
    pipe.set_progress_bar_config(disable=True)
    for precision, dtype in PRECISIONS.items():
        line[precision], line["words"] = outcome_of(cast(pipe, dtype))
    return line


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a checkout of diffusers")
    parser.add_argument("--only", default="", help="test classes whose name has this text (all)")
    parser.add_argument("--name", default="pipelines", help="of the file that is written (pipelines)")
    args = parser.parse_args()
    path = HERE / f"{args.name}.csv"
    lines = pandas.read_csv(path).to_dict("records") if path.exists() else []  # goes on where it stopped
    done = {(line["file"], line["test"]) for line in lines}
    with without_the_hub():
        for file, cls in test_classes(args.folder.resolve()):
            if args.only not in cls.__name__ or (file, cls.__name__) in done:
                continue
            line = line_of(file, cls)
            line["words"] = " ".join(line["words"].split())[:200]
            print(line, flush=True)
            lines.append(line)
            pandas.DataFrame(lines).to_csv(path, index=False)
    table = pandas.DataFrame(lines)
    print(table.groupby([*PRECISIONS]).size())
    return int((table[list(PRECISIONS)] == "raised").any().any())


if __name__ == "__main__":
    sys.exit(main())
