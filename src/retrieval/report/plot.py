"""Draw what training logged, of one run or of several to compare.

python -m src.retrieval.plot data/outputs/my-retriever
python -m src.retrieval.plot data/outputs/first data/outputs/second --output both.png
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.retrieval.models.checkpoint_folders import complete_checkpoints, is_complete, read_state
from src.retrieval.ranking.config import LABEL_METRICS, NQ_RECALL
from src.retrieval.ranking.eval_sets import MEAN
from src.retrieval.ranking.metrics import by_cutoff
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output, short_names
from src.utils.parser import Parser

logger = logging.getLogger(__name__)

FIGURE = "training.png"
#: Parts of the loss.
PARTS = ("contrastive", "distillation")
#: Panel → names in the log; each evaluation metric has a panel, too.
PANELS = {
    "loss": ("loss", *PARTS),
    "similarity": ("positive_similarity", "hardest_negative_similarity"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
}
EVALUATION = "eval_"
WIDE = 3
#: Transformers rounds the losses of its log.
ROUNDED = 1e-3

#: Name in the log → (step, value) pairs.
Series = dict[str, list[tuple[int, float]]]


def panels_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Sort the numbers of a ``log_history`` into panels: `PANELS`, and one for each metric with its cutoffs."""
    logged: Series = {}
    for entry in history:
        if isinstance(entry.get("step"), int):
            for name, value in entry.items():
                if isinstance(value, int | float):
                    logged.setdefault(name, []).append((entry["step"], value))
    for part in PARTS:
        if part in logged and _same(logged[part], logged.get("loss", [])):
            # The only part, with a weight of 1, is the loss.
            del logged[part]
    panels = {panel: {name: logged[name] for name in names if name in logged} for panel, names in PANELS.items()}
    names = sorted((name.removeprefix(EVALUATION) for name in logged if name.startswith(EVALUATION)), key=by_cutoff)
    several = any(name.startswith(f"{MEAN}_") for name in names)
    for name in names:
        panel, label = _split(name) if several else (name.partition("@")[0], name)
        panels.setdefault(panel, {})[label] = logged[EVALUATION + name]
    return {panel: series for panel, series in panels.items() if series}


def _split(name: str) -> tuple[str, str]:
    """``nq_ndcg@10`` → the metric ``ndcg@10`` and the set ``nq``."""
    kind, _, cutoff = name.partition("@")
    for known in (NQ_RECALL, *LABEL_METRICS):
        if kind.endswith(f"_{known}"):
            return f"{known}@{cutoff}", kind.removesuffix(f"_{known}")
    return name, name


def _same(one: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]]) -> bool:
    """Whether two series are the same but for the digits that a log rounds away."""
    steps, values = zip(*one, strict=True)
    others, other_values = zip(*other, strict=True) if other else ((), ())
    # Where an epoch's last batch is smaller, a mean over rows is not that over steps.
    return steps == others and float(np.median(np.abs(np.subtract(values, other_values)))) <= ROUNDED


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str) -> None:
    """Draw a PNG of runs, name → ``log_history``; a UserError without matplotlib or anything logged."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UserError("the figure needs matplotlib: pip install -e '.[eval]'") from error
    panels_by_run = {name: panels_of(history) for name, history in runs.items()}
    panels = list(dict.fromkeys(panel for panels in panels_by_run.values() for panel in panels))
    if not panels:
        raise UserError("nothing was logged: give --logging_steps below the number of steps")
    rows = -(-len(panels) // WIDE)
    # A "$" in a name is text.
    with rc_context({"text.parse_math": False}), atomic_write(path, "wb") as file:
        figure = Figure(figsize=(5 * WIDE, 3.6 * rows), layout="constrained")
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, WIDE, number, title=panel, xlabel="step")
            for name, series in panels_by_run.items():
                for label, points in series.get(panel, {}).items():
                    line, marker = "--" if label in PARTS else "-", "." if len(points) < 30 else ""
                    text = f"{name} {label}".strip()
                    axes.plot(*zip(*points, strict=True), linestyle=line, marker=marker, label=text)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.savefig(file, format="png", dpi=110)


def read_history(folder: str) -> list[dict[str, Any]]:
    """The ``log_history`` of a checkpoint, or of the newest in an output folder; a UserError if missing or damaged."""
    checkpoints = [folder] if is_complete(folder) else complete_checkpoints(folder)
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoint: give the --output_dir of a training run, or a checkpoint")
    return read_state(checkpoints[-1])["log_history"]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the logs of runs and draw them."""
    parser = Parser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="of training runs, or checkpoints in them")
    parser.add_argument("--output", help=f"file to write (default: {FIGURE} in the folder; needed for several)")
    args = parser.parse_args(argv)
    if args.output is None and len(args.folders) > 1:
        raise UserError("--output is needed: the file for the figure of several runs")
    paths = [os.path.abspath(folder) for folder in args.folders]
    names = list(map(short_names(paths).__getitem__, paths)) if len(paths) > 1 else [""]
    path = args.output or os.path.join(args.folders[0], FIGURE)
    if not path.endswith(".png"):
        raise UserError(f"--output {path}: the figure is a PNG, give a name that ends in .png")
    check_output(path, "output")
    draw(dict(zip(names, map(read_history, args.folders), strict=True)), path)
    logger.info("figure: %s", path)
