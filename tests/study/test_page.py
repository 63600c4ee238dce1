"""The report of a study on planted pools: tables, figures, and the page in a real browser."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from bon.pools import Pools
from study import checks as check
from study import files
from study.analysis.conditions import Plan
from study.design import Arm, Condition
from study.other_tools import by_seed
from study.records import Series
from study.report import page as study_page
from study.results import results
from tests.builders.browser import dom, needs_browser
from tests.builders.planted import EVIL, PLAN, pools, series

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study():
    table = pools()
    runs = {"bt-seed0-kl0": Series(series(bend=0.45, P=40), "bt-seed0", Condition("bt"), 0.0)}
    conditions = by_seed(list(table.proxies))
    bt, grm = Condition("bt"), Condition("grm")
    assert list(conditions) == [bt, grm] and conditions[bt] == ["bt-seed0", "bt-seed1", "bt-seed2"]
    return results(table, conditions, runs, PLAN, {bt: bt, grm: bt}, rules=("mean", "min", "uwo:0.5"))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """A study of 8 conditions, more than there are colours: sizes of data and model, two KL coefficients, two golds."""
    rng, P, N = np.random.default_rng(0), 24, 32
    z = rng.normal(size=(P, N))
    gold = z - 0.5 * np.maximum(z - 1, 0) ** 2
    cells = [Condition(v, p, n) for v in ("bt", "grm") for p in (100, 300) for n in (6, 12)]
    conditions = {c: [Arm(c, seed).name for seed in range(2)] for c in cells}
    proxies = {
        name: z + (6 / c.layers) * (300 / c.pairs) ** 0.5 * rng.normal(size=(P, N))
        for c, names in conditions.items() for name in names
    }  # fmt: skip
    table = Pools(
        tuple(f"p{i:03d}" for i in range(P)), gold, proxies, length=rng.integers(5, 50, size=(P, N)).astype(float),
        second_gold=z - 0.6 * np.maximum(z - 1, 0) ** 2 + 0.2 * rng.normal(size=(P, N)),
    )  # fmt: skip
    one = conditions[cells[0]][0]
    runs = {f"policy {k:g}": Series(series(bend=b, P=24), one, cells[0], k) for k, b in ((0.0, 0.45), (0.1, 0.3))}
    base = {c: replace(c, variant="bt") for c in conditions}
    found = results(table, conditions, runs, PLAN, base, rules=("mean", "min"))
    out = tmp_path_factory.mktemp("matrix")
    files.write(out, found)
    study_page.write(out, "matrix", "What was asked?", found, [*check.golds_agree(found), check.aligned(found)])
    return found, out


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    files.write(out, study)
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
    figures = {"overoptimisation", "conditions", "gold_against_proxy", "gold_by_proxy", "win_rate", "length", "harm",
               "sweep", "disagreement", "prediction", "ensembles"}  # fmt: skip
    assert html.count("<svg") == len(figures) + 1 and EVIL not in html  # the main one twice, for screens of two widths
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html.replace("xmlns:xlink", ""))
    assert html.index("Checks that failed") < html.index("<svg")  # on the first screen
    assert (folder / "study.md").read_text().count("| bt |") == 3
    for kind in ("png", "svg"):
        assert {p.stem for p in (folder / "figures").glob(f"*.{kind}")} == figures
    for name in ("conditions", "rms", "members", "prediction", "sweep", "tail", "per_prompt", "kl"):
        assert len((folder / f"{name}.csv").read_text().splitlines()) > 1, name


def test_a_matrix_of_sizes_is_shown_by_size(matrix):
    """alpha and beta against data and model size, R* by cell, KL coefficients side by side: with their numbers."""
    found, out = matrix
    names = {p.stem for p in (out / "figures").glob("*.svg")}
    assert {"scaling", "heat_map", "frontier"} <= names
    scaling = (out / "figures" / "scaling.svg").read_text()
    for said in ("training pairs", "layers of the reward model", "grm, 12 layers", "bt, 300 pairs"):
        assert said in scaling
    main = (out / "figures" / "overoptimisation.svg").read_text()
    assert all(f"{p} pairs, {n} layers" in main for p in (100, 300) for n in (6, 12))  # a panel a cell of the matrix
    assert main.count(">grm<") == 1  # and a variant once in its legend
    table = {r["rm"]: r for r in csv.DictReader((out / "conditions.csv").open())}
    cell = table["grm-300pairs-12layers"]
    assert (cell["variant"], cell["pairs"], cell["layers"]) == ("grm", "300", "12")
    fit = found.findings["grm-300pairs-12layers"]["fit"]
    assert float(cell["alpha_lo"]) == pytest.approx(fit.alpha.lo) and float(cell["beta"]) == pytest.approx(
        fit.beta.mean
    )


def test_differences_are_corrected_for_their_number(matrix):
    found, _ = matrix
    compared = {n: f for n, f in found.findings.items() if f["difference"]}
    assert len(compared) == 4 + 8  # grm against bt in each cell, and each ensemble against its members
    assert all(f["difference_p_holm"] >= f["difference_p"] for f in compared.values())
    least = min(compared.values(), key=lambda f: f["difference_p"])
    assert least["difference_p_holm"] == pytest.approx(min(1, 12 * least["difference_p"]))


def test_a_study_too_small_for_fits_and_ensembles_has_a_page(tmp_path):
    """Pools of 4, one seed, no lengths: tables and figures without rows are left out or say so."""
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(12, 4))
    table = Pools(tuple(f"p{i}" for i in range(12)), gold, {"bt": gold + rng.normal(size=gold.shape)})
    plan = Plan(np.arange(1, 5), draws=100, ensembles=("mean",))
    found = results(table, {Condition("bt"): ["bt"]}, {}, plan, rules=("min", "length:0.1"))
    files.write(tmp_path, found)
    study_page.write(tmp_path, "tiny", "What was asked?", found, [check.aligned(found)])
    html = (tmp_path / "study.html").read_text()
    assert found.findings["bt"]["fit"] is None and "cannot conclude" in html and "None." in html.split("<h2>Fits")[1]
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} == {
        "overoptimisation", "conditions", "gold_against_proxy", "gold_by_proxy", "win_rate", "harm"
    }  # fmt: skip


def test_a_second_gold_has_its_own_verdicts(matrix):
    found, out = matrix
    rows = {r["rm"]: r for r in csv.DictReader((out / "golds.csv").open())}
    assert rows.keys() == found.findings.keys()
    assert float(rows["bt-100pairs-6layers"]["agreement"]) > 0.9
    assert "A second gold" in (out / "study.html").read_text()
    [same] = check.golds_agree(found)
    turned = [r | {"second_verdict": "over-optimised", "verdict": "cannot conclude"} for r in found.golds[:1]]
    other = replace(found, golds=turned)
    [differs] = check.golds_agree(other)
    assert not differs.ok and "cannot conclude, then over-optimised" in differs.detail and "correlate by" in same.detail
    assert check.golds_agree(replace(found, golds=[])) == []


@needs_browser
def test_the_sample_browser_filters_in_a_real_browser(folder, tmp_path):
    def samples(state):
        page = dom(f"{(folder / 'study.html').resolve().as_uri()}#{state}", tmp_path)
        return page.split('id="browser"')[1].split('id="samples"')[0]

    everything, some = samples("rm=grm&n=16&q="), samples("rm=grm&n=2&q=needle")
    assert everything.count('class="prompt"') == study_page.SHOWN and "by gold · proxy" in everything
    shown = some.count('class="prompt"')
    assert shown == some.count("question 7 ") and shown <= 1 and f"{shown} shown" in some
    assert "&lt;/script&gt;" in everything


@needs_browser
@pytest.mark.parametrize(("which", "width"), [("folder", 390), ("folder", 1280), ("matrix", 390)])
def test_the_page_fits_a_phone(which, width, tmp_path, request):
    """Nothing but the boxes that scroll by themselves is wider than the screen."""
    folder = request.getfixturevalue(which)
    folder = folder[1] if which == "matrix" else folder
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    copy = tmp_path / "page.html"
    copy.write_text((folder / "study.html").read_text().replace("</body>", probe))
    frame = tmp_path / "frame.html"  # headless windows have a least width; a frame has not
    frame.write_text(
        f"<iframe id=f width={width} height=900 src=page.html></iframe><script>f.onload = () => "
        "document.body.append(f.contentDocument.title)</script>"
    )
    options = ("--allow-file-access-from-files", "--virtual-time-budget=5000")
    found = dom(frame.as_uri(), tmp_path / "profile", *options)
    content, screen = map(int, re.search(r"(\d+) of (\d+)", found).groups())
    assert screen in range(width - 20, width + 1) and content <= screen
