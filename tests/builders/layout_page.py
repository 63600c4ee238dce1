"""docs/data.md: how published preference data is read, with a row of each layout and what it is read as.

python -m tests.builders.layout_page > docs/data.md
"""

from __future__ import annotations

import json
from typing import Any

from core.data.layouts.table import LAYOUTS, Layout, recognise
from core.data.sources import SourcePair, table_pairs
from core.data.tables import Malformed, Table
from tests.builders.processes import ROOT

CASES: list[dict[str, Any]] = [
    json.loads(line) for line in (ROOT / "tests" / "builders" / "layouts.jsonl").read_text("utf-8").splitlines()
]
"""Rows in published layouts: `layout` (name of the set), `rows`, and `expect`."""

HEADER = """# Data

What `preferences.sources`, `data.prompts`, `preferences.decontaminate` and the sets of `rm-eval` read. This page is
made by `python -m tests.builders.layout_page > docs/data.md`, which generates the last table by running the importer on
sample rows.

## Files, splits and subsets
A path is a `.jsonl`, `.json` (an array, or lines), `.csv` or `.parquet` file, text also as `.gz`, `.bz2` or `.xz`; a
folder of such files; or a folder of `save_to_disk`. A source may also be a hub id. In a folder, `datasets` decides
which files are of a split and a configuration, as it does on the hub: by `README.md`, by folders, by names of files.
`subset` names a configuration or a folder.

With `split: train`, which is the default, a folder without training files is an error, and so is a single file that is
named as another split (`test.jsonl`). Rows whose column `split` names another one are left out and counted. Files of no
split are listed in the metrics. `split: test` reads the test split in the same way. Evaluation sets are read whole.

In a `.csv` or `.parquet` file, two columns of one name are an error, since only one of them could be read.

Broken lines and rows that make no pair are counted by reason and listed in `rejected.jsonl` with file and row. What was
done to the others is in the stage's metrics: `changed` counts it, and `unread_columns` names the columns that nothing
was read from.

## Prompts and answers
- The system turn is part of the prompt: as a turn of the conversation, or from the columns `system` or `system_prompt`.
  A turn of a `developer` is a system turn, and an empty one is left out. A row with two different system texts is
  refused.
- Earlier turns are part of the prompt, also from the column `history` (pairs of texts, or messages).
- `instruction` and `input` are one prompt with a line feed between them.
- Messages have `role` and `content`, or `from` and `value`. Text parts of a `content` are put together.
- `tools`, `functions`, `tool_calls`, `images`, `videos`, `audios` and `reasoning_content` with anything in them refuse
  the row under their name, as do turns without text and parts that are no text.
- Two conversations have to agree in all but the last turn.
- A prompt that stands again at the beginning of both answers is left out of them, counted. Of prompts with fewer than
  three words this is done only where half of the file's rows are like that: answers to "Hello!" begin with "Hello!".
- Text never becomes a control token. Markers divide a text into turns in these places only. Any other marker, such as
  one inside an answer, stays in the text and is encoded as ordinary characters:
  - A prompt that begins with `Human:` is divided at "\\n\\nHuman:" and "\\n\\nAssistant:"; so are both answers, where
    they are whole dialogues. Answers to such a prompt lose an `Assistant:` at their beginning and the spaces and line
    feeds around them, so that they are the same as in whole dialogues. `<extra_id_1>User` and `<extra_id_1>Assistant`
    divide the prompts of HelpSteer2.
  - A text that is a whole rendering by ChatML (`<|im_start|>`), Llama 3 or Gemma becomes the messages it was made of.
    The answers to such a prompt lose the assistant's header and the end of turn; so do two answers that
    both have a header, whatever the prompt. Where the prompt is a rendering, an answer that begins with a header but is
    not one turn of the assistant refuses the row.
  - "TL;DR:" stays where it is, in prompts and in answers.
  - Prompts of benchmarks (RewardBench, PPE, RM-Bench) are one turn, whatever they contain.

`data.prompts` takes TRL's prompt-only form, `{"prompt": "text"}` or `{"prompt": [messages]}`, also `messages`, with the
same rules. More malformed rows than `data.max_rejected_share` are an error.
`data.metadata` names columns that are kept with each prompt for [rewards of your own](own-reward.md), such as the right
answer. A row without one of them is malformed.
`data.eval_prompts` names another file, read alike, whose prompts best-of-n and policies are measured on. Those that
repeat a prompt of `data.prompts`, exactly or with word trigrams that are 80% alike, are left out and listed in
`eval_rejected.jsonl`. The split `eval` of `data.prompts` is then not used, and still nothing is trained on it.
"""

LAYOUT_ROWS = """## Layouts
A file's layout is decided by its first row of a known layout; rows before it are malformed. Of several that fit, the
first in this table counts. Where `layout` names one, rows that do not fit it are malformed.

`stride` counts rows and not pairs: k keeps all pairs of every k-th row, ties not counted. Only the layouts with one
rated answer a row (`kto` and `ratings`) make a pair of two rows, and there it counts the pairs.
"""

ROWS = """## Rows as they are read
One row of each published set, or as many as make a pair. Column names and shapes are those of the sets.
"""


def page() -> str:
    lines = [HEADER, LAYOUT_ROWS,
             "| layout | sets | columns | read as |", "| --- | --- | --- | --- |"]  # fmt: skip
    lines += [_line(f"`{name}`", layout.sets, _told_by(layout), layout.read_as) for name, layout in LAYOUTS.items()]
    lines += ["", ROWS, "| set | layout | prompt | chosen | rejected | margin |",
              "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    lines += [_line(*_row(case)) for case in CASES]
    return "\n".join(lines) + "\n"


def read(case: dict[str, Any]) -> tuple[list[SourcePair], Malformed]:
    """The pairs of a case, ties included, and what was refused of it."""
    malformed = Malformed()
    return list(table_pairs(Table("case", "case", iter(enumerate(case["rows"], start=1))), malformed)), malformed


def _row(case: dict[str, Any]) -> list[str]:
    layout = recognise(case["rows"][0], case["layout"]).name
    pairs, malformed = read(case)
    if not pairs or pairs[0]["tie"]:
        why = "a tie" if pairs else ", ".join(malformed.counts)
        return [case["layout"], f"`{layout}`", f"refused: {why}", "", "", ""]
    pair, more = pairs[0], len(pairs) - 1
    turns = " ".join(f"{m['role']}: {_code(m['content'])}" for m in pair["prompt"])
    margin = "" if pair["margin"] is None else f"{pair['margin']:g}"
    rejected = _code(pair["rejected"]) + (f" and {more} more pairs" if more else "")
    return [case["layout"], f"`{layout}`", turns, _code(pair["chosen"]), rejected, margin]


def _told_by(layout: Layout) -> str:
    columns = [", ".join(f"`{name}`" for name in columns) for columns in layout.told_by]
    return " or ".join(columns) + (f" ({layout.condition})" if layout.condition else "")


def _code(text: str) -> str:
    return "`" + text.replace("\n", "\\n") + "`"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
