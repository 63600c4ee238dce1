#!/usr/bin/env bash
# Builds the site of the documentation in .site/; a link that leads nowhere is an error. mkdocs-material is in an
# environment of its own, .venv-docs, since nothing of what it needs is in the lock of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -x .venv-docs/bin/mkdocs ]]; then
    echo "new environment .venv-docs with the extra docs of pyproject.toml"
    .venv/bin/python -m venv .venv-docs
    mapfile -t packages < <(.venv/bin/python -c 'import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*extras["docs"], sep="\n")')
    .venv-docs/bin/python -m pip install --disable-pip-version-check -qq "${packages[@]}"
fi
# What the theme says of its successor at every build. Not --quiet: warnings that are not printed stop nothing.
export NO_MKDOCS_2_WARNING=1
.venv-docs/bin/mkdocs build --strict
echo "the site is in .site: open .site/index.html"
