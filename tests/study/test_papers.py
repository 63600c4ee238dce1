"""Figures of the papers from a study's tables: what is drawn is what the tables hold, and what lacks is named."""

import csv
import json

import numpy as np
import pytest

from core.config.load import load
from core.errors import ArtefactError, ConfigError
from study import files
from study.analysis.conditions import Plan
from study.analysis.fits import predict
from study.design import Condition
from study.papers import coste, gao, grm, run
from study.papers.read import read
from tests.builders.studies.whole import study, two_methods

pytestmark = pytest.mark.slow

PLAN = Plan(np.arange(1, 33), draws=100, ensembles=("mean", "min"))


def written(folder, results, **about):
    results.about = about
    files.write(folder, results)
    return folder


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """BT and GRM of four sizes, two seeds, policies against all of them."""
    cells = [Condition(v, 300, n, 0.25) for v in ("bt", "grm") for n in (3, 6, 12, 24)]
    found = study(cells, seeds=2, prompts=24, trained=cells, policy_seeds=2, plan=PLAN)
    return written(tmp_path_factory.mktemp("sizes"), found, policy="small", policy_params=135e6), found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    found = two_methods()
    return written(tmp_path_factory.mktemp("two") / "study", found, policy="large", policy_params=360e6), found


def lines(figure):
    """Everything that is drawn against KL, as (d, values)."""
    return [(np.asarray(a.get_xdata()), np.asarray(a.get_ydata())) for x in figure.axes for a in x.lines]


def drawn(figure, curve):
    order = np.argsort(curve.d, kind="stable")
    return any(len(x) == len(order) and np.allclose(x, curve.d[order]) and np.allclose(y, curve.mean[order])
               for x, y in lines(figure))  # fmt: skip


def curves(found, method, metric):
    return [c for c in found.curves if c.method == method and c.metric == metric]


def legend(figure):
    return [t.get_text() for one in figure.legends for t in one.get_texts()]


@pytest.mark.parametrize(("method", "kind"), [("bon", "bon"), ("ppo", "ppo_pooled")])
def test_one_curve_a_size_on_one_pair_of_axes(sizes, method, kind):
    folder, found = sizes
    figure = gao.by_size([read(folder)], method)
    assert legend(figure) == ["15M", "30M", "60M", "120M", "gold", "proxy"]
    assert len([a for a in figure.axes if a.get_visible()]) == 2  # one a variant
    assert len({a.get_ylim() for a in figure.axes}) == 1
    for metric in ("gold", "proxy"):
        wanted = [c for c in curves(found, kind, metric) if c.rm in {**found.pooled, **found.conditions}]
        assert len(wanted) == 8 and all(drawn(figure, c) for c in wanted)


def test_alpha_and_beta_against_parameters_and_pairs(sizes, tmp_path):
    folder, found = sizes
    figure = gao.coefficients([read(folder)], "parameters")
    assert [a.get_title() for a in figure.axes[:2]] == ["best-of-n", "PPO"]
    fits = [found.findings[c]["fit"] for c in found.conditions if c.startswith("bt")]
    (y, *_) = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 4]
    assert np.allclose(y, [f.alpha.mean for f in fits])  # the smallest first
    cells = [Condition("bt", p, None, None) for p in (96, 192)]
    pairs = written(tmp_path, study(cells, seeds=1, prompts=20, plan=PLAN))
    figure = gao.coefficients([read(pairs)], "pairs")
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["96", "192"]


def test_gold_against_validation_loss(sizes):
    folder, found = sizes
    figure = gao.loss([read(folder)])
    points = {(float(x), float(y)) for line in figure.axes[0].lines
              for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}  # fmt: skip
    assert points == {(r["val_loss_nats"], r["gold"]) for r in found.rms} and len(points) == 16


def test_a_peak_is_predicted_from_the_other_sizes(sizes):
    """By hand for one reward model: lines in the log of the size through the other three."""
    folder, found = sizes
    figure = gao.peak([read(folder)])
    names = [c for c in found.conditions if c.startswith("bt")]
    logs, facts = np.log([15e6, 30e6, 60e6, 120e6]), [found.findings[c] for c in names]
    parameters = []
    for which in ("alpha", "beta"):
        slope, offset = np.polyfit(logs[1:], [getattr(f["fit"], which).mean for f in facts[1:]], 1)
        parameters.append(offset + slope * logs[0])
    top = predict(np.array(parameters), np.linspace(0.05, facts[0]["fit"].d_max, 200), "bon").max()
    first = figure.axes[0].lines[0]
    assert first.get_xdata()[0] == pytest.approx(facts[0]["gold_at_peak"].mean)
    assert first.get_ydata()[0] == pytest.approx(top)
    assert len(legend(figure)) == 4  # both methods under best-of-n and PPO


def test_policies_of_several_sizes(sizes, two, tmp_path):
    cells = [Condition("bt", 300, 3, 0.25)]
    other = written(tmp_path, study(cells, seeds=2, prompts=20, plan=PLAN), policy="large", policy_params=360e6)
    figure = gao.policy_size([read(sizes[0]), read(other)])
    assert legend(figure)[:2] == ["policy of 135M", "policy of 360M"] and len(figure.axes) == 1
    with pytest.raises(ArtefactError, match="runs of two studies or more that differ in policy.path"):
        gao.policy_size([read(sizes[0])])
    with pytest.raises(ArtefactError, match="no condition in common"):
        gao.policy_size([read(sizes[0]), read(two[0])])


def test_ensembles_beside_their_members(two):
    folder, found = two
    figure = coste.ensembles([read(folder)], "bon")
    assert set(legend(figure)) == {"mean", "WCO (min)", "UWO, weight 0.5", "one reward model, mean over seeds", "gold",
                                   "proxy"}  # fmt: skip
    wanted = [c for c in curves(found, "bon", "gold") if c.rm in found.findings]
    assert len(wanted) == 8 and all(drawn(figure, c) for c in wanted)
    figure = coste.ensembles([read(folder)], "ppo")
    wanted = [c for c in curves(found, "ppo_pooled", "gold") if c.rm.startswith("bt")]
    assert len(wanted) == 2 and all(drawn(figure, c) for c in wanted)


def test_gold_by_the_number_of_members(two):
    folder, found = two
    figure = coste.members([read(folder)])
    first = figure.axes[0].lines[0]
    assert first.get_xdata().tolist() == [1, 2, 3]
    alone, whole = (found.findings[n]["gold"].mean for n in ("bt-128pairs-12layers-noise0.25",
                                                             "bt-128pairs-12layers-noise0.25 x 3, mean"))  # fmt: skip
    assert first.get_ydata()[[0, 2]] == pytest.approx(
        [alone, whole]
    )  # by one member: as they are; by all: the ensemble


def test_methods_with_their_seeds_pooled(two):
    folder, found = two
    figure = grm.best_of_n([read(folder)])
    assert legend(figure) == ["bt", "grm", "gold", "proxy"]
    assert all(drawn(figure, c) for c in curves(found, "bon", "gold") if c.rm in found.conditions)
    figure = grm.ppo([read(folder)])
    assert legend(figure)[:2] == ["bt (3 seeds)", "grm (3 seeds)"]
    assert all(
        drawn(figure, c) for c in curves(found, "ppo_pooled", "gold") if c.rm in ("bt-128pairs-12layers-noise0.25-kl0",)
    )
    by_step = np.mean([c.mean for c in curves(found, "ppo", "gold") if c.rm.startswith("grm")], axis=0)
    along = [line for line in figure.axes[1].lines if len(line.get_ydata()) == len(by_step)]
    assert any(np.allclose(line.get_ydata(), by_step) for line in along)


def test_tables_of_accuracy_with_other_sets(two, tmp_path, capsys):
    folder, found = two
    names = found.conditions["bt-128pairs-12layers-noise0.25"]
    sets = {n: {"sets": {"hhh": {"accuracy": {"mean": 0.7 + 0.01 * k}}}} for k, n in enumerate(names)}
    (tmp_path / "metrics.json").write_text(json.dumps({"models": sets}))
    assert run.main(["grm-tables", str(folder), "--eval", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| bt"))
    held = np.mean([r["accuracy_gold"] for r in found.rms if r["rm"] in names])
    assert (
        row == f"| bt | 3 | {100 * held:.1f} +- 0.0 | 71.0 +- 1.0 |"
        and "**128 pairs, 12 layers, 25% wrong labels**" in text
    )


def test_imported_scores_take_their_sizes_from_a_table(two, tmp_path):
    """Names of other tools say nothing of sizes."""
    cells = [Condition(f"rm{k}") for k in range(2)]
    folder = written(tmp_path / "scores", study(cells, seeds=1, prompts=20, plan=PLAN))
    with pytest.raises(ArtefactError, match="scores has reward models of one size only: give study.layers"):
        gao.by_size([read_without_sizes(folder)], "bon")
    table = tmp_path / "design.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["rm", "layers", "params"], ["rm0", 6, 1e7], ["rm1", 12, 2e7]])
    record = read(folder, table)
    assert [a.size for a in record.bon] == [1e7, 2e7]
    table.write_text("name\nrm0\n")
    with pytest.raises(ArtefactError, match="a row is `rm`"):
        read(folder, table)


def read_without_sizes(folder):
    (folder / "rms.json").unlink()
    return read(folder)


def test_what_lacks_is_named_with_the_option_that_gives_it(tmp_path):
    folder = written(tmp_path, study([Condition("bt", 128)], seeds=1, prompts=20, plan=PLAN))
    record = [read(folder)]
    wanted = {
        "gao-ppo": "no policies: train some: study.ppo_variants", "gao-parameters": "study.layers",
        "gao-pairs": "study.pairs", "gao-loss": "val_loss_nats", "gao-peak": "four sizes",
        "coste-bon": "study.ensembles", "coste-ppo": "study.ppo_ensembles", "coste-members": "study.seeds=3",
        "grm-ppo": "study.ppo_variants",
    }  # fmt: skip
    for name, said in wanted.items():
        with pytest.raises(ArtefactError, match=f"figure {name}: .*{said}"):
            run.FIGURES[name].draw(record)
    for option in ("study.layers=[6]", "study.pairs=[96]", "study.ensembles=[mean]", "study.ppo_seeds=3"):
        load([], [option])  # the options that refusals name exist


def test_the_command_finds_a_run_and_writes_what_was_asked(two, tmp_path, capsys, monkeypatch):
    folder, _ = two
    monkeypatch.chdir(folder.parent.parent)
    assert run.main(["grm-bon", folder.parent.name, "--out", str(tmp_path / "a" / "f.svg")]) == 0
    assert "<svg" in (tmp_path / "a" / "f.svg").read_text()
    assert run.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in {**run.FIGURES, **run.TABLES})
    with pytest.raises(ConfigError, match="figures are written as"):
        run.main(["grm-bon", str(folder), "--out", "f.txt"])
    with pytest.raises(ConfigError, match="no figure 'gao'"):
        run.main(["gao", str(folder)])
    with pytest.raises(ArtefactError, match="no curves.csv there"):
        run.main(["grm-bon", str(tmp_path)])
