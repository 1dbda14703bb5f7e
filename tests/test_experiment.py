"""Experiments: their configs, the runs of a smoke variant, and the page that is made of stored runs."""

import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import COMPILE_SOON
from hypothesis import assume, given
from hypothesis import strategies as st

from configs.experiments import setting
from lrjax import choosing, examples, experiment, findings, recipe, results
from lrjax import config as config_lib
from lrjax.checkpoints import families
from lrjax.data.loader import make_loader
from lrjax.data.records import RecordFile, write_records
from lrjax.errors import UserError
from lrjax.evaluation.statistics import paired, t_interval
from lrjax.longrecipe.positions import TRANSFORMS
from lrjax.reporting import plots
from lrjax.training.loop import block_length, segments_of_blocks

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
    file for file in (ROOT / "configs" / "experiments").glob("*.py") if file.stem != "setting"
)
NAMES = [file.stem for file in FILES]
TINY = [name for name in NAMES if name != "smollm2"]  # of setting.build
shares = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=6)


# ------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", TINY)
def test_every_arm_is_a_config_whose_claims_name_its_rows(name):
    module = importlib.import_module(f"configs.experiments.{name}")
    command = f"python -m lrjax.experiment --config=configs/experiments/{name}.py "
    assert command in module.__doc__
    rows = {}
    for arm in module.ARMS:
        config = module.get_config(arm)
        config_lib.check(config)
        families.write_config(setting.model(config), "float32")  # else its base could not be stored
        assert config.is_locked and config.name == name
        niah = config.evaluate.niah
        assert len(niah.depths) * niah.samples_per_cell >= 400
        assert max(niah.lengths) == config.target_length
        for method in config.methods.values():
            assert set(method) == set(config_lib.method("first", ""))
            assert method.positions in ("", *TRANSFORMS)
        rows[arm] = {
            "base",
            *config.methods,
            *(f"base_{round(100 * w)}" for w in config.merge.curve),
        }
        rows[arm] |= {"replayed", "merged"} if config.replay.steps else set()
        smoke = module.get_config(f"{arm},smoke" if arm else "smoke")
        assert smoke.extend.steps < 5 < config.extend.steps
    for claim in module.CLAIMS:
        arm = claim.get("arm", module.ARMS[0])
        assert claim["better"] in rows[arm], claim
        assert claim["worse"] in rows[claim.get("worse_arm", arm)], claim
    with pytest.raises(UserError, match="variant 'nonsense'; allowed"):
        module.get_config("nonsense")


@pytest.mark.parametrize("name", TINY)
def test_methods_train_on_equal_tokens_unless_their_name_says_flops(name):
    module = importlib.import_module(f"configs.experiments.{name}")
    for arm in module.ARMS:
        config = module.get_config(arm)
        for key, method in config.methods.items():
            if not method.positions or "flops" in key:
                continue
            length = (
                config.target_length
                if method.positions == "full"
                else method.train_length or config.train_length
            )
            batch = (
                config.extend.global_batch_size
                if method.global_batch_size < 0
                else method.global_batch_size
            )
            assert method.steps == -1
            assert batch * length == pytest.approx(16 * 154, rel=0.05), (arm, key)


def test_the_real_models_arms():
    from configs.experiments import smollm2

    for arm in smollm2.ARMS:
        config = smollm2.get_config(arm)
        config_lib.check(config)
        smoke = smollm2.get_config(f"{arm},smoke")
        config_lib.check(smoke)
        assert smoke.evaluate.checkpoints == config.evaluate.checkpoints
        # A config does not hang on which were made before.
        digest = experiment.config_digest(config)
        assert experiment.config_digest(smollm2.get_config(arm)) == digest
        niah = config.evaluate.niah
        assert len(niah.depths) * niah.samples_per_cell >= 15
        assert max(niah.lengths) == config.target_length == config.evaluate.perplexity.buckets[-1]
        # Every method: 0.5M tokens.
        assert [method.steps for method in config.methods.values()] == [-1]
        assert config.extend.steps * config.train_length == pytest.approx(525_000, rel=0.02)
        assert list(config.evaluate.checkpoints)[-1] in ("merged", *config.methods)
    for claim in smollm2.CLAIMS:
        rows = {f"{claim['arm']}-{claim[side]}" for side in ("better", "worse")}
        assert rows <= {*smollm2.ARMS}
    with pytest.raises(UserError, match=r"allowed: none, 16k-raised_theta, .*, smoke"):
        smollm2.get_config("nonsense")


def test_arms_of_one_table_become_one():
    def run(arm, seed, **rows):
        return {"arm": arm, "seed": seed, "config_digest": f"digest of {arm}", "seconds": 1.5, "target": 9} | {
            "rows": rows, "anchors": ["number"], "made_by": [f"{arm} {seed}"],
        }  # fmt: skip

    stored = {"name": "n", "arms": ["16k-a", "16k-b", "32k-a"], "runs": [
        run("16k-a", 0, base={}, a={"tokens": 2}), run("16k-b", 0, b={"tokens": 3}), run("16k-a", 1, base={}, a={}),
        run("32k-a", 0, a={}),
    ]}  # fmt: skip
    joined = findings.joined(stored)
    assert joined["arms"] == ["16k", "32k"]
    assert [(run["arm"], run["seed"], run["rows"]) for run in joined["runs"]] == [
        ("16k", 0, {"base": {}, "a": {"tokens": 2}, "b": {"tokens": 3}}), ("16k", 1, {"base": {}, "a": {}}),
        ("32k", 0, {"a": {}}),
    ]  # fmt: skip
    first = joined["runs"][0]
    assert first["made_by"] == ["16k-a 0", "16k-b 0"] and first["seconds"] == 3
    assert first["digests"] == {"16k-a": "digest of 16k-a", "16k-b": "digest of 16k-b"}
    assert first["anchors"] == ["number"]
    # A row is of the seeds that have it, and a table that is made in part says which.
    page = "\n".join(results._table({"window": 8, **joined}))
    assert "| seeds |" in page.split("**32k**")[0] and "| seeds |" not in page.split("**32k**")[1]
    assert findings.by_arm(joined)["16k"] == {
        "base": [{}, {}],
        "a": [{"tokens": 2}, {}],
        "b": [{"tokens": 3}],
    }
    again = stored | {"runs": [run("16k-a", 0, base=1), run("16k-b", 0, base=3)]}
    with pytest.raises(UserError, match=r"n: two arms of table '16k' have the row 'base'"):
        findings.joined(again)
    alone = {"arms": ["", "8x"], "runs": []}
    assert findings.joined(alone) is alone


def test_the_surface_of_replay_and_merge():
    def run(arm, seed, shift):
        rows = {
            f"base_{weight}": {
                "needles": {"512": {"0.5": [weight + shift, 200]}},
                "short_loss": {"a": 1.0, "b": weight / 100},
            }
            for weight in (0, 50)
        }
        return {"arm": arm, "seed": seed, "target": 512, "rows": rows | {"base": {}}}

    runs = [run(arm, seed, 10 * seed) for arm in ("replay1", "replay2") for seed in (0, 2)]
    stored = {"arms": ["replay1", "replay2"], "runs": runs}
    panels, arms, weights = findings.merge_surface(stored)
    assert (arms, weights) == (["replay1", "replay2"], ["0", "50"])
    assert (
        panels["Needles found at the target, %"] == [[5, 30]] * 2
    )  # means of 0 and 10 %, of 25 and 35 %
    assert panels["Loss of short text, nats"] == [[0.5, 0.75]] * 2
    assert findings.merge_surface(stored | {"arms": ["replay1"]}) is None
    del runs[0]["rows"]["base_0"]["short_loss"]
    assert list(findings.merge_surface(stored)[0]) == ["Needles found at the target, %"]
    assert plots.surfaces(panels, arms, weights, "weight").startswith(b"\x89PNG")


def test_a_share_of_the_examples_is_contiguous(tmp_path):
    config = importlib.import_module("configs.experiments.skips").get_config().unlock()
    config.target_length, config.train_length = 64, 12
    documents = [
        {"id": f"{i}", "tokens": np.arange(i, i + 64, dtype=np.int32), "segment_lengths": np.full(16, 4, np.int32)}
        for i in range(40)
    ]  # fmt: skip
    write_records(tmp_path / "documents" / "long.array_record", documents)
    chosen = [
        row | {"tokens": row["tokens"][30:42], "segment_lengths": np.full(3, 4, np.int32)}
        for row in documents
    ]
    write_records(tmp_path / "selected" / "mixed.array_record", chosen)
    method = config_lib.method("first", "longrecipe", contiguous_share=0.25)
    parts = recipe.long_examples(config, tmp_path, "mixed", method, weight=0.8)
    assert [part.weight for part in parts] == pytest.approx([0.6, 0.2])
    batch = next(make_loader(parts, seed=0, global_batch_size=40))
    contiguous = (batch["positions"] == np.arange(12)).all(axis=1)
    assert contiguous.sum() == 10
    # Contiguous text is the start of a document, the rest what the method selects.
    assert (np.diff(batch["tokens"]) == 1).all()
    from_start = batch["tokens"][:, 0] - 30
    assert (from_start[~contiguous] >= 0).all() and (from_start[contiguous] < 10).all()
    (alone,) = recipe.long_examples(
        config, tmp_path, "mixed", config_lib.method("first", "longrecipe"), weight=0.8
    )
    assert alone.weight == 0.8
    digest = experiment.config_digest(config)
    for entry in config.methods.values():
        entry.contiguous_share = 0.5
    assert experiment.config_digest(config) != digest


def test_equal_flops():
    from configs.experiments import main_table, setting
    from lrjax.models.flops import forward_flops, train_flops

    config = main_table.get_config()
    full = config.methods.full_equal_flops
    model = setting.model(config)
    short = train_flops(model, 16 * config.extend.steps, config.train_length)
    assert train_flops(model, 5 * full.steps, 512) == pytest.approx(short, rel=0.01)
    # As the docstring says of what is not counted.
    probe = train_flops(model, 5 * config.probe.steps, 512)
    scoring = 2 * forward_flops(model, setting.LONG_DOCUMENTS, 512)
    assert 1.9 < (probe + scoring) / short < 2.2


def test_texts_and_claims_of_stored_runs_are_the_configs_of_today():
    stored = json.loads((ROOT / "docs" / "results" / "skips.json").read_text())
    old = stored | {"title": "old", "about": "old", "claims": []}
    opened = experiment.open_experiment(stored["config"])
    assert results.as_the_config_says(old) == old | experiment.texts(opened)
    other = old | {"runs": [old["runs"][0] | {"config_digest": "0"}]}
    assert results.as_the_config_says(other) == other


# ------------------------------------------------------------------------------------------- what methods may change


def test_shuffled_sentences_are_the_same_sentences():
    index, lengths = np.arange(10, 22), np.asarray([3, 4, 5])
    new_index, new_lengths = examples.shuffled(index, lengths, np.random.default_rng(0))
    pieces = {tuple(piece) for piece in np.split(index, np.cumsum(lengths)[:-1])}
    assert {tuple(p) for p in np.split(new_index, np.cumsum(new_lengths)[:-1])} == pieces
    assert new_index.tolist() != index.tolist()


def test_a_growing_window_parts_rows_and_ends_whole():
    section = config_lib.training(steps=10, grow_from=4)
    blocks = [block_length(section, step, 12) for step in range(10)]
    assert blocks[0] == 4 and blocks == sorted(blocks) and set(blocks[5:]) == {12}
    assert block_length(config_lib.training(), 0, 12) == 12
    segment_ids_BL = np.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    parted_BL = segments_of_blocks(segment_ids_BL, 3)
    assert (parted_BL[segment_ids_BL == 0] == 0).all()
    for i, j in itertools.combinations(range(8), 2):
        together = segment_ids_BL[0, i] == segment_ids_BL[0, j] and i // 3 == j // 3
        assert (parted_BL[0, i] == parted_BL[0, j]) == together


def test_top_selection_and_longce_weights(tmp_path):
    """Sentences with a top token come first; the weights are those of the kept tokens, bounded."""
    rng = np.random.default_rng(0)
    sentences = {"segment_lengths": np.full(4, 3, np.int32), "marks": np.zeros(12, np.int32)}
    documents = [
        {"id": f"d{i}", "tokens": np.arange(12, dtype=np.int32), **sentences} for i in range(10)
    ]
    change_NL = rng.normal(size=(10, 11)).astype(np.float32)
    change_NL[3, 7] = 9.0  # token 8, sentence 2
    for name, rows in (
        ("documents", documents),
        ("scores", [{"id": f"d{i}", "delta_logit": row, "delta_logprob": row} for i, row in enumerate(change_NL)]),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "long.array_record", rows)
    from lrjax.data import keyfacts

    keyfacts.write_tokenizer(tmp_path / "tokenizer")
    config = config_lib.default()
    config.update(train_length=3, target_length=12)
    method = config_lib.method("top", "longrecipe", top_fraction=0.1, weighting="longce")
    choosing.write_selection(config, tmp_path, "top", method, analysis=None)
    selected = RecordFile(tmp_path / "selected" / "top.array_record")
    for number, row in enumerate(selected):
        index = row["token_index"]
        expected = np.minimum(np.exp(np.append(0, change_NL[number])[index]), 5)
        np.testing.assert_allclose(row["weights"], expected, rtol=1e-6)
        # One document of ten is in the top at each place.
        top = {t + 1 for t in range(11) if np.argmax(change_NL[:, t]) == number}
        assert not top or top & set(index.tolist())
    component = examples.placed_component(
        selected, "longrecipe", 12, train_length=3, from_source=False
    )
    example = component.transform(selected[3], rng)
    assert example["weights"][0] == 0
    np.testing.assert_array_equal(example["weights"][1:], selected[3]["weights"][1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_length": 600}, r"methods\.longrecipe\.train_length 600: allowed: 0"),
        ({"top_fraction": 1.5}, r"methods\.longrecipe\.top_fraction 1.5: allowed: from 0 to 1"),
        ({"weighting": "loud"}, r"methods\.longrecipe\.weighting 'loud': allowed: '', 'longce'"),
        ({"contiguous_share": 1.0}, r"methods\.longrecipe\.contiguous_share 1.0: allowed: from 0"),
        ({"selection": "at_positions", "shuffle": True}, "'at_positions' selects nothing"),
    ],
)
def test_impossible_methods_are_refused(change, message):
    from configs import tiny

    config = tiny.get_config("quick").unlock()
    config.methods.longrecipe.update(change)
    with pytest.raises(UserError, match=message):
        config_lib.check(config)


# ------------------------------------------------------------------------------------------- statistics and verdicts


@given(shares, st.randoms(use_true_random=False))
def test_paired_agrees_with_scipy(first, random):
    second = [random.random() for _ in first]
    assume(np.ptp(np.subtract(first, second)) > 1e-6)  # scipy has no p of equal differences
    found = paired(first, second)
    reference = scipy.stats.ttest_rel(first, second)
    assert found["p_t"] == pytest.approx(reference.pvalue, rel=1e-6)
    low, high = reference.confidence_interval()
    assert found["interval"] == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    exact = [
        abs(np.mean([sign * (a - b) for sign, a, b in zip(signs, first, second, strict=True)]))
        for signs in itertools.product((1, -1), repeat=len(first))
    ]
    # Ties to the rounding, as there: means that differ by more are not alike.
    assert found["p_sign"] == np.mean(np.asarray(exact) >= abs(found["mean"]) * (1 - 1e-12))


def test_intervals_of_one_value_and_of_equal_ones():
    assert t_interval([0.5]) == (0.5, None)
    assert paired([1.0, 1.0], [1.0, 1.0])["p_t"] == 1.0
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired([1, 2], [1])


@pytest.mark.parametrize(
    ("interval", "sign", "margin", "expected"),
    [
        ((0.01, 0.2), 1, None, "confirmed"),
        ((0.01, 0.2), -1, None, "refuted"),
        ((-0.1, 0.2), 1, None, "not separable here"),
        ((-0.04, 0.03), 1, 0.05, "confirmed"),
        ((0.06, 0.2), 1, 0.05, "refuted"),
        ((-0.04, 0.2), 1, 0.05, "not separable here"),
        (None, 1, None, "not separable here (one seed)"),
    ],
)
def test_verdicts(interval, sign, margin, expected):
    assert findings.verdict(interval, sign, margin) == expected


@pytest.mark.parametrize(
    ("seeds", "margin", "verdict"),
    [
        (2, None, "not separable here (2 equal differences)"),
        (5, None, "not separable here (5 equal differences)"),
        (6, None, "confirmed"),  # 2 of 2^6 signs
        (6, 0.1, "not separable here (6 equal differences)"),  # nor how alike they are
    ],
)
def test_equal_differences_of_a_few_seeds_prove_nothing(seeds, margin, verdict):
    """One needle of fifteen more in each of two seeds: Student's interval is a point."""
    rows = {
        name: {"needles": {"8": {"0.5": [found, 15]}}} for name, found in (("new", 8), ("old", 7))
    }
    runs = [{"arm": "a", "seed": seed, "target": 8, "rows": rows} for seed in range(seeds)]
    claim = {"better": "new", "worse": "old", "measure": "needles", "margin": margin}
    found = findings.compare({"arms": ["a"], "runs": runs}, claim)
    assert found["verdict"] == verdict and found["count"] == seeds


def test_a_claim_may_be_about_two_arms():
    def run(arm, seed, found):
        row = {"needles": {"512": {"0.5": [found, 80]}}}
        return {"arm": arm, "seed": seed, "target": 512, "rows": {arm: row}}

    runs = [run("a", 1, 40), run("a", 2, 60), run("b", 2, 56), run("b", 1, 32)]
    claim = setting.claim("alike", "a", "b", arm="a", worse_arm="b")
    found = findings.compare({"arms": ["a", "b"], "runs": runs}, claim)
    assert found["mean"] == pytest.approx((8 + 4) / 80 / 2)
    # Of the seeds that have both.
    assert findings.compare({"arms": ["a", "b"], "runs": runs[:3]}, claim)["count"] == 1
    assert findings.compare({"arms": ["a", "b"], "runs": runs[:2]}, claim) is None


def test_near_and_far_needles():
    cells = {"0.1": [1, 4], "0.5": [2, 4], "0.9": [4, 4]}
    row = {"needles": {"512": cells}}
    assert findings.needles(row, 512) == 7 / 12
    assert findings.distant(row, 512, 0, 64) == 1.0  # 51 tokens back
    assert findings.distant(row, 512, 256, 512) == 3 / 8


@pytest.mark.parametrize("name", NAMES)
def test_stored_runs_are_of_the_configs_that_are_here(name):
    """So that --keep takes them, and whoever changes a config sees which runs are of another one."""
    opened = experiment.open_experiment(str(ROOT / "configs" / "experiments" / f"{name}.py"))
    stored = experiment.stored_runs(opened, ROOT / "docs" / "results")
    experiment.check_stored(opened, stored)


def test_stored_runs_of_other_configs_are_not_kept(tmp_path):
    opened = experiment.open_experiment(str(ROOT / "configs" / "experiments" / "skips.py"))
    assert experiment.stored_runs(opened, tmp_path) == []
    (tmp_path / "skips.json").write_text('{"runs": [{"arm": ""}]}')
    with pytest.raises(UserError, match="not the runs of an experiment"):
        experiment.stored_runs(opened, tmp_path)
    run = {"arm": "", "seed": 4, "config_digest": "0"}
    with pytest.raises(UserError, match=r"arm 'all' is another config now .* seed 4 \(0\)"):
        experiment.check_stored(opened, [run])
    with pytest.raises(UserError, match="of arm 'of old', which the experiment does not have"):
        experiment.check_stored(opened, [run | {"arm": "of old"}])


def test_seeds():
    assert experiment.read_seeds(["10-12", "20"]) == [10, 11, 12, 20]
    with pytest.raises(UserError, match="allowed: 10-14"):
        experiment.read_seeds(["ten"])


def test_configs_that_pretrain_alike_share_a_base(tmp_path):
    plans = {}
    for name in ("main_table", "reach", "architecture"):
        opened = experiment.open_experiment(str(ROOT / "configs" / "experiments" / f"{name}.py"))
        for run in experiment.plan_runs(opened, tmp_path, [3]):
            plans[name, run.arm] = run.config.model.source
    same = plans["main_table", ""]
    assert all(plans["reach", arm] == same for arm in ("4x", "8x", "16x", "32x"))
    assert plans["architecture", "llama"] == plans["architecture", "yarn"] == same
    shapes = ("llama", "qk_norm", "local_global", "partial_rotary")
    assert len({plans["architecture", shape] for shape in shapes}) == 4


# ------------------------------------------------------------------------------------------- a whole experiment


EXPERIMENT = '''"""Two ways.

    python -m lrjax.experiment --config=two.py

What they are.
"""

from configs.experiments import setting
from lrjax.config import method

ARMS = ("in_order", "shuffled")
CLAIMS = (setting.claim("One beats the other", "chosen", "raised_theta", paper="7 / 5"),)


def get_config(variant=""):
    return setting.build(__file__, variant, ARMS, change)


def change(config, arm):
    config.methods = {
        "raised_theta": method("first", ""),
        "chosen": method("top", "pose", shuffle=arm == "shuffled", weighting="longce", grow_from=8),
    }
    config.method = "chosen"
    config.evaluate.niah.lengths = (64, 512)
    config.evaluate.lds.update(documents=2, chunk=16)
'''


@pytest.mark.slow
def test_an_experiment_from_its_config_to_the_page(tmp_path):
    (tmp_path / "two.py").write_text(EXPERIMENT)
    command = [
        sys.executable, "-m", "lrjax.experiment", f"--config={tmp_path}/two.py:smoke", "--seeds=0",
        "--processes=2", f"--workdir={tmp_path}/runs", f"--out={tmp_path}/results",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_SOON}

    def call(*flags):
        return subprocess.run(
            [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    done = call()
    logs = "".join(log.read_text()[-1500:] for log in (tmp_path / "runs").rglob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    assert len(list((tmp_path / "runs" / "bases").glob("*/seed-0"))) == 1
    stored = json.loads((tmp_path / "results" / "two-smoke.json").read_text())
    assert [(run["arm"], run["seed"]) for run in stored["runs"]] == [
        ("in_order", 0),
        ("shuffled", 0),
    ]
    for run in stored["runs"]:
        assert set(run["rows"]) == {"base", "raised_theta", "chosen"}
        assert run["rows"]["chosen"]["tokens"] == 2 * 16 * 154
        assert run["rows"]["chosen"]["lds"] >= 0
        assert run["made_by"][0]["commit"] and run["made_by"][0]["devices"] == "1 x cpu"
    # A second call finds all complete, and keeps what another machine ran.
    file = tmp_path / "results" / "two-smoke.json"
    # The run of seed 0 stays until this machine has one that is complete.
    elsewhere = stored["runs"][1] | {
        "seed": 9,
        "made_by": [{"commit": "e15e", "machine": "m", "devices": "8 x tpu"}],
    }
    file.write_text(json.dumps(stored | {"runs": [*stored["runs"], elsewhere]}))
    assert "starting" not in call("--keep").stderr
    again = json.loads(file.read_text())
    assert again["runs"] == [*stored["runs"], elsewhere]
    assert ":smoke --seeds=0,9 " in again["command"]

    page = [
        sys.executable, "-m", "lrjax.results", f"--results={tmp_path}/results", f"--out={tmp_path}/page.md",
    ]  # fmt: skip
    subprocess.run(page, cwd=ROOT, env=environment, check=True, capture_output=True)
    text = (tmp_path / "page.md").read_text()
    # A smoke run has no say in what becomes of the paper's claims.
    assert "| One beats the other" not in text.split("## Two ways.")[0]
    assert "| One beats the other | 7 / 5 | " in results.paper_claims([again | {"smoke": False}])
    assert "## Two ways." in text and "What they are." in text
    assert "| in_order: " not in text and "**not separable here (one seed)**" in text
    assert (tmp_path / "pictures" / "results_two-smoke.png").stat().st_size > 1000
    assert stored["runs"][0]["made_by"][0]["commit"] in text
    assert "lrjax.experiment --config=configs/experiments/skips.py" in text  # of those not run
    # A page is not emptied by a directory that is not there.
    wrong = [*page[:3], f"--results={tmp_path}/nowhere", page[4]]
    refused = subprocess.run(wrong, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "nowhere: there is no such directory" in refused.stderr
    assert (tmp_path / "page.md").read_text() == text
    call("--arms=shuffled")
    alone = json.loads(file.read_text())
    assert alone["runs"] == stored["runs"][1:]
    assert ":smoke --arms=shuffled --seeds=0 " in alone["command"]
