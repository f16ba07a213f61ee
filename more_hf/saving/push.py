"""Out into the world: `push_to_hub`, a folder with its model card in one commit, and `save_checkpoint`, a single file."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import RevisionNotFoundError
from torch import nn

from .. import __version__
from ..core.errors import ExportError
from ..core.facts import Facts
from ..core.record import RECORD, Record
from ..data import FOLDER
from .card import HUB_ID, make_card
from .folder import save, verify
from .record import DELTA, WEIGHT_FILES


logger = logging.getLogger(__name__)

CARD = "README.md"


def push_to_hub(
    pipe_or_model: DiffusionPipeline | nn.Module | str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    include_delta: bool = False,
    card: bool = True,
    grid: str | os.PathLike | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    dry_run: str | os.PathLike | None = None,
    api: HfApi | None = None,
) -> CommitInfo | Path:
    """Publish an erased pipeline or classifier with its record and a model card, in one commit. The model is not changed.

    The very files that go up are checked first, as `verify` does. The card carries over the original's licence and tags, and says what
    the edit is and is not; a card that exists is kept, with a section of it written again. Publishing does not make a secret: the
    weights tell what was erased, and whoever has the original model has the concept.

    Args:
        pipe_or_model (`DiffusionPipeline`, `nn.Module`, `str` or `PathLike`): an erased pipeline, an erased classifier of Transformers,
            or a folder that `save` wrote.
        repo_id (`str`): `"name/repository"`, created if need be. One that holds other weight files is refused, since its users could
            load the original from them.
        private (`bool`, *optional*): of a repository that is created; by default what the account says.
        token (`str`, *optional*): by default the one of `hf auth login`.
        revision (`str`, *optional*): a branch, created if need be.
        commit_message (`str`, *optional*): by default it names what was erased.
        include_delta (`bool`, defaults to `False`): publish the thin factors, too, which `load` needs for a router and for a
            classifier's features. Whoever has them and the edited weights computes the original ones, and has the concept back.
        card (`bool`, defaults to `True`): write the model card; `False` leaves a `README.md` as it is.
        grid (`str` or `PathLike`, *optional*): a picture of before and after, for the card.
        rows (`Sequence[Mapping]`, *optional*): benchmark results, for the card and the record.
        dry_run (`str` or `PathLike`, *optional*): an empty or new folder to write to what would be pushed; then nothing is pushed.
        api (`HfApi`, *optional*): the client to use instead of one with `token`.

    Returns the `CommitInfo`, or the folder of a dry run.

    Raises `ExportError`, with nothing pushed, if nothing was erased, the files are not the erased model, or the folder or repository
    holds other weight files; and what the client raises.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
        >>> folder = more_hf.push_to_hub(pipe, "me/emoji-sd-without-blobmoji", dry_run="to_push")
    """
    api = api or HfApi(token=token, library_name="more_hf", library_version=__version__)
    with _saved(pipe_or_model, include_delta) as folder:
        record = _checked(folder)
        files = _files(folder, record, include_delta)
        present, branch = ([], None) if dry_run is not None else _present(api, repo_id, revision)
        if stale := sorted(name for name in present if name.endswith(WEIGHT_FILES) and name not in files):
            raise ExportError(
                f"{repo_id} holds weights that this push does not replace: {', '.join(stale[:5])}. They could be the original's under "
                f"another name. Push to a new repository, or delete them with `HfApi().delete_files({repo_id!r}, {stale[:5]})` first; "
                "git history keeps old files."
            )
        base, base_revision = record.facts.base, record.facts.base_revision
        record = replace(record, facts=_public(record.facts, rows))
        if grid is not None:
            files[f"before_after{Path(grid).suffix}"] = Path(grid)
        if card:
            existing = files.get(CARD) or (api.hf_hub_download(repo_id, CARD, revision=branch) if CARD in present else None)
            files[CARD] = make_card(
                record,
                repo_id,
                base=_base_card(base, base_revision, api),
                existing=existing and ModelCard.load(existing),
                grid=next((name for name in files if name.startswith("before_after.")), None),
                with_delta=include_delta,
            ).encode()
        files[RECORD] = record.to_json().encode()
        files |= {name: _json(config) for name, config in _configs(files) if Path(config.pop("_name_or_path")).is_absolute()}
        if dry_run is not None:
            return _write(files, Path(dry_run))
        if RECORD not in present and any(name.endswith(WEIGHT_FILES) for name in present):
            logger.warning(
                "%s already held weights, which this commit replaces, but git history keeps old files: whoever asks for an earlier "
                "revision gets them. A new repository has no history.",
                repo_id,
            )
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message or f"Upload the model without {', '.join(record.request.concepts)}",
            revision=revision,
        )


@contextmanager
def _saved(pipe_or_model, include_delta: bool) -> Iterator[Path]:
    """The folder that goes up: the one given, or the pipeline saved for the time of the push."""
    if isinstance(pipe_or_model, str | os.PathLike):
        yield Path(pipe_or_model)
    else:
        with tempfile.TemporaryDirectory() as name:
            yield save(pipe_or_model, Path(name) / "model", include_delta=include_delta)


def _checked(folder: Path) -> Record:
    """The record of a folder whose files are the erased model."""
    verification = verify(folder)
    if not verification.ok:
        failed = "; ".join(f"{check}: no ({finding})" for check, passed, finding in verification.checks if not passed)
        raise ExportError(f"{folder} does not hold the erased model that its {RECORD} describes ({failed}). Nothing was pushed.")
    return Record.read(folder)


def _files(folder: Path, record: Record, include_delta: bool) -> dict[str, Path | bytes]:
    """Name in the repository -> file. Weights go up only under the names that `save_pretrained` gives a component's."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in found.items() if not any(part.startswith(".") for part in Path(name).parts)}
    delta = files.pop(DELTA, None)
    if record.denoiser == ".":
        place = ""
    else:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        place = f"({'|'.join(name for name, value in index.items() if isinstance(value, list))})/"
    variant = rf"\.{re.escape(record.variant)}" if record.variant else ""
    own = rf"{place}(diffusion_pytorch_model|model)(\.safetensors\.index\.json|{variant}(-\d+-of-\d+)?\.safetensors)"
    if others := [name for name in files if name.endswith(WEIGHT_FILES) and not re.fullmatch(own, name)]:
        raise ExportError(
            f"{folder} holds weights that are no part of the saved pipeline: {', '.join(others[:5])}. They could be the original's, or "
            "give it back (a LoRA of the erasure). Remove them, then push."
        )
    if include_delta and delta is None:
        raise ExportError(f"{folder} has no {DELTA}. Save with include_delta=True first, or push without the factors.")
    return {**files, DELTA: delta} if include_delta else files


def _present(api: HfApi, repo_id: str, revision: str | None) -> tuple[list[str], str | None]:
    """What is in the repository, and the branch it was read from: a new branch starts as a copy of the main one."""
    if not api.repo_exists(repo_id):
        return [], None
    try:
        return api.list_repo_files(repo_id, revision=revision), revision
    except RevisionNotFoundError:
        return api.list_repo_files(repo_id), None


def _base_card(base: str, revision: str | None, api: HfApi) -> ModelCard | None:
    """The original model's card, for its licence and tags; a warning and `None` if it cannot be read."""
    local = FOLDER / "emoji_sd" if base == "emoji-sd" else Path(base)
    try:
        if base and local.is_dir():
            return ModelCard.load(local / CARD)
        if HUB_ID.fullmatch(base):
            return ModelCard.load(api.hf_hub_download(base, CARD, revision=revision))
    except OSError as error:
        logger.debug("No card of %s: %s", base, error)
    logger.warning("The card of %s could not be read, so its licence is not in this card. Add it by hand.", base or "the original model")
    return None


def _public(facts: Facts, rows: Sequence[Mapping[str, Any]] | None) -> Facts:
    """The record's facts without a path of this machine, and with the benchmark's results."""
    base = facts.base
    base = Path(base).name if Path(base).is_absolute() or Path(base).is_dir() else base
    return replace(facts, base=base, benchmark=[dict(row) for row in rows] if rows else facts.benchmark)


def _configs(files: Mapping[str, Path | bytes]) -> list[tuple[str, dict[str, Any]]]:
    """The components' configs that say where they were loaded from, which can be a path of this machine."""
    names = [name for name in files if Path(name).name in ("config.json", "model_index.json")]
    configs = [(name, json.loads(files[name].read_text("utf-8"))) for name in names]
    return [(name, config) for name, config in configs if config.get("_name_or_path")]


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _write(files: Mapping[str, Path | bytes], folder: Path) -> Path:
    """Beside its place first, so that a folder is there whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is not empty. Choose another folder for the dry run.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        draft = Path(name) / "draft"
        for relative, content in files.items():
            path = draft / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, path)
        if folder.exists():
            folder.rmdir()
        draft.replace(folder)
    return folder
