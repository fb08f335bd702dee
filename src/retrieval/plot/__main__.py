"""Run `src.retrieval.report.plot`: python -m src.retrieval.plot --help."""

from src.retrieval.report.plot import main
from src.utils.cli import run

if __name__ == "__main__":
    run(main)
