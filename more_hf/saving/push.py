"""Publish an erased model to the Hub: one folder with its record and model card, in one commit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import RevisionNotFoundError
from torch import nn

from .. import __version__
from ..core.errors import ExportError
from ..core.files import write_json, write_text
from ..core.record import RECORD, Record
from .card import HUB_ID, make_card
from .check import verify
from .contents import CARD, DELTA, MODEL_INDEX, PICTURES, folder_of_base, hashes, is_loadable, survey
from .files import reading, replace_folder, writing
from .folder import save


logger = logging.getLogger(__name__)

GRID = "before_after"
COMPARED = "compare.png"  # the picture that `more-hf erase --compare` draws


def push_to_hub(
    pipe_or_model: DiffusionPipeline | nn.Module | str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    include_delta: bool = False,
    card: bool = True,
    grid: str | os.PathLike | None = None,
    dry_run: str | os.PathLike | None = None,
) -> CommitInfo | Path:
    """
    Publish an erased pipeline or classifier with its record and a model card, in one commit. The model is not
    changed.

    The commit holds the files that `save` writes, the card, and the pictures that the card names; they are
    checked first, as by `verify`. The card carries over the original's license and tags, and says what the
    edit does and does not do; an existing card is kept, and only its section on the edit is rewritten.
    Publishing hides nothing: the weights reveal what was erased, and whoever has the original model has the
    concept.

    Args:
        pipe_or_model (`DiffusionPipeline`, `nn.Module`, `str` or `os.PathLike`):
            An erased pipeline, an erased classifier of Transformers, or a folder that `save` wrote.
        repo_id (`str`):
            `"name/repository"`, created if needed. A repository with other files that could be loaded as
            weights is refused, because they could be the original's.
        private (`bool`, *optional*):
            Whether a new repository is private; by default as the account's settings say.
        token (`str`, *optional*):
            The access token; by default the one from `hf auth login`.
        revision (`str`, *optional*):
            A branch, created if needed.
        include_delta (`bool`, *optional*, defaults to `False`):
            Also publish the thin factors, which `load` needs for a router and for a classifier's features.
            Whoever has them and the edited weights can compute the original weights, and so the concept.
        card (`bool`, *optional*, defaults to `True`):
            Write the model card; `False` leaves a `README.md` as it is.
        grid (`str` or `os.PathLike`, *optional*):
            A picture of before and after, for the card; by default a folder's own `compare.png`.
        dry_run (`str` or `os.PathLike`, *optional*):
            An empty or new folder. The commit's files are written there, and nothing is pushed.

    Returns:
        `CommitInfo` or `Path`: the commit, or the folder of a dry run.

    Raises:
        `ExportError`: nothing was erased, the files are not the erased model, or the folder or repository
        holds other weights; nothing is pushed then. Also whatever the client raises about the network.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> folder = more_hf.push_to_hub(pipe, "me/emoji-sd-without-blobmoji", dry_run="to_push")
    ```
    """
    if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
        raise ExportError(f"`repo_id` must be 'name/repository', got {repo_id!r}.")
    target = None if dry_run is None else Path(dry_run)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is not empty. Choose another folder for the dry run.")
    api = HfApi(token=token, library_name="more_hf", library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary:
        # 1. Collect the files, and check them against the record and the repository.
        folder = Path(temporary) / "model"
        record = _copy_checked(pipe_or_model, folder, include_delta)
        present, branch = ([], None) if target is not None else _present(api, repo_id, revision)
        _refuse_stale(repo_id, present, folder)
        # 2. Take out the paths of this machine, and add the picture and the card.
        base_card = _base_card(record, api) if card else None
        record = _public(record, folder)
        write_text(folder / RECORD, record.to_json())
        if grid is None and isinstance(pipe_or_model, str | os.PathLike):
            drawn = Path(pipe_or_model) / COMPARED
            grid = drawn if drawn.is_file() else None
        picture = None if grid is None else _copy_grid(Path(grid), folder)
        if card:
            existing = _existing_card(api, repo_id, branch, folder, in_repository=CARD in present)
            text = make_card(
                record, repo_id, base=base_card, existing=existing, picture=picture, with_delta=include_delta
            )
            write_text(folder / CARD, text)
        # 3. Push, or leave the files in the folder of the dry run.
        if target is not None:
            with writing(target):
                replace_folder(target, lambda draft: shutil.copytree(folder, draft))
            return target
        _warn_about_history(repo_id, present)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Upload the model without {', '.join(record.request.concepts)}",
            revision=revision,
        )


def _copy_checked(
    pipe_or_model: DiffusionPipeline | nn.Module | str | os.PathLike, folder: Path, include_delta: bool
) -> Record:
    """
    Write the publishable files of a model, or of a saved folder, to `folder`.

    Raises:
        `ExportError`: it is not the erased model, or its folder holds something else.
    """
    if not isinstance(pipe_or_model, str | os.PathLike):
        save(pipe_or_model, folder, include_delta=include_delta)  # checks what it writes
        return Record.read(folder)
    source = Path(pipe_or_model)
    record = Record.read(source)
    contents = survey(source, record)
    named = _named_by_card(source, contents.aside)
    links = [path for path in contents.saved + named if (source / path).is_symlink()]
    if others := contents.foreign + links:
        raise ExportError(
            f"{source} holds weights or links that are no part of the saved model: "
            f"{', '.join(map(str, others[:5]))}. They could be the original, or restore it (a LoRA of the "
            "erasure). Remove them, or replace links by files, then push."
        )
    # the picture goes up under another name
    if behind := [str(path) for path in contents.aside if path not in (*named, Path(COMPARED))]:
        logger.warning("Not pushed, because `save` did not write it: %s.", ", ".join(behind))
    if include_delta and Path(DELTA) not in contents.saved:
        raise ExportError(
            f"{source} has no {DELTA}. Save with include_delta=True first, or push without the factors."
        )
    with writing(folder):
        for path in contents.saved + named:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)
    verification = verify(folder)
    if not verification:
        raise ExportError(
            f"{source} does not hold the erased model that its {RECORD} describes ({verification.failures}). "
            "Nothing was pushed. Save the erased model again."
        )
    if not include_delta:
        (folder / DELTA).unlink(missing_ok=True)
    return record


def _named_by_card(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The card among these files, and the pictures that it names."""
    if Path(CARD) not in paths:
        return []
    with reading(folder / CARD):
        text = (folder / CARD).read_text("utf-8")
    pictures = [path for path in paths if path.suffix.lower() in PICTURES and path.as_posix() in text]
    return [Path(CARD), *pictures]


def _copy_grid(grid: Path, folder: Path) -> str:
    """Copy the picture of before and after into the folder, and return its name there."""
    if grid.suffix.lower() not in PICTURES or not grid.is_file():
        raise ExportError(f"`grid` must be a picture ({', '.join(PICTURES)}), got {grid}.")
    name = GRID + grid.suffix.lower()
    with writing(folder / name):
        shutil.copyfile(grid, folder / name)
    return name


def _present(api: HfApi, repo_id: str, revision: str | None) -> tuple[list[str], str | None]:
    """The files in the repository, and their branch; a new one starts as a copy of the main branch."""
    if not api.repo_exists(repo_id):
        return [], None
    try:
        return api.list_repo_files(repo_id, revision=revision), revision
    except RevisionNotFoundError:
        return api.list_repo_files(repo_id), None


def _refuse_stale(repo_id: str, present: Sequence[str], folder: Path) -> None:
    """Raises `ExportError` if the repository holds weights that this push does not replace."""
    stale = [name for name in present if is_loadable(Path(name)) and not (folder / name).is_file()]
    if stale:
        raise ExportError(
            f"{repo_id} holds weights that this push does not replace: {', '.join(stale[:5])}. They could be "
            "the original under another name. Push to a new repository, or delete them with "
            f"`HfApi().delete_files({repo_id!r}, {stale[:5]})` first; git history keeps old files."
        )


def _warn_about_history(repo_id: str, present: Sequence[str]) -> None:
    if RECORD not in present and any(is_loadable(Path(name)) for name in present):
        logger.warning(
            "%s already held weights, which this commit replaces, but git history keeps old files: an "
            "earlier revision still has them. A new repository has no history.",
            repo_id,
        )


def _existing_card(
    api: HfApi, repo_id: str, branch: str | None, folder: Path, *, in_repository: bool
) -> ModelCard | None:
    """The card to extend: the folder's, or else the repository's."""
    path = folder / CARD
    if not path.is_file():
        if not in_repository:
            return None
        path = Path(api.hf_hub_download(repo_id, CARD, revision=branch))
    with reading(path):
        return ModelCard.load(path)


def _base_card(record: Record, api: HfApi) -> ModelCard | None:
    """The original model's card, for its license and tags; a warning and `None` if it cannot be read."""
    base = record.facts.base
    local = folder_of_base(base)
    try:
        if base and local.is_dir():
            return ModelCard.load(local / CARD)
        if HUB_ID.fullmatch(base):
            return ModelCard.load(api.hf_hub_download(base, CARD, revision=record.facts.base_revision))
    except (OSError, ValueError) as error:
        logger.debug("No card of %s: %s", base, error)
    logger.warning(
        "The card of %s could not be read, so its license is not in this card. Add it by hand.",
        base or "the original model",
    )
    return None


def _public(record: Record, folder: Path) -> Record:
    """The record of the files that go up, without paths of this machine, as are the configurations."""
    files = [name for name in record.files if (folder / name).is_file()]  # the factors may stay here
    cleaned = hashes(folder, _clean_configs(folder))
    record = replace(record, files={name: cleaned.get(name, record.files[name]) for name in files})
    facts = record.facts
    if Path(facts.base).is_absolute() or Path(facts.base).is_dir():
        facts = replace(facts, base=Path(facts.base).name)
    return replace(record, facts=facts)


def _clean_configs(folder: Path) -> list[Path]:
    """Remove the local paths that components were loaded from, and return the files that had one."""
    cleaned = []
    for path in [*folder.rglob("config.json"), folder / MODEL_INDEX]:
        if not path.is_file():
            continue
        with reading(path):
            config = json.loads(path.read_text("utf-8"))
            if Path(config.get("_name_or_path") or "").is_absolute():
                del config["_name_or_path"]
                write_json(path, config)
                cleaned.append(path.relative_to(folder))
    return cleaned
