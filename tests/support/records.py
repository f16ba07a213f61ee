"""Records that a stranger may have changed."""

import json
from pathlib import Path

from more_hf.core.record import RECORD
from more_hf.saving.contents import entries, hashes


def read_record(folder):
    return json.loads((folder / RECORD).read_text("utf-8"))


def write_record(folder, record):
    (folder / RECORD).write_text(json.dumps(record), "utf-8")


def list_files_again(folder):
    """Forge the hashes: the record lists the files as they are now."""
    files = hashes(folder, [path for path in entries(folder) if path != Path(RECORD)])
    write_record(folder, {**read_record(folder), "files": files})
