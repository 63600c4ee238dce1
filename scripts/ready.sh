#!/usr/bin/env bash
# What `make` runs before anything that needs the environment: `setup.sh`, if something of what it makes is missing or
# older than the files that it is made from. Looks at files only, so it costs nothing where all is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAMP=.venv/.setup-stamp
MODELS=(models/SmolLM2-135M-Instruct models/all-MiniLM-L6-v2)

missing() { # prints what is missing, if anything
    if [[ ! -x .venv/bin/grm ]]; then
        echo "no .venv here"
    elif [[ ! -f $STAMP ]]; then
        echo "the setup of .venv did not finish"
    else
        for model in "${MODELS[@]}"; do
            [[ -f $model/SOURCE.json ]] || echo "no $model here"
        done | head -n 1
    fi
}

outdated() { # prints what .venv is older than, if anything
    for file in requirements/cpu.txt pyproject.toml; do
        [[ $file -nt $STAMP ]] && echo "$file is newer than .venv"
    done | head -n 1
}

why=$(missing)
if [[ -n $why ]]; then
    echo "$why: running make setup first (a few minutes)"
    exec bash scripts/setup.sh
fi
why=$(outdated) || true
if [[ -n $why && -L .venv ]]; then
    echo "$why, a link to the environment of another checkout: not updated here"
elif [[ -n $why ]]; then
    echo "$why: running make setup first (seconds, or minutes if packages changed)"
    exec bash scripts/setup.sh
fi
