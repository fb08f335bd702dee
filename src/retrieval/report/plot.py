"""What training logged, as a figure: of one run, or of several to compare.

python -m src.retrieval.plot data/outputs/my-retriever
python -m src.retrieval.plot data/outputs/first data/outputs/second --output both.png
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from src.retrieval.models.checkpoint_folders import is_whole, read_state, whole_checkpoints
from src.retrieval.ranking.metrics import by_cutoff
from src.utils.cli import run
from src.utils.errors import UserError
from src.utils.files import atomic_write, check_output

logger = logging.getLogger(__name__)

FIGURE = "training.png"
#: Parts of a sum that has a line of its own.
PARTS = ("contrastive", "distillation")
#: Panel → what it shows, by the names in the log. Metrics of evaluations get panels of their own.
PANELS = {
    "loss": ("loss", *PARTS),
    "similarity": ("positive_similarity", "hardest_negative_similarity"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
}
EVALUATION = "eval_"
WIDE = 3

#: Name in the log → (step, value) pairs.
Series = dict[str, list[tuple[int, float]]]


def panels_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """What is shown in which panel: losses and the like, and metrics such as ndcg with a line for each cutoff.

    Args:
        history: ``log_history`` of trainer_state.json; entries without a step, and values that are no numbers, are left
            out.
    """
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    found: dict[str, Series] = {panel: {} for panel in PANELS}
    for entry in history:
        if not isinstance(entry.get("step"), int):
            continue
        for name, value in entry.items():
            metric = name.removeprefix(EVALUATION)
            panel = metric.partition("@")[0] if name.startswith(EVALUATION) else panel_of.get(name)
            if panel is not None and isinstance(value, int | float):
                found.setdefault(panel, {}).setdefault(metric, []).append((entry["step"], value))
    # Files have the names in alphabetical order.
    order = list(panel_of)
    ordered = {
        panel: sorted(series, key=order.index if panel in PANELS else by_cutoff) for panel, series in found.items()
    }
    return {panel: {name: found[panel][name] for name in names} for panel, names in ordered.items() if names}


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str) -> None:
    """Draw a PNG with a panel for each kind of value.

    Args:
        runs: name of a run → its ``log_history``; with several, lines are named after their runs.
        path: file to write.

    Raises:
        UserError: matplotlib is not installed, or nothing was logged.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the figure needs matplotlib: pip install -e '.[eval]'") from error
    found = {name: panels_of(history) for name, history in runs.items()}
    panels = list(dict.fromkeys(panel for own in found.values() for panel in own))
    if not panels:
        raise UserError("nothing was logged: give --logging_steps below the number of steps")
    rows = -(-len(panels) // WIDE)
    # A "$" in a name is no mathematics.
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(5 * WIDE, 3.6 * rows), layout="constrained")
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, WIDE, number)
            for name, own in found.items():
                for label, points in own.get(panel, {}).items():
                    steps, values = zip(*points, strict=True)
                    style = "--" if label in PARTS else "-"
                    axes.plot(
                        steps, values, style, label=f"{name} {label}".strip(), marker="." if len(steps) < 30 else ""
                    )
            axes.set_title(panel)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png", dpi=110)


def read_history(folder: str) -> list[dict[str, Any]]:
    """The log of a run, given its output folder (the newest checkpoint's) or one checkpoint.

    Raises:
        UserError: there is no checkpoint, or its log is damaged.
    """
    checkpoints = [folder] if is_whole(folder) else whole_checkpoints(folder)
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoint: give the --output_dir of a training run, or a checkpoint")
    return read_state(checkpoints[-1])["log_history"]


def main(argv: Sequence[str] | None = None) -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="of training runs, or checkpoints in them")
    parser.add_argument("--output", help=f"file to write (default: {FIGURE} in the folder; needed for several)")
    args = parser.parse_args(argv)
    if args.output is None and len(args.folders) > 1:
        raise UserError("--output is needed: the file for the figure of several runs")
    names = [os.path.normpath(folder) for folder in args.folders] if len(args.folders) > 1 else [""]
    path = args.output or os.path.join(args.folders[0], FIGURE)
    check_output(path, "output")
    draw(dict(zip(names, map(read_history, args.folders), strict=True)), path)
    logger.info("figure: %s", path)


if __name__ == "__main__":
    run(main)
