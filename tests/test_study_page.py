"""The report of a study on planted pools: tables, figures, and the page in a real browser."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from bon.analysis import Plan
from bon.pools import Pools
from pipelines import study_checks as check
from pipelines import study_page, study_results
from pipelines.study_results import Series, by_seed, results
from tests.test_analysis import series

EVIL = "</script><script>document.title='hacked'</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pools(P=40, N=32):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(P, N))
    names = [f"{m}-seed{s}" for m in ("bt", "grm") for s in range(3)]
    return Pools(
        tuple(f"p{i:03d}" for i in range(P)),
        z - 0.8 * np.maximum(z - 1, 0) ** 2 + 0.3 * rng.normal(size=(P, N)),
        {n: z + 0.4 * rng.normal(size=(P, N)) for n in names},
        length=rng.integers(5, 50, size=(P, N)).astype(float),
        logp=-rng.uniform(5, 40, size=(P, N)),
        prompts=tuple(f"question {i} {EVIL}" for i in range(P)),
        responses=tuple(
            tuple(f"answer {i}.{k} {'needle' if i == 7 else ''}{EVIL}" for k in range(N)) for i in range(P)
        ),
    )


PLAN = Plan(np.arange(1, 33), draws=200, ensembles=("mean",), temperatures=(0.5,))


@pytest.fixture(scope="module")
def study():
    table = pools()
    runs = {"bt-seed0-kl0": Series(series(bend=0.45, P=40), "bt-seed0")}
    conditions = by_seed(list(table.proxies))
    assert list(conditions) == ["bt", "grm"] and conditions["bt"] == ["bt-seed0", "bt-seed1", "bt-seed2"]
    return results(table, conditions, runs, PLAN, {"bt": "bt", "grm": "bt"})


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    study_results.write(out, study)
    checks = [*check.enough(study, {}, 0), check.aligned(study)]
    study_page.write(out, "planted", "What was asked?", study, checks, accuracy={"bt-seed0": 0.7}, seconds=[("rm", 90)])
    return out


def test_the_tables_hold_the_results(study, folder):
    rows = list(csv.DictReader((folder / "curves.csv").open()))
    gold = {r["rm"]: float(r["mean"]) for r in rows if r["metric"] == "gold" and r["x"] == "8" and r["method"] == "bon"}
    assert {"bt", "grm", "bt x 3, mean", "oracle", "longest", "random"} <= gold.keys() and gold["random"] == 0
    assert gold["oracle"] > gold["bt"] > gold["longest"]
    by_hand = np.mean([v for c in study.curves if (c.rm, c.metric) == ("bt", "gold") for v in c.values[..., 7].ravel()])
    assert gold["bt"] == pytest.approx(by_hand)
    assert all(float(r["band_lo"]) <= float(r["lo"]) + 1e-9 for r in rows if r["metric"] == "gold" and r["x"] == "4")
    facts = json.loads((folder / "conditions.json").read_text())
    assert facts["grm"]["difference"]["lo"] < facts["grm"]["difference"]["hi"] and facts["bt"]["difference"] is None
    assert json.loads((folder / "policies.json").read_text())["bt-seed0-kl0"]["verdict"]["kind"]
    table = {r["rm"]: r for r in csv.DictReader((folder / "conditions.csv").open())}
    assert float(table["grm"]["gold"]) == pytest.approx(facts["grm"]["gold"]["mean"]) and table["bt"]["verdict"]
    methods = {r["method"] for r in rows}
    assert methods == {"bon", "soft_bon", "ppo"}


def test_the_page_needs_no_network_and_escapes(folder):
    html = (folder / "study.html").read_text()
    assert html.count("<svg") == 7 and EVIL not in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html.replace("xmlns:xlink", ""))
    assert html.index("Checks that failed") < html.index("<h2>")  # on the first screen, before any section
    assert (folder / "study.md").read_text().count("| bt |") == 2
    assert len(list((folder / "figures").glob("*.png"))) == len(list((folder / "figures").glob("*.svg"))) == 7


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_sample_browser_filters_in_a_real_browser(folder, tmp_path):
    def dom(state):
        url = f"{(folder / 'study.html').resolve().as_uri()}#{state}"
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom", url],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout.split('id="browser"')[1].split('id="samples"')[0]

    everything, some = dom("rm=grm&n=16&q="), dom("rm=grm&n=2&q=needle")
    assert everything.count('class="prompt"') == study_page.SHOWN and "by gold · proxy" in everything
    shown = some.count('class="prompt"')
    assert shown == some.count("question 7 ") and shown <= 1 and f"{shown} shown" in some
    assert "&lt;/script&gt;" in everything


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone(folder, tmp_path, width):
    """Nothing but the boxes that scroll by themselves is wider than the screen."""
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    copy = tmp_path / "page.html"
    copy.write_text((folder / "study.html").read_text().replace("</body>", probe))
    frame = tmp_path / "frame.html"  # headless windows have a least width; a frame has not
    frame.write_text(
        f"<iframe id=f width={width} height=900 src=page.html></iframe><script>f.onload = () => "
        "document.body.append(f.contentDocument.title)</script>"
    )
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    content, screen = map(int, re.search(r"(\d+) of (\d+)", done.stdout).groups())
    assert screen in range(width - 20, width + 1) and content <= screen
