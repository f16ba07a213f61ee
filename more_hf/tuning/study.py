"""`tune`: one word in, and a study of the edits that suit this model out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .. import __version__
from ..core.errors import IncompatibleBaseError, MoreError, PrototypeError
from ..core.files import replacing, write_json
from ..core.markdown import markdown_table
from ..core.registry import require_editable
from ..core.request import JUDGES, TRIED_REACHES, ConceptRequest, check_choice, read_count, read_names
from ..core.site import copy_weights, fingerprint
from ..diffusion.aliases import find_aliases
from ..diffusion.erase import erase, get_erasure
from ..diffusion.grid import draw_grid
from ..diffusion.sites import as_pipeline, find_denoiser, find_sites
from ..saving.files import writing
from .candidates import find_candidates, find_nameless, find_sentences, kind_of, looks_made_up
from .clip import Clip
from .judge import CHANCE, Estimate
from .search import (
    MOST,
    ROUNDS,
    STAY,
    STRENGTHS,
    Case,
    Edit,
    Figures,
    Judgment,
    Setup,
    Trial,
    Workshop,
    front,
    original_cases,
    says_not_drawn,
    search,
    spread_candidates,
)


logger = logging.getLogger(__name__)

HEAD, JUDGMENTS, ORIGINALS, SHEET = "study.json", "judgments.jsonl", "originals.safetensors", "sheet.webp"
FEWEST_PICTURES = 16
SENTENCES = 12  # around a name, at most; each is drawn at least twice
SHOWN = {"concept": 3, "retained": 1, "nameless": 1}  # columns of the sheet
SIDE = 256  # pixels of its pictures at most


@dataclass(frozen=True)
class Choice:
    """One edit to choose from, and what its pictures say."""

    label: str
    request: ConceptRequest
    ordinary_moved: float  # how far ordinary prompts move in the text encoder's features
    figures: Figures

    @property
    def call(self) -> str:
        """The call that makes it."""
        request = self.request
        ((concept, aliases),) = request.concepts.items()
        options = {"remap_to": list(request.targets), "retain": list(request.retain)}
        for name in ("tokens", "solver", "reach"):
            if getattr(request, name) != getattr(ConceptRequest, name):
                options[name] = getattr(request, name)
        words = ", ".join(f"{name}={value!r}" for name, value in options.items())
        named = {concept: list(aliases)} if aliases else concept
        return f"more_hf.erase_concept(pipe, {named!r}, {words})"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`, also after a round trip through JSON."""
        figures = {
            name: Estimate(**value) if isinstance(value, Mapping) else value
            for name, value in data["figures"].items()
        }
        request = ConceptRequest.from_dict(data["request"])
        return cls(**{**data, "request": request, "figures": Figures(**figures)})


@dataclass(frozen=True, eq=False)
class Study:
    """
    The edits that are left of a search, best first. Frozen.

    Args:
        setup (`Setup`):
            What was asked for, with the candidates and prompts that were used.
        model (`dict[str, str]`):
            `version` of more_hf, the pipeline's `name`, and the `fingerprint` of its layers that read text.
        judge (`dict[str, Estimate]`):
            On the original's pictures that it was not fitted on: the judge's `accuracy`, how many pictures of
            the concept are `found`, how many of other names are `mistaken` for it, and how many of its own
            show what else the sentence asks for (`kept`); if asked, how many of these CLIP finds (`clip`).
        chances (`dict[str, float]`):
            How likely a judge that knows nothing of the concept would tell it as well (`told`), and pictures
            of it and without a name would differ as much alike if they were drawn alike (`drawn`).
        choices (`tuple[Choice, ...]`):
            At most six edits; the first one is recommended.
        strengths (`dict[str, Estimate]`):
            How many of the concept's pictures are recognized at each strength of the first one: where the
            erasure begins to end for who loads it as a LoRA with a weight.
        judgments (`tuple[Judgment, ...]`):
            What became of every picture.
        sheet (`PIL.Image.Image`):
            The same prompts and noise by the original, by each edit, and by the original with the first
            edit's target.
    """

    setup: Setup
    model: dict[str, str]
    judge: dict[str, Estimate] = field(default_factory=dict)
    chances: dict[str, float] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()
    strengths: dict[str, Estimate] = field(default_factory=dict)
    judgments: tuple[Judgment, ...] = field(default=(), repr=False)
    sheet: Image.Image | None = field(default=None, repr=False)

    @property
    def reason(self) -> str:
        """Why the first choice is recommended."""
        best, figures = self.choices[0], self.choices[0].figures
        return (
            f"{best.label}: the judge takes {figures.recognized.percent} of its pictures for "
            f"{self.setup.concept}, {figures.kept.percent} show what else the prompt asks for (of the "
            f"original's: {self.judge['kept'].value:.0%}), and of all it has the largest distance by "
            f"which its pictures change ({figures.changed.value:.3f}) more than the others do "
            f"({figures.moved:.3f}), less both shares"
        )

    def erase(
        self, pipe: DiffusionPipeline, pick: int = 1, *, keep_originals: bool = True
    ) -> DiffusionPipeline:
        """
        Erase the concept in place by one of the choices, as `erase_concept` does, with its proof.

        Args:
            pipe (`DiffusionPipeline`):
                The pipeline that was studied, or the same one loaded again.
            pick (`int`, *optional*, defaults to 1):
                The number of the choice.
            keep_originals (`bool`, *optional*, defaults to `True`):
                As in `erase_concept`.

        Returns:
            `DiffusionPipeline`: the same pipeline.

        Raises:
            `IncompatibleBaseError`: this is another model. `MoreError`: there is no such choice. Also what
            `erase_concept` raises.
        """
        if not 1 <= pick <= len(self.choices):
            raise MoreError(f"There is no choice {pick}. Choose a number from 1 to {len(self.choices)}.")
        found = identify(as_pipeline(pipe))
        if found["fingerprint"] != self.model["fingerprint"]:
            raise IncompatibleBaseError(
                f"The study is of {self.model['name']!r}, and the weights of this pipeline "
                f"({found['name']!r}) are others, or in another precision. Load the model as it was studied, "
                "or run `tune` on this one."
            )
        pipe = erase(pipe, self.choices[pick - 1].request, keep_originals=keep_originals)
        # For the record and the card; a later refit of the pipeline is no longer the study's.
        erasure = get_erasure(pipe)
        chosen = [{**row, "chosen": "yes" if row["number"] == str(pick) else ""} for row in self.rows()]
        erasure.facts = replace(erasure.facts, study=chosen, judged=self.judged)
        return pipe

    def save(self, folder: str | Path) -> Path:
        """
        Write the study into a folder, which `load` reads; returns the folder.

        Raises:
            `ExportError`: it could not be written.
        """
        folder = Path(folder)
        head = {"setup": asdict(self.setup), "model": self.model, "judge": _as_dicts(self.judge)}
        head |= {"chances": self.chances, "choices": [asdict(choice) for choice in self.choices]}
        head |= {"strengths": _as_dicts(self.strengths), "table": self.to_markdown()}
        with writing(folder):
            with replacing(folder / JUDGMENTS) as draft:
                draft.write_text("".join(map(_line, self.judgments)), encoding="utf-8")
            if self.sheet is not None:
                with replacing(folder / SHEET) as draft:
                    self.sheet.save(draft, "WEBP", quality=90)
            write_json(folder / HEAD, head)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """
        Read what `save` wrote.

        Raises:
            `FileNotFoundError`: there is no study. `MoreError`: it has not ended, or is no study.
        """
        folder = Path(folder)
        head = _read_head(folder)
        if not head.get("choices"):
            raise MoreError(f"The study in {folder} has not ended. Run the same `tune` again to go on.")
        return cls(
            setup=_setup_from(head["setup"]),
            model=head["model"],
            judge={name: Estimate(**value) for name, value in head["judge"].items()},
            chances=head["chances"],
            choices=tuple(map(Choice.from_dict, head["choices"])),
            strengths={strength: Estimate(**value) for strength, value in head["strengths"].items()},
            judgments=tuple(_read_judgments(folder / JUDGMENTS)),
            sheet=Image.open(folder / SHEET) if (folder / SHEET).exists() else None,
        )

    def rows(self) -> list[dict[str, str]]:
        """The table of the choices, line by line."""
        rows = []
        for number, choice in enumerate(self.choices, 1):
            figures = choice.figures
            rows.append(
                {
                    "number": str(number),
                    "edit": choice.label,
                    "recognized": figures.recognized.percent,
                    **({"by CLIP": figures.clip.percent} if figures.clip else {}),
                    "kept": figures.kept.percent,
                    "changed": figures.changed.distance,
                    "moved, retained": figures.retained.distance,
                    "moved, nameless": figures.nameless.distance,
                    "pictures": str(figures.recognized.n),
                }
            )
        return rows

    def to_markdown(self) -> str:
        """The table of the choices."""
        return markdown_table(self.rows())

    @property
    def judged(self) -> str:
        """What the figures are, and how far their judge can be trusted."""
        judge, chances = self.judge, self.chances
        unknown = ""
        if chances["drawn"] >= CHANCE:
            unknown = f" {says_not_drawn(self.setup.concept, chances['drawn'])}"
        clip = f" CLIP, zero-shot, finds {judge['clip'].value:.0%}." if "clip" in judge else ""
        return (
            "Shares and LPIPS distances with 95 % intervals. The judge is fitted on the original's own "
            f"pictures; of those that it did not see it is right on {judge['accuracy'].value:.0%}, finds "
            f"{judge['found'].value:.0%} of {self.setup.concept}, and takes {judge['mistaken'].value:.0%} of "
            f"the others for it; one that knows nothing would do as well with probability "
            f"{chances['told']:.3f}.{clip}{unknown}"
        )

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __str__(self) -> str:
        at = {strength: estimate.percent for strength, estimate in self.strengths.items()}
        return (
            f"{self.to_markdown()}\n\n{self.judged}\n\nRecommended: 1, {self.reason}.\n"
            f"{self.choices[0].call}\n\n{markdown_table([{'strength of 1': 'recognized', **at}])}"
        )


def tune(
    pipe: DiffusionPipeline,
    concept: str,
    *,
    candidates: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
    sentences: Sequence[str] | None = None,
    reach: str = "name",
    judge: str = "own",
    pictures: int = 24,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    folder: str | Path | None = None,
) -> Study:
    """
    Find the erasure of a concept that suits a model: what to send it to, and how, judged by the model itself.

    The original draws the concept and other names; a judge is fitted on these pictures. Every candidate is
    then a closed form over the same prototypes, which takes no time to apply and to undo: few pictures of
    each, and more of those that stay. The pipeline is the original again afterwards.

    Args:
        pipe (`DiffusionPipeline`):
            A text-to-image pipeline from which nothing is erased.
        concept (`str`):
            What to forget.
        candidates (`Sequence[str]`, *optional*):
            Names that it may be sent to. By default other names of its kind from a list of the package.
        retain (`Sequence[str]`, *optional*):
            Names whose pictures should not change. By default the candidates.
        aliases (`Sequence[str]`, *optional*):
            Words to look for aliases in: those that `find_aliases` takes for the concept go with it.
        sentences (`Sequence[str]`, *optional*):
            Prompts with `{}` for a name, at least two. By default such as suit its kind.
        reach (`str`, *optional*, defaults to `"name"`):
            `"denoiser"` also tries, for the two best targets, edits inside the denoiser, which draw pictures
            of their own.
        judge (`str`, *optional*, defaults to `"own"`):
            `"clip"` puts CLIP's zero-shot answer beside that of the model's own judge, which still decides;
            by weights of open_clip, which are downloaded unless they are here.
        pictures (`int`, *optional*, defaults to 24):
            Of each name, for the judge, and of the concept, for each edit that stays to the end; at least 16.
        sampling (`Mapping[str, Any]`, *optional*):
            Arguments of the pipeline's call with which to draw, such as `{"num_inference_steps": 20}`.
        seed (`int`, *optional*, defaults to 0):
            Of the first picture's noise.
        batch_size (`int`, *optional*, defaults to 8):
            Pictures per call of the pipeline.
        folder (`str` or `Path`, *optional*):
            Where the study is kept while it grows. The same call continues it after an interruption.

    Returns:
        [`Study`]: at most six edits, best first.

    Raises:
        `PrototypeError`: a name or an option is wrong, or there are too few candidates.
        `SiteNotFoundError`: the pipeline cannot be edited or cannot draw. `MoreError`: something is erased
        from it, the judge cannot tell the concept from other names, or the folder has another study.
        `JudgeError`: there are no weights of CLIP. `ExportError`: the folder could not be written.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.load_emoji_sd()
        >>> drawn = {"num_inference_steps": 6, "guidance_scale": 4.0}
        >>> names = ["Fluent", "Streamline", "Noto"]
        >>> study = more_hf.tune(pipe, "High Contrast", candidates=names, pictures=16, sampling=drawn)
        >>> pipe = study.erase(pipe)
    """
    pipe = as_pipeline(pipe)
    if require_editable(find_denoiser(pipe).module) is not None:
        raise MoreError(
            f"Something is erased from this {type(pipe).__name__}, and a study starts from the original. "
            "Restore it first, or load the original."
        )
    setup = _setup(
        pipe, concept, candidates, retain, aliases, sentences, reach, judge, pictures, sampling, seed
    )
    clip = Clip.load() if judge == "clip" else None
    model = identify(pipe)
    with _Log(folder, setup, model) as log, _bar(pipe, setup, log) as bar:
        workshop = Workshop(
            pipe,
            setup,
            judged=log.judged,
            record=log.record,
            progress=bar.update,
            batch_size=read_count("batch_size", batch_size),
            clip=clip,
        )
        originals = log.read_originals() if log.has_originals else workshop.draw_originals()
        if not log.has_originals:
            log.keep_originals(originals)
        workshop.fit_judges(originals)
        trials = front(search(workshop))
        edit, figures = trials[0]
        own = workshop.names_judge.found(setup.concept)
        at = {strength: workshop.recognized_at(edit, strength) for strength in STRENGTHS}
        strengths = dict(sorted({0: own, 1: figures.recognized, **at}.items()))
        sheet = _sheet(workshop, trials)
    study = Study(
        setup=setup,
        model=model,
        judge={
            "accuracy": workshop.names_judge.accuracy,
            "found": workshop.names_judge.found(setup.concept),
            "mistaken": workshop.names_judge.mistaken(setup.concept),
            "kept": workshop.kept_before,
            **({"clip": workshop.clip_before} if clip else {}),
        },
        chances=workshop.chances,
        choices=tuple(
            Choice(edit.key, edit.request, edit.solution.ordinary_moved, figures) for edit, figures in trials
        ),
        strengths={f"{strength:g}": estimate for strength, estimate in strengths.items()},
        judgments=tuple(workshop.judged.values()),
        sheet=sheet,
    )
    if folder is not None:
        study.save(folder)
    return study


def identify(pipe: DiffusionPipeline) -> dict[str, str]:
    """What a study is of: the version of more_hf, the pipeline's name, and its weights that read text."""
    weights = copy_weights(find_sites(pipe, find_denoiser(pipe), pooled=True), "cpu")
    name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return {"version": __version__, "name": name, "fingerprint": fingerprint(weights)}


def _setup(
    pipe: DiffusionPipeline,
    concept: str,
    candidates: Sequence[str] | None,
    retain: Sequence[str] | None,
    aliases: Sequence[str],
    sentences: Sequence[str] | None,
    reach: str,
    judge: str,
    pictures: int,
    sampling: Mapping[str, Any] | None,
    seed: int,
) -> Setup:
    """Read the arguments of `tune`, and find what they leave open."""
    check_choice("reach", reach, TRIED_REACHES)
    check_choice("judge", judge, JUDGES)
    if read_count("pictures", pictures) < FEWEST_PICTURES:
        raise PrototypeError(f"`pictures` must be at least {FEWEST_PICTURES}, got {pictures}.")
    (concept,) = read_names("concept", concept)
    kind = kind_of(pipe, concept)
    if looks_made_up(pipe, concept):
        logger.warning(
            "The tokenizer keeps no word of %r whole, as with words that are rare or made up, and no list of "
            "the package has it. The model may draw something for it that nobody means: look at the sheet, "
            "and check the spelling.",
            concept,
        )
    names = find_candidates(pipe, concept, kind, candidates)
    found = _find_aliases(pipe, concept, aliases, names)
    setup = Setup(
        concept=concept,
        aliases=found,
        reach=reach,
        judge=judge,
        pictures=pictures,
        sampling=dict(sampling or {}),
        seed=seed,
        candidates=names,
    )
    if len(names) > MOST:
        names = spread_candidates(pipe, setup)
    kept = read_names("retain", retain) or names
    return replace(
        setup,
        candidates=names,
        retain=kept,
        sentences=find_sentences(pipe, kind, sentences, min(SENTENCES, pictures // 2)),
        nameless=find_nameless(pipe, [concept, *names, *kept], max(2, pictures // 6)),
    )


def _find_aliases(
    pipe: DiffusionPipeline, concept: str, words: Sequence[str], candidates: Sequence[str]
) -> tuple[str, ...]:
    """
    The words that read as the concept.

    Raises:
        `PrototypeError`: one of them is a candidate.
    """
    if not words:
        return ()
    others = [name for name in candidates if name not in words] or candidates
    found = tuple(find_aliases(pipe, concept, words, others=others))
    if both := [name for name in found if name in candidates]:
        raise PrototypeError(
            f"{both[0]!r} is in `candidates` and an alias of {concept!r}: the text encoder reads both alike. "
            "Remove it there."
        )
    return found


@contextmanager
def _bar(pipe: DiffusionPipeline, setup: Setup, log: _Log) -> Iterator[tqdm]:
    """A bar over the pictures, with the time left; it heeds the pipeline's settings for its own."""
    total, left, before = 0, len(setup.candidates), 0
    for part in ROUNDS:
        cases = len(setup.cases(setup.pictures // part))
        total += left * (cases - before)
        left, before = max(STAY, left // 3), cases
    total += len(STRENGTHS) * (setup.pictures // 2)
    config = {
        "desc": f"Tuning {setup.concept}",
        "unit": "picture",
        **getattr(pipe, "_progress_bar_config", {}),
    }
    originals = sum(map(len, original_cases(setup).values()))
    done = len(log.judged) + (originals if log.has_originals else 0)
    with tqdm(total=total + originals, initial=done, **config) as bar:
        yield bar


def _sheet(workshop: Workshop, trials: Sequence[Trial]) -> Image.Image:
    """
    The same prompts and noise by the original, by each edit, by parts of the first, and of the first edit's
    target.
    """
    setup, columns = workshop.setup, []
    for case in setup.cases(setup.pictures):
        if case.number < SHOWN[case.role]:
            columns.append(case)
    rows: dict[str, list[Image.Image | None]] = {
        "original": [_picture(workshop.originals[case.name][case.number]) for case in columns]
    }
    own = [case for case in columns if case.role == "concept"]

    def drawn(edit: Edit, cases: Sequence[Case]) -> list[Image.Image]:
        with workshop.edited(edit):
            return [_picture(one) for _, batch in workshop.draw(cases) for one in batch]

    for number, trial in enumerate(trials, 1):
        rows[f"{number}: {trial.edit.key}"] = drawn(trial.edit, columns)
    for strength in STRENGTHS:
        rows[f"1 at strength {strength:g}"] = drawn(workshop.at_strength(trials[0].edit, strength), own)
    (target,) = trials[0].edit.request.targets
    rows[target] = [_picture(workshop.originals[target][case.number]) for case in own]
    title = f"{setup.concept}: the edits to choose from"
    return draw_grid(rows, column_labels=[case.prompt for case in columns], scale=1, title=title)


def _picture(pixels: Any) -> Image.Image:
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = max(1, 128 // picture.width)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    picture.thumbnail((SIDE, SIDE))
    return picture


class _Log:
    """
    What a study has drawn and judged so far: in its folder, or in memory only without one.

    Raises:
        `MoreError`: the folder has a study of another model, concept, version or setting. `ExportError`: it
        could not be written.
    """

    def __init__(self, folder: str | Path | None, setup: Setup, model: dict[str, str]):
        self.folder = None if folder is None else Path(folder)
        self.judged: list[Judgment] = []
        if self.folder is None:
            return
        head = {"setup": json.loads(json.dumps(asdict(setup))), "model": model}
        if (self.folder / HEAD).exists():
            _refuse_other(self.folder, _read_head(self.folder), head)
            self.judged += _read_judgments(self.folder / JUDGMENTS)
        else:
            with writing(self.folder):
                write_json(self.folder / HEAD, {**head, "choices": []})

    def __enter__(self) -> Self:
        if self.folder is not None:
            path = self.folder / JUDGMENTS
            # A line that an interruption cut off goes before the next one comes.
            with writing(path), replacing(path) as draft:
                draft.write_text("".join(map(_line, self.judged)), encoding="utf-8")
            self.file = path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.file.close()

    def record(self, judgments: Sequence[Judgment]) -> None:
        """Write judgments to the disk."""
        if self.folder is not None:
            with writing(self.folder / JUDGMENTS):
                self.file.write("".join(map(_line, judgments)))
                self.file.flush()

    @property
    def has_originals(self) -> bool:
        """Whether the original's pictures were kept."""
        return self.folder is not None and (self.folder / ORIGINALS).exists()

    def read_originals(self) -> dict[str, Any]:
        """The original's pictures."""
        return load_file(self.folder / ORIGINALS)

    def keep_originals(self, originals: Mapping[str, Any]) -> None:
        """Write the original's pictures."""
        if self.folder is not None:
            with writing(self.folder), replacing(self.folder / ORIGINALS) as draft:
                save_file(dict(originals), draft)


def _refuse_other(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `MoreError` if a folder's study was asked for something else."""
    for part in ("model", "setup"):
        for name, value in wanted[part].items():
            if held[part].get(name) != value:
                raise MoreError(
                    f"{folder} holds a study with another {name}: {held[part].get(name)!r} there, {value!r} "
                    "here. Choose another folder, or delete it to start over."
                )


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / HEAD
    if not path.exists():
        raise FileNotFoundError(f"There is no study in {folder}: no {HEAD}.")
    try:
        head = json.loads(path.read_text("utf-8"))
        if {"setup", "model", "choices"} <= head.keys():
            return head
    except (json.JSONDecodeError, AttributeError):
        pass
    raise MoreError(f"{path} is no study of `more_hf.tune`. Choose another folder, or delete the file.")


def _read_judgments(path: Path) -> Iterator[Judgment]:
    """The judgments in a file, as far as its lines are whole."""
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            yield Judgment(**json.loads(line))
        except (json.JSONDecodeError, TypeError):  # an interruption cut it off
            return


def _setup_from(data: Mapping[str, Any]) -> Setup:
    return Setup(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def _line(judgment: Judgment) -> str:
    return json.dumps(asdict(judgment), ensure_ascii=False) + "\n"


def _as_dicts(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: asdict(estimate) for name, estimate in estimates.items()}
