"""The prompts of preference pairs as a file for `data.prompts`: whole conversations up to the response, each once.

python scripts/prompts_of_pairs.py llm-blender/Unified-Feedback data/unified-prompts.jsonl --subset all --number 43000

Ties count, since prompts have no labels. What is kept is chosen by hash, so that it does not depend on the order of the
rows. Prompts of posts to summarise begin with what the GRM authors put before them, as in the pairs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config import PreferenceSource
from core.data.sources import read_pairs
from core.data.streams import unit_interval
from core.data.tables import Malformed
from core.errors import ArtefactError, DataError
from core.files import write_jsonl


def main() -> str | None:
    """Write the file; what went wrong, if something did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a file, a folder or a hub id, as preferences.sources.*.path")
    parser.add_argument("out", type=Path, help="the file, in JSON Lines")
    parser.add_argument("--subset", help="as preferences.sources.*.subset")
    parser.add_argument("--split", default="train", help="as preferences.sources.*.split (%(default)s)")
    parser.add_argument("--number", type=int, help="how many (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="another one keeps other prompts (%(default)s)")
    options = parser.parse_args()
    source, malformed = PreferenceSource(path=options.pairs, subset=options.subset, split=options.split), Malformed()
    try:
        found = {pair["prompt_id"]: pair["prompt"] for pair in read_pairs(source, malformed)}
    except (ArtefactError, DataError) as error:
        return f"prompts_of_pairs: {error}"
    if not found:
        return f"prompts_of_pairs: {options.pairs} has no pair: {'; '.join(malformed.lines()) or 'no rows'}"
    chosen = sorted(found, key=lambda identity: unit_interval(identity, salt=f"prompts/{options.seed}"))
    kept = chosen[: options.number]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(options.out, ({"prompt": found[identity]} for identity in kept))
    print(f"{len(kept)} of {len(found)} prompts -> {options.out}; rows left out: {malformed.counts.total()}")
    return None


if __name__ == "__main__":
    sys.exit(main())
