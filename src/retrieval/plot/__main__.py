"""``python -m src.retrieval.plot``: see `src.retrieval.report.plot`."""

from src.retrieval.report.plot import main
from src.utils.cli import run

if __name__ == "__main__":
    run(main)
