# Sourced by scripts/quickstart and scripts/test: finds a Python, makes .venv, installs this checkout into it.
# The caller's pip settings (PIP_* variables, pip.conf) are left as they are.

find_python() { # the first Python >= 3.11; PYTHON=... goes before all others
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.14 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

install_checkout() { # install_checkout "" | "[dev]": quick where the same thing is installed already
    local extra="$1" stamp=".venv/.installed$1" asked python
    if [ ! -x .venv/bin/python ]; then
        python="$(find_python)" || exit 1
        echo "Making .venv with $("$python" --version)" >&2
        "$python" -m venv .venv || {
            echo "That Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
            exit 1
        }
    fi
    asked="$(cat pyproject.toml constraints.txt | cksum) $(pwd)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$asked" ]; then
        return
    fi
    if ! command -v nvidia-smi >/dev/null 2>&1 && [ -z "${PIP_EXTRA_INDEX_URL:-}${PIP_INDEX_URL:-}" ]; then
        echo "No GPU here? PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu $0 fetches the much smaller CPU-only torch." >&2
    fi
    .venv/bin/python -m pip install --quiet -c constraints.txt -e ".$extra"
    echo "$asked" >"$stamp"
}
