"""Training examples, from files: rows opened, checked, filtered, and their keys drawn anew each epoch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from src.retrieval.data.columns import USUAL_NAMES, Columns
from src.retrieval.data.rows import TEACHER_SCORES, TRAIN_CHECK, check_train_row
from src.retrieval.data.sources import open_rows
from src.retrieval.data.tasks import (
    ANY,
    NO_TASK_CONFIG,
    OWN,
    Instruction,
    InstructionOf,
    TaskConfig,
    distinct_tasks,
    task_from_path,
    training_settings_for,
)
from src.retrieval.training.answers import Names, names_of
from src.retrieval.training.losses import LossConfig
from src.retrieval.training.select import SelectionPolicy, negatives_left, select_group, unusable
from src.utils import distributed
from src.utils.errors import UserError
from src.utils.flags import flags_of, refuse
from src.utils.jsonl import Rows

if TYPE_CHECKING:
    from src.retrieval.training.args import RetrievalTrainingArgs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceSettings:
    """Selection, filters and loss for the rows of one file."""

    selection: SelectionPolicy
    loss: LossConfig
    max_sample_num: int | None = None
    teacher_scores_margin: float | None = None
    teacher_scores_min: float | None = None

    @classmethod
    def from_args(
        cls,
        args: RetrievalTrainingArgs,
        version: str,
        task: str | None,
        task_config: Mapping[str, TaskConfig] = NO_TASK_CONFIG,
    ) -> SourceSettings:
        """Read the flags, with --use_train_config the settings of the rows' `task` over them.

        Raise a UserError where the version or task has no settings, or both loss weights are 0.
        """
        if args.use_train_config:
            args = copy.copy(args)
            vars(args).update(training_settings_for(version, task, task_config))
        if args.contrastive_weight == 0 and args.distill_weight == 0:
            raise UserError("--contrastive_weight and --distill_weight are both 0: nothing would be trained")
        several = f"--positives_per_query {args.positives_per_query}"
        refuse(
            {
                "--margin_mse and --stable_distill are two ways to distil: give one of them": (
                    args.margin_mse and args.stable_distill
                ),
                "--margin_mse needs --distill_weight above 0": (
                    args.margin_mse and args.distill_weight == 0 and not args.use_train_config
                ),
                f"{several} does not go with --margin_mse, which compares one positive with the negatives: leave one "
                "of them out": args.positives_per_query > 1 and args.margin_mse,
                f"{several} takes a row's pos, and --select_positive teacher the best of all candidates: give first, "
                "random or teacher-pos": args.positives_per_query > 1 and args.select_positive == "teacher",
            }
        )
        return cls(
            selection=SelectionPolicy(**flags_of(SelectionPolicy, args)),
            loss=LossConfig(**flags_of(LossConfig, args)),
            **flags_of(cls, args),
        )


@dataclass(frozen=True)
class Source:
    """One training file: the rows that pass its filters, and how they are trained.

    `kept` are the numbers of the rows in use, int64 ``(n,)``, of which `scored` have teacher scores in `score_field`;
    `dropped` counts the others by reason. Rows that name no task have `default_task`.
    """

    rows: Rows
    kept: np.ndarray
    default_task: str | None
    instruction_of: InstructionOf
    settings: SourceSettings
    score_field: str
    scored: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def tasks(self) -> list[str | None]:
        """The distinct tasks of the file."""
        return distinct_tasks(self.rows, self.default_task)


@dataclass(frozen=True)
class TrainExample:
    """One query of file number `source`, its keys, `positives` first, and their teacher scores if any.

    `names` say which keys answer which queries; None where all keys of other rows are negatives.
    """

    source: int
    query: str
    keys: list[str]
    scores: list[float] | None
    names: Names | None = None
    positives: int = 1


class TrainDataset(Dataset):
    """Training examples of several files, addressed by (epoch, index).

    Which negatives a row gets is a function of (seed, epoch, index) alone: not of process, worker or order of access.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources = list(sources)
        self.seed = seed
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def sizes(self) -> list[int]:
        """Rows per file."""
        return [len(source) for source in self.sources]

    def __getitem__(self, position: tuple[int, int]) -> TrainExample:
        epoch, index = position
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        row: Any = source.rows[int(source.kept[index - self._ends[number] + len(source)])]
        row = {**row, TEACHER_SCORES: row.get(source.score_field)}
        group = select_group(row, source.settings.selection, np.random.default_rng((self.seed, epoch, index)))
        instruction = source.instruction_of(row.get("task") or source.default_task)
        keys = [instruction.key + key for key in group.keys]
        query, loss = instruction.before(row) + row["query"], source.settings.loss
        names = None
        if loss.mask_same_text:
            names = names_of(row, group.places, group.positives, query, source.rows.path)
        return TrainExample(number, query, keys, group.scores, names, group.positives)


def _keep(rows: Rows, settings: SourceSettings, seed: tuple[int, int]) -> tuple[np.ndarray, dict[str, int]]:
    """Return the numbers of rows that pass the filters, and how many rows each filter dropped."""
    columns = rows.scan.columns
    reasons = unusable(columns["positives"], columns["negatives"], columns["best"], settings.selection)
    # NaN (no scores) compares as False: the filters leave rows without scores in.
    with np.errstate(invalid="ignore"):
        if settings.teacher_scores_margin is not None:
            reasons["teacher_scores_margin"] = columns["score_spread"] < settings.teacher_scores_margin
        if settings.teacher_scores_min is not None:
            reasons["teacher_scores_min"] = columns["score_max"] < settings.teacher_scores_min
    keep = np.ones(len(rows), dtype=bool)
    dropped = {}
    for reason, mask in reasons.items():
        if count := int((mask & keep).sum()):
            dropped[reason] = count
        keep &= ~mask
    kept = np.flatnonzero(keep)
    limit = settings.max_sample_num
    if limit is not None and len(kept) > limit:
        dropped["max_sample_num"] = len(kept) - limit
        kept = np.sort(np.random.default_rng(seed).choice(kept, limit, replace=False))
    return kept, dropped


def load_train_sources(
    files: Sequence[str],
    settings_of: Callable[[str | None], SourceSettings],
    instruction_of: InstructionOf,
    task: str | None,
    seed: int,
    cache_dir: str | None,
    score_field: str = TEACHER_SCORES,
    task_config: Collection[str] = (),
    columns: Columns = USUAL_NAMES,
    fits_groups: bool = False,
    mixes_files: bool = True,
) -> list[Source]:
    """Open, check and filter the training files; one named twice gives two sources.

    Args:
        settings_of: settings by task; asked once per file.
        instruction_of: instruction by task; asked for every task that occurs.
        task: of rows that name none, the ``--task`` flag.
        task_config: names of tasks besides the released ones.
        columns: see `Columns`.
        fits_groups: no flag says how many keys a group has, so it has no more than the rows fill.
        mixes_files: a batch holds rows of several files, whose groups must have the same size.

    Raises:
        UserError: rows with problems; rows of several tasks in one file that would be trained differently; a
            file with no usable row; nothing that could be trained in any file.
    """
    columns = replace(columns, score_field=score_field)
    opened: dict[str, Rows] = {}
    found: list[tuple[Rows, str | None, SourceSettings]] = []
    for path in files:
        if path not in opened:
            check = partial(check_train_row, score_field=score_field)
            check_name = f"{TRAIN_CHECK} {score_field}"
            opened[path] = distributed.on_main(partial(open_rows, path, check, check_name, cache_dir, columns, "train"))
        rows = opened[path]
        default = task or task_from_path(path, task_config)
        tasks = distinct_tasks(rows, default)
        for name in tasks:
            instruction_of(name)
        choices = {settings_of(name) for name in tasks}
        if len(choices) > 1:
            raise UserError(
                f"{path} mixes the tasks {', '.join(map(str, tasks))}, which --use_train_config trains differently: "
                "split it into one file per task"
            )
        found.append((rows, default, choices.pop()))
    if fits_groups:
        found = _fit_groups(found, mixes_files)
    for rows, _, settings in found:
        if 1 < (several := settings.selection.positives_per_query) >= settings.selection.train_group_size:
            raise UserError(
                f"{rows.path}: --positives_per_query {several} leaves no negative in groups of "
                f"{settings.selection.train_group_size} keys: mine some, or raise --train_group_size"
            )
    sources = []
    for number, (rows, default, settings) in enumerate(found):
        path = rows.path
        kept, dropped = _keep(rows, settings, (seed, number))
        summary = "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.items())
        logger.info("%s: %d of %d rows in use%s", path, len(kept), len(rows), f" ({summary})" if summary else "")
        if len(kept) == 0:
            raise UserError(f"{path}: no row can be trained on ({summary}){_way_on(dropped, mixes_files)}")
        scored = int((rows.scan.columns["best"][kept] >= 0).sum())
        sources.append(Source(rows, kept, default, instruction_of, settings, score_field, scored, dropped))
        _say_repeats(sources[-1])
    _check_something_trains(sources)
    return sources


def _left(rows: Rows, selection: SelectionPolicy) -> tuple[np.ndarray, np.ndarray]:
    """How many negatives each row has, and how many positives it gives at most (one where a negative wins)."""
    columns = rows.scan.columns
    left = negatives_left(columns["positives"], columns["negatives"], columns["best"], selection)
    return left, np.clip(columns["positives"], 1, selection.positives_per_query)


def _fit_groups(
    found: Sequence[tuple[Rows, str | None, SourceSettings]], mixes_files: bool
) -> list[tuple[Rows, str | None, SourceSettings]]:
    """Give groups no more keys than the most that a row of the file fills, with negatives; else one.

    With `mixes_files` all files together count as one.
    """
    most = []
    for rows, _, settings in found:
        left, taken = _left(rows, settings.selection)
        most.append(int(np.where(left > 0, left + taken, 1).max()))
    if mixes_files:
        most = [max(most)] * len(most)
    fitted = []
    for (rows, default, settings), size in zip(found, most, strict=True):
        selection = settings.selection
        if size < selection.train_group_size:
            what = f"no row fills more than {size} keys" if size > 1 else "rows have no negatives"
            how = f"{size} keys" if size > 1 else "the positive alone, compared with the other keys of the batch"
            logger.info("%s: %s, so a group is %s (--train_group_size %d)", rows.path, what, how, size)
            settings = replace(settings, selection=replace(selection, train_group_size=size))
        fitted.append((rows, default, settings))
    return fitted


def _way_on(dropped: Mapping[str, int], mixes_files: bool) -> str:
    """How rows without negatives can be trained on all the same, if that is what is missing."""
    if "no negative" not in dropped:
        return ""
    own = ", --inbatch_same_dataset epoch gives each file groups of its own size" if mixes_files else ""
    return f": --train_group_size 1 compares with the other keys of the batch alone{own}, and mining finds negatives"


def _say_repeats(source: Source) -> None:
    """Log how many keys of the groups are there a second time."""
    selection = source.settings.selection
    left, taken = (each[source.kept] for each in _left(source.rows, selection))
    wanted = selection.train_group_size - taken
    repeated = int(np.maximum(wanted - left, 0).sum())
    if repeated:
        logger.info(
            "%s: %d rows have fewer than %d negatives, which are repeated: %.0f%% of all keys, whose tokens and memory "
            "tell nothing new (--train_group_size %d repeats none)",
            source.rows.path,
            int((left < wanted).sum()),
            int(wanted.max()),
            100 * repeated / (len(left) * selection.train_group_size),
            int((left + taken).min()),
        )


def _check_something_trains(sources: Sequence[Source]) -> None:
    idle = []
    for source in sources:
        loss, path, unscored = source.settings.loss, source.rows.path, len(source) - source.scored
        if loss.contrastive_weight > 0 or loss.distill_weight == 0:
            continue
        if source.scored == 0:
            idle.append(path)
        if unscored:
            logger.info("%s: %d rows have no %s and train contrastively", path, unscored, source.score_field)
    if any(source.settings.loss.margin_mse for source in sources) and not any(source.scored for source in sources):
        raise UserError(
            f"--margin_mse: no row of {', '.join(sorted({source.rows.path for source in sources}))} has "
            f"{sources[0].score_field} to distil from: score them (run_ranker.py, run_lm_score.py)"
        )
    if len(idle) == len(sources):
        raise UserError(
            f"the contrastive weight is 0 and no row of {', '.join(sorted(set(idle)))} has {sources[0].score_field} to "
            "distil from: score them (run_lm_score.py), or give --contrastive_weight above 0"
        )


def used_instructions(sources: Sequence[Source]) -> dict[str, Instruction]:
    """Instructions of training, by task; by `ANY` where all tasks have the same."""
    by_task = {task or ANY: source.instruction_of(task) for source in sources for task in source.tasks}
    # Without --add_instruction there is none.
    used = {task: replace(each, template=each.template or OWN) for task, each in by_task.items()}
    return used if len(set(used.values())) > 1 else {ANY: next(iter(used.values()))}


def check_mixable(sources: Sequence[Source]) -> None:
    """Raise a UserError where a batch cannot hold rows of all `sources`, because they have different losses."""
    first = sources[0]
    for source in sources[1:]:
        if source.settings.loss != first.settings.loss:
            raise UserError(
                f"--use_train_config trains {first.rows.path} and {source.rows.path} with different losses, so a batch "
                "cannot mix them: add --inbatch_same_dataset epoch"
            )
