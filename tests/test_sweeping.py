"""A sweep's settings, as they are typed and as fits take them, and what it makes of records."""

import csv
import itertools
import json
import math
import random
import xml.etree.ElementTree

import pytest

from fake_run import fake_config
from icrouting.config import FitConfig
from icrouting.evaluation.records import Record
from icrouting.report import metrics
from icrouting.report.run import Run
from icrouting.routing.pids import late_third
from icrouting.sweeping import picture, words
from icrouting.sweeping.asked import Asked
from icrouting.sweeping.axes import Axis, Base, Setting
from icrouting.sweeping.grid import Grid
from icrouting.sweeping.once import Stages, in_order
from icrouting.sweeping.presets import PRESETS, preset_of
from icrouting.sweeping.table import Table

BASE = Base(FitConfig(), ("agnews", "sst2", "trec", "csqa", "piqa"), 12)


def grid(*axes, base=BASE, **how):
    how = {"reference": None, **how}
    return Grid.of([Axis.read(axis) for axis in axes], base, **how)


def names(of_grid):
    return [setting.name for setting in of_grid.settings]


def test_axes_make_a_grid_in_their_order():
    swept = grid("rank=4,8", "basis=pca,random")
    assert names(swept) == [
        "rank=4 basis=pca",
        "rank=4 basis=random",
        "rank=8 basis=pca",
        "rank=8 basis=random",
    ]
    assert [setting.fit for setting in swept.settings][1] == FitConfig(rank=4, basis="random")


def test_one_by_one_tries_each_value_beside_the_fit_as_it_is():
    swept = grid("w_conf=0", "ce_scope=vocabulary,options", one_by_one=True)
    assert names(swept) == ["as usual", "w_conf=0", "ce_scope=vocabulary"]
    assert swept.reference.fit == FitConfig()


@pytest.mark.parametrize(
    ("axes", "reference", "name"),
    [
        (["rank=4,8,12"], None, "rank=8"),
        (["rank=4,12"], None, "rank=4"),
        (["rank=4,8"], "rank=4", "rank=4"),
        (["rank=4,8", "basis=pca,random"], "rank=8 basis=random", "rank=8 basis=random"),
        (["layers=early,late"], None, "layers=late"),
        (["strength=0,1"], None, "strength=1"),
    ],
)
def test_the_reference_is_as_asked_else_the_fit_as_it_is_else_the_first(axes, reference, name):
    assert grid(*axes, reference=reference).reference.name == name


def test_settings_that_differ_in_strength_share_a_fit():
    swept = grid("rank=4,8", "strength=0.5,1")
    assert list(swept.fits) == ["rank=4", "rank=8"]
    assert [setting.attached["strength"] for setting in swept.settings] == [0.5, 1, 0.5, 1]
    assert swept.settings[0].entrant("x").strength == 0.5


@pytest.mark.parametrize("n_layers", [5, 12, 32])
def test_thirds_part_the_layers_and_the_late_one_is_the_default(n_layers):
    early, middle, late = (words.chosen_layers(word, n_layers) for word in words.THIRDS)
    assert (*early, *middle, *late) == words.chosen_layers("all", n_layers)
    assert late == late_third(n_layers)


def test_values_are_read_as_their_setting_takes_them():
    values = {"layers": "3+5-7", "lr": "1e-3", "skip_nan": "true", "encoder": "random"}
    fit = Setting.of(values, BASE).fit
    usual = FitConfig()
    assert (fit.layers, fit.lr, fit.skip_nan) == ((3, 5, 6, 7), 1e-3, True)
    assert fit.encoder == f"random:{usual.encoder}"
    assert Setting.of({"encoder": "sentence"}, BASE).fit == usual
    assert Setting.of({"sources": "2"}, BASE).sources == ("agnews", "sst2")
    assert Setting.of({"sources": "trec+piqa"}, BASE).sources == ("trec", "piqa")


def test_single_stands_for_each_layer_alone():
    swept = grid("layers=late,single", base=Base(FitConfig(), ("sst2",), 5))
    assert names(swept) == ["layers=late", *(f"layers={layer}" for layer in range(5))]


def test_a_name_can_stand_in_a_pair_of_methods():
    (setting,) = grid("encoder=owner/encoder").settings
    assert setting.name == "encoder=owner:encoder"
    assert setting.fit.encoder == "owner/encoder"


@pytest.mark.parametrize(
    ("axes", "how", "why"),
    [
        (["ranks=4"], {}, "unknown axis 'ranks': did you mean rank"),
        (["rank"], {}, "expected rank=VALUE"),
        (["rank=4,"], {}, "expected rank=VALUE"),
        (["rank=4,4"], {}, "rank has the value '4' twice"),
        (["rank=4", "rank=8"], {}, "the axis rank is given twice"),
        (["rank=0"], {}, "rank=0: .*greater than 0"),
        (["rank=many"], {}, "rank=many: .*integer"),
        (["basis=pcs"], {}, "basis=pcs: .*'pca', 'whitened', 'random'"),
        (["lr=nan"], {}, "lr=nan"),
        (["strength=inf"], {}, "strength=inf"),
        (["layers=last"], {}, "layers=last: expected early"),
        (["layers=3-40"], {}, "layers=3-40: .*below 12"),
        (["layers=late,8-11"], {}, "are the same setting"),
        (["sources=6"], {}, "sources=6: expected 1 to 5"),
        (["sources=agnew"], {}, "did you mean agnews"),
        (["rank=4,8"], {"reference": "rank=9"}, "unknown reference 'rank=9'"),
    ],
)
def test_what_no_fit_takes_is_refused_with_its_axis(axes, how, why):
    with pytest.raises(ValueError, match=why):
        grid(*axes, **how)


@pytest.mark.parametrize(
    ("axes", "preset", "why"),
    [
        ([], None, "nothing to sweep"),
        (["rank=4"], "rank", "leave rank=4 out"),
        ([], "ranks", "did you mean rank"),
        (["rank=4,0"], None, "rank=0"),
        (["layers=nowhere"], None, "layers=nowhere"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_known(axes, preset, why):
    with pytest.raises(ValueError, match=why):
        Asked.of(axes, preset, Base(FitConfig(), BASE.sources))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("n_layers", [5, 32])
def test_every_preset_makes_settings_and_a_reference(name, n_layers):
    asked = Asked.of([], name, Base(FitConfig(), BASE.sources))
    swept = asked.grid(n_layers)
    assert len(swept.settings) > 1 or preset_of(name).methods
    assert swept.reference in swept.settings
    assert preset_of(name).found.endswith(".")


@pytest.mark.parametrize(
    ("axes", "extractions", "pids", "trunks"),
    [
        (["rank=4,8,12"], 1, 3, 1),
        (["lr=1e-4,1e-3"], 1, 1, 1),
        (["n_prompts=10,20"], 2, 2, 1),
        (["n_queries=10,20"], 1, 1, 2),
        (["layers=late,8+11"], 1, 2, 1),
        (["layers=late,7+11"], 2, 2, 2),
        (["layers=early,middle,late,all"], 1, 4, 3),
        (["sources=1,3"], 2, 2, 2),
        (["seed=1,2"], 2, 2, 2),
    ],
)
def test_what_does_not_depend_on_the_axis_is_computed_once(axes, extractions, pids, trunks):
    stages = Stages.of(grid(*axes).fits, 12)
    sizes = (len(stages.extractions), len(stages.pids), len(stages.trunks))
    assert sizes == (extractions, pids, trunks)


TASKS = [
    {"name": "a", "group": "in-domain", "role": "source", "n_options": 3},
    {"name": "b", "group": "far", "role": "unseen", "n_options": 3},
    {"name": "c", "group": "near", "role": "unseen", "n_options": 3},
]
SETTINGS = ("rank=4", "rank=8", "rank=12")


@pytest.fixture(scope="module")
def made():
    """A run of three settings and zero-shot on three tasks of other sizes, and its records."""
    draw = random.Random(0)
    run_records = []
    sizes = {"a": 17, "b": 23, "c": 11}
    for method, (task, n_items) in itertools.product(("zero-shot", *SETTINGS), sizes.items()):
        for index in range(n_items):
            prediction = draw.randrange(3)
            record = Record(method, task, 0, index, index % 3, prediction, (0.0,) * 3, 5, 0.1)
            run_records.append(record)
    routers = dict.fromkeys(SETTINGS, "0f")
    config = {**fake_config(), "tasks": TASKS, "routers": routers, "refused": [], "skipped": []}
    config |= {"methods": ["zero-shot", *SETTINGS]}
    return Run.of(config), run_records


def test_fits_of_more_layers_come_first_and_others_as_they_are():
    fits = grid("layers=early,late,all", "rank=4,8").fits
    assert in_order(fits, 12) == [
        *("layers=all rank=4", "layers=all rank=8"),
        *("layers=early rank=4", "layers=early rank=8", "layers=late rank=4", "layers=late rank=8"),
    ]


def table_of(made):
    run, run_records = made
    return Table.of(run, run_records, SETTINGS, "rank=8")


def slow_lead(run_records, name, reference, tasks):
    """The mean over tasks of the mean over items of right minus the reference's right."""
    means = []
    for task in tasks:
        right = {}
        for record in run_records:
            if record.task == task:
                right[record.method, record.index] = record.label == record.prediction
        indices = [index for method, index in right if method == name]
        changes = [right[name, index] - right[reference, index] for index in indices]
        means.append(sum(changes) / len(changes))
    return sum(means) / len(means)


def slow_interval(run_records, name, reference, tasks):
    """Agresti and Min's interval of each task, of which distances to the ends add in squares."""
    below, above = [], []
    for task in tasks:
        ours, theirs = (
            {r.index: r.label == r.prediction for r in run_records if (r.task, r.method) == at}
            for at in ((task, name), (task, reference))
        )
        won = sum(ours[i] and not theirs[i] for i in ours)
        lost = sum(theirs[i] and not ours[i] for i in ours)
        n = len(ours) + 2
        centre = (won - lost) / n
        half = metrics.Z95 * math.sqrt(won + lost + 1 - (won - lost) ** 2 / n) / n
        value = (won - lost) / len(ours)
        below.append(max(0.0, value - (centre - half)))
        above.append(max(0.0, centre + half - value))
    value = slow_lead(run_records, name, reference, tasks)
    return value - math.hypot(*below) / len(tasks), value + math.hypot(*above) / len(tasks)


@pytest.mark.parametrize("name", ["rank=4", "rank=12", "zero-shot"])
@pytest.mark.parametrize(("group", "tasks"), [("source", "a"), ("unseen", "cb"), ("all", "abc")])
def test_a_lead_is_the_mean_over_tasks_of_paired_differences(made, name, group, tasks):
    lead = table_of(made).line(name, group).lead
    assert lead.value == pytest.approx(slow_lead(made[1], name, "rank=8", tasks), abs=1e-12)
    low, high = slow_interval(made[1], name, "rank=8", tasks)
    assert (lead.low, lead.high) == pytest.approx((low, high), abs=1e-12)


def test_the_reference_has_no_lead_over_itself(made):
    assert table_of(made).line("rank=8", "source").lead.n == 0


def test_settings_come_first_and_what_was_asked_beside_them_last(made):
    assert list(table_of(made).names) == [*SETTINGS, "zero-shot"]
    assert table_of(made).grid()[0] == [
        *("setting", "source, %", "source, over reference"),
        *("unseen, %", "unseen, over reference"),
    ]


def test_csv_and_json_have_the_same_figures(made):
    table = table_of(made)
    lines = list(csv.DictReader(table.csv().splitlines()))
    objects = json.loads(json.dumps(table.objects()))
    assert len(lines) == len(objects) == len(table.lines)
    for line, values in zip(lines, objects, strict=True):
        assert float(line["accuracy"]) == pytest.approx(values["accuracy"], abs=1e-14)
        assert (line["lead"] == "") == ("lead" not in values)


@pytest.mark.parametrize(("n_better", "is_clear"), [(1, False), (9, True)])
def test_a_difference_that_noise_may_be_all_of_is_said_to(made, n_better, is_clear):
    run, _ = made
    run_records = []
    for name in SETTINGS:
        for index in range(20):
            is_right = index < 10 + (n_better if name == "rank=12" else 0)
            prediction = 0 if is_right else 1
            run_records.append(Record(name, "a", 0, index, 0, prediction, (0.0,) * 3, 5, 0.1))
    conclusion = Table.of(run, run_records, SETTINGS, "rank=8").conclusion()
    assert conclusion.startswith(f"On the source tasks rank=12 is highest, {5 * n_better}.0 points")
    assert ("not distinguishable" not in conclusion) == is_clear


def test_a_setting_that_lacks_a_task_says_so(made):
    run, run_records = made
    short = [r for r in run_records if (r.method, r.task) != ("rank=4", "b")]
    table = Table.of(run, short, SETTINGS, "rank=8")
    (line,) = [line for line in table.grid() if line[0] == "rank=4"]
    assert "1 of 2 tasks" in line[3]


def test_the_picture_is_the_same_for_the_same_figures_and_names_every_row(made):
    svg = picture.picture(table_of(made))
    assert svg == picture.picture(table_of(made))
    xml.etree.ElementTree.fromstring(svg)


def test_seeds_fit_every_setting_as_often_and_are_pooled(made):
    swept = grid("rank=4,8", seeds=(0, 7))
    assert names(swept) == ["rank=4", "rank=8"]
    assert list(swept.fits) == ["rank=4 seed=0", "rank=4 seed=7", "rank=8 seed=0", "rank=8 seed=7"]
    assert swept.fits["rank=8 seed=7"].fit == FitConfig(seed=7)
    assert swept.reference_fit.name == "rank=8 seed=0"
    with pytest.raises(ValueError, match="seed is an axis"):
        grid("seed=1,2", seeds=(0,))


def test_a_pooled_lead_pairs_fits_of_one_seed(made):
    run, _ = made
    draw = random.Random(3)
    fits = {
        f"rank={rank} seed={seed}": (f"rank={rank}", seed) for rank in (4, 8) for seed in (0, 7)
    }
    run_records = []
    right = {}
    for name, (setting, fit_seed) in fits.items():
        for index in range(19):
            right[setting, fit_seed, index] = draw.randrange(2)
            for seed in (0, 7):
                prediction = 1 - right[setting, fit_seed, index]
                record = Record(name, "a", seed, index, 0, prediction, (0.0,) * 3, 5, 0.1)
                run_records.append(record)
    table = Table.of(run, run_records, ["rank=4", "rank=8"], "rank=8", fits)
    line = table.line("rank=4", "source")
    by_seed = {
        seed: sum(right["rank=4", seed, i] - right["rank=8", seed, i] for i in range(19)) / 19
        for seed in (0, 7)
    }
    assert line.lead_by_seed == pytest.approx(by_seed)
    assert line.lead.value == pytest.approx(sum(by_seed.values()) / 2)
    assert line.lead.n == 1
    assert "by seed" in table.markdown()


def test_where_nothing_is_ahead_of_the_reference_it_is_highest(made):
    run, _ = made
    run_records = [
        Record(name, "a", 0, index, 0, index % 2, (0.0,) * 3, 5, 0.1)
        for name in SETTINGS
        for index in range(20)
    ]
    conclusion = Table.of(run, run_records, SETTINGS, "rank=8").conclusion()
    assert "the reference rank=8 is highest" in conclusion
