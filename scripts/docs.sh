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
# Of what a later version of MkDocs will be; nothing that a reader of this site could do.
export NO_MKDOCS_2_WARNING=1
.venv-docs/bin/mkdocs build --strict --quiet
echo "the site is in .site: open .site/index.html"
