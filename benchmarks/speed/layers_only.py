"""`more-hf lora` and `more-hf erase --layers_only` on a model that is larger than the memory.

    OMP_NUM_THREADS=1 python benchmarks/speed/layers_only.py    # layers_only.csv, layers_only.md

The folder has Qwen-Image's layout and widths, with 20 GB of transformer in shards: zeros, except for the
layer that reads text. The text encoder is tiny, so that what the edit itself needs can be told. Each line is
a process of its own: the most memory that it had, and its CPU seconds.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from more_hf.core.files import write_text
from more_hf.diffusion.prompts import packaged_prompts
from more_hf_bench.machine import hardware, versions
from more_hf_bench.script import argument_parser, write_table


HERE = Path(__file__).parent
DTYPE, BYTES = torch.bfloat16, 2
LAYERS, SHARD = 30, 4 * 10**9  # half of Qwen-Image's blocks; bytes of a shard
WIDTH, HEAD = 3584, 128  # of its text features, and of one attention head
READ = ("txt_in.", "txt_norm.")  # what is no zeros
LOAD = """
import sys, torch, more_hf.cli.lora, more_hf.saving.shards
from transformers import Qwen2_5_VLForConditionalGeneration as Model
Model.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
"""
COMMAND = """
import sys
from more_hf.cli.main import main
assert main(sys.argv[1:]) == 0
"""
# `ru_maxrss` would also count the parent, from before the process was replaced.
USED = """
import re, time
from pathlib import Path
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], time.process_time())
"""


def write_pipeline(folder: Path, layers: int = LAYERS, shard: int = SHARD, width: int = WIDTH) -> None:
    """Write the pipeline."""
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1]).to(DTYPE)
    QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(), vae, *text_parts(width), transformer=None
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["transformer"] = ["diffusers", "QwenImageTransformer2DModel"]
    write_text(folder / "model_index.json", json.dumps(index))
    transformer = {"num_layers": layers, "joint_attention_dim": width}
    write_transformer(folder / "transformer", transformer, shard)


def text_parts(width: int) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer]:
    """One layer of the real width; a tokenizer with the words of the template as tokens, as the real one."""
    prompts = packaged_prompts("everyday_prompts.txt")
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained.train_from_iterator([*prompts, *[template] * 100], vocab_size=8000, special_tokens=special)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_model(folder)
        tokenizer = Qwen2Tokenizer(vocab=f"{folder}/vocab.json", merges=f"{folder}/merges.txt")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
            "num_attention_heads": width // HEAD,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
        | {"out_hidden_size": width},
    )
    return Qwen2_5_VLForConditionalGeneration(config).to(DTYPE), tokenizer


def write_transformer(folder: Path, config: dict, shard: int) -> None:
    """Shards in safetensors' format whose zeros are holes, which take no place on the disk."""
    with init_empty_weights():
        model = QwenImageTransformer2DModel(**config)
    model.save_config(folder)
    shards: list[dict] = [{}]
    filled = total = 0
    for name, tensor in model.state_dict().items():
        size = BYTES * tensor.numel()
        if filled + size > shard:
            shards.append({})
            filled = 0
        shards[-1][name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [filled, filled + size]}
        filled, total = filled + size, total + size
    files = {}
    for i, header in enumerate(shards, 1):
        path = folder / f"diffusion_pytorch_model-{i:05}-of-{len(shards):05}.safetensors"
        files |= dict.fromkeys(header, path.name)
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            for name, entry in header.items():
                if name.startswith(READ):
                    values = torch.randn(entry["shape"], generator=torch.Generator().manual_seed(0)) / 60
                    file.seek(start + entry["data_offsets"][0])
                    file.write(values.to(DTYPE).view(torch.uint8).numpy().tobytes())
            file.truncate(start + max(entry["data_offsets"][1] for entry in header.values()))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    write_text(folder / "diffusion_pytorch_model.safetensors.index.json", json.dumps(index))


class Run(NamedTuple):
    """What a process took."""

    peak: float  # MiB
    seconds: float  # of the processor
    encoder: str  # whether the text encoder was loaded


def alone(code: str, *words: str, home: Path) -> Run:
    """Run a process with a cache of its own."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code + USED, *words]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    kilobytes, seconds = done.stdout.splitlines()[-1].split()
    was_loaded = code == LOAD or "Loading the text encoders" in done.stderr
    return Run(int(kilobytes) / 1024, float(seconds), "loaded" if was_loaded else "on the disk")


def measure(scratch: Path, **size: int) -> list[dict]:
    """One line per command."""
    folder, home = scratch / "qwen-image", scratch / "home"
    write_pipeline(folder, **size)

    def run(verb: str, concept: str, *more: str) -> Run:
        request = ["--concept", concept, "--remap_to", "Claude Monet", *more, "--device", "cpu"]
        words = [verb, str(folder), *request, "--layers_only", "--output", str(scratch / f"by_{verb}")]
        return alone(COMMAND, *words, home=home)

    loaded = alone(LOAD, str(folder / "text_encoder"), home=home)
    ahead = ("--also_encode", "Frida Kahlo")
    found = {
        "the text encoder alone": loaded,
        "lora, a name": run("lora", "Van Gogh"),
        "lora, a second, and a third in advance": run("lora", "Edvard Munch", *ahead),
        "lora, the third": run("lora", "Frida Kahlo"),
        "lora, the first, another strength": run("lora", "Van Gogh", "--strength", "0.8"),
        "erase, the first": run("erase", "Van Gogh"),
    }
    return [
        {
            "what": what,
            "text encoder": own.encoder,
            "MiB at most": round(own.peak),
            "beyond the text encoder": round(own.peak - loaded.peak),
            "CPU seconds": round(own.seconds, 1),
        }
        for what, own in found.items()
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--scratch", type=Path, help="where 20 GB are free (the temporary folder)")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().scratch) as scratch:
        lines = measure(Path(scratch))
    facts = f"{hardware(torch.device('cpu'))}; torch {versions()['torch']}"
    write_table(HERE / "layers_only", lines, below=facts)


if __name__ == "__main__":
    main()
