"""Records that a stranger may have changed."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from more_hf.core.record import RECORD
from more_hf.core.site import fingerprint
from more_hf.saving.contents import entries, hashes


def read_record(folder):
    return json.loads((folder / RECORD).read_text("utf-8"))


def write_record(folder, record):
    (folder / RECORD).write_text(json.dumps(record), "utf-8")


def list_files_again(folder):
    """Forge the hashes: the record lists the files as they are now."""
    files = hashes(folder, [path for path in entries(folder) if path != Path(RECORD)])
    write_record(folder, {**read_record(folder), "files": files})


def with_original(folder, original):
    """Put the original's weights into the folder, and let its record say so."""
    file = next((folder / "unet").glob("*.safetensors"))
    save_file({name: original[name].contiguous() for name in load_file(file)}, file, {"format": "pt"})
    list_files_again(folder)
    record = read_record(folder)
    record["edited"] = fingerprint({name: original[f"{name}.weight"] for name in record["sites"]})
    write_record(folder, record)
