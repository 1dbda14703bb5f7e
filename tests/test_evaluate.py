"""The command: samples without a model, answers that go on after a stop, results that say what was asked."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import logging

from configs import tiny
from lrjax import assessment, evaluate, provenance, workdir
from lrjax import results as results_page
from lrjax.checkpoints import orbax
from lrjax.data.tokenizers import byte_tokenizer, load_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation import suite
from lrjax.evaluation.suite import Options
from lrjax.models.llama import LlamaConfig, init_params
from lrjax.reporting import evaluations
from lrjax.reporting.comparison import markdown

CONFIG = LlamaConfig(
    vocab_size=257, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
    max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = []
    for seed in (0, 1):
        path = tmp_path_factory.mktemp("models") / f"model{seed}"
        orbax.save_model(
            path, CONFIG, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(seed))
        )
        byte_tokenizer().save(path / "tokenizer")
        paths.append(str(path))
    return paths


def run(*arguments):
    flags = evaluate._FLAGS
    for name in flags.values:
        flags[name].unparse()
    evaluate.main(flags.parse(["evaluate", *arguments]))


def test_samples_need_no_model(tmp_path):
    run("--tasks=niah_single_1,fwe,passkey", "--lengths=1024,2048", "--samples=2", "--depths=0.1,0.9",
        "--generate_only", f"--out={tmp_path}")  # fmt: skip
    for length in (1024, 2048):
        for task, count in (("niah_single_1", 2), ("fwe", 2), ("passkey", 4)):
            file = tmp_path / "data" / str(length) / task / "validation.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(rows) == count and all(row["length"] <= length for row in rows)


def test_a_checkpoint_of_a_run_is_told_with_its_run(tmp_path):
    config = tiny.get_config()
    with config.unlocked():
        config.seed = 7
    workdir.write_json(tmp_path / "config.json", workdir.flatten(config))
    provenance.note(tmp_path)
    run_ = provenance.run_of(tmp_path / "checkpoints" / "merged")
    assert (run_["config"], run_["seed"]) == ("tiny", 7)
    assert run_["made_by"] == provenance.notes(tmp_path) != []
    assert provenance.run_of(tmp_path / "merged") is None
    assert provenance.run_of(tmp_path / "no" / "checkpoints" / "merged") is None


def test_checkpoints_side_by_side(checkpoints, tmp_path):
    command = (
        "--tasks=niah_single_1,number",
        "--lengths=2048",
        "--samples=2",
        "--depths=0.5",
        f"--out={tmp_path}",
    )
    run(*checkpoints, *command)
    results = json.loads((tmp_path / "model1" / "results.json").read_text())
    one = results["results"]["niah_single_1"]["2048"]
    assert one["count"] == 2 and one["seed"] == 42 and one["template"]["needle"]
    assert one["samples"][0]["prompt"] and results["cells"]["number"][0]["depth"] == 0.5
    assert results["summary"]["niah_single_1"]["2048"] == one["score"]
    answers = tmp_path / "model0" / "2048" / "pred" / "niah_single_1.jsonl"
    before = answers.read_text()
    assert (tmp_path / "model0" / "number.png").read_bytes().startswith(b"\x89PNG")
    run(*checkpoints, *command)  # again: nothing is asked
    assert answers.read_text() == before
    table = (tmp_path / "comparison.md").read_text()
    assert (
        table.splitlines()[0] == "| task | length | model0 | model1 | model1 - model0 |"
        and len(table.splitlines()) == 4
    )
    # What the page of results keeps of it.
    results_page.store(tmp_path, tmp_path / "kept")
    kept = json.loads((tmp_path / "kept" / tmp_path.name / "model1.json").read_text())
    assert not {"samples", "scores"} & kept["results"]["niah_single_1"]["2048"].keys()
    assert kept["against"]["checkpoint"] == "model0"
    assert kept["checkpoint"] == "model1"  # of paths the name
    page = evaluations.section("needles", {"model1": kept})
    assert kept["made_by"][0]["commit"] in page
    assert f"| niah_single_1 | 2048 | 2 | {one['score']:.1f} [" in page
    assert "Asked as plain text." in page
    kept["results"]["number"]["2048"] |= {"empty": 1, "chat_template": "{{ messages }}"}
    page_of_chat = evaluations.section("needles", {"model1": kept})
    assert "Asked as plain text and in the tokenizer's chat template." in page_of_chat
    assert page_of_chat.count(" (1 empty) |") == 1
    assert "| model1 | model1 - model0 |" in page and "] | +0.0 |" in page
    with pytest.raises(UserError, match="no CHECKPOINT/results"):
        results_page.store(tmp_path / "kept", tmp_path)
    unfinished = tmp_path / "unfinished" / "model"
    unfinished.mkdir(parents=True)
    (unfinished / "results.json").write_text(json.dumps(results | {"complete": False}))
    with pytest.raises(UserError, match="not complete; the same call"):
        results_page.store(tmp_path / "unfinished", tmp_path)
    run(
        "--tasks=niah_single_1",
        "--lengths=2048",
        f"--score_only={answers.parent}",
        f"--out={tmp_path}",
    )
    assert (
        json.loads((tmp_path / "scores.json").read_text())["niah_single_1"]["score"] == one["score"]
    )
    samples = tmp_path / "data" / "2048"
    run(checkpoints[0], *command[:-1], f"--samples_dir={samples}", f"--out={tmp_path / 'given'}")
    given = json.loads((tmp_path / "given" / "model0" / "results.json").read_text())
    first = json.loads((tmp_path / "model0" / "results.json").read_text())
    assert (
        given["results"]["number"]["2048"]["samples"]
        == first["results"]["number"]["2048"]["samples"]
    )
    assert given["results"]["number"]["2048"]["wording"] == "given with the samples"
    with pytest.raises(UserError, match="allowed without folders of lengths: one --lengths, not 2"):
        run(
            checkpoints[0], "--tasks=number", "--lengths=2048,4096", f"--samples_dir={samples}",
            f"--out={tmp_path / 'two'}",
        )  # fmt: skip


def test_a_chat_template_that_is_left_out_is_named(checkpoints, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: told.append(text % values))
    command = "--tasks=number", "--lengths=1024", "--samples=1", "--depths=0.5"
    run(checkpoints[0], *command, f"--out={tmp_path / 'none'}")
    assert not told
    model = shutil.copytree(checkpoints[0], tmp_path / "model")
    spec = str(model)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (model / "tokenizer" / "chat_template.jinja").write_text(template)
    run(spec, *command, f"--out={tmp_path / 'plain'}")
    assert [line for line in told if "has a chat template" in line and spec in line]
    told.clear()
    run(spec, *command, "--chat", f"--out={tmp_path / 'chat'}")
    assert not told
    inside = tiny.get_config().unlock()  # a run
    inside.evaluate.suite.update(tasks=("number",), lengths=(1024,), samples=1, depths=(0.5,))
    tasks = assessment._suite_tasks(inside, load_tokenizer(model / "tokenizer"))
    for _ in range(2):
        tasks["number"](*orbax.load_model(model))
    assert len(told) == 1 and "config.evaluate.suite.chat asks in it" in told[0]
    prompt = json.loads((tmp_path / "chat" / "model" / "results.json").read_text())
    assert prompt["results"]["number"]["1024"]["samples"][0]["prompt"].startswith("[")


def test_answers_of_another_model_or_way_of_asking_are_not_taken(checkpoints, tmp_path):
    command = "--tasks=number", "--lengths=1024", "--samples=1", "--depths=0.5", f"--out={tmp_path}"
    run(checkpoints[0], *command)
    with pytest.raises(
        UserError, match=r"asked with dtype 'bfloat16', .* 'float32'; allowed: another --out"
    ):
        run(checkpoints[0], *command, "--dtype=float32")
    with pytest.raises(UserError, match=r"asked with seed 42, .* with 7"):
        run(checkpoints[0], *command, "--seed=7")
    (tmp_path / "model0").rename(tmp_path / "model1")
    with pytest.raises(UserError, match="asked with weights '"):
        run(checkpoints[1], *command)
    (tmp_path / "model1" / "asked.json").unlink()
    with pytest.raises(UserError, match="there are answers, and no asked"):
        run(checkpoints[1], *command)


def test_texts_are_read(checkpoints, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"id": str(i), "text": "word " * 20}) + "\n" for i in range(5))
    )
    run(checkpoints[0], "--tasks=perplexity,longppl", "--lengths=64,128", f"--texts={texts}", "--window=32",
        "--stride=16", "--key_context=32", f"--out={tmp_path / 'out'}")  # fmt: skip
    results = json.loads((tmp_path / "out" / "model0" / "results.json").read_text())
    assert [b["documents"] for b in results["perplexity"]["buckets"]] == [
        3,
        3,
    ]  # 500 tokens in 128 each
    assert results["longppl"]["documents"] == 3
    assert set(results["summary"]["perplexity"]) == {"0-64", "64-128", "sliding window"}
    with pytest.raises(UserError, match="500 tokens in all; 512 are needed"):
        run(
            checkpoints[0],
            "--tasks=perplexity",
            "--lengths=512",
            f"--texts={texts}",
            f"--out={tmp_path}",
        )


def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lrjax.evaluate", "--tasks=niah,nonsense", "--lengths=4096", f"--out={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "unknown task 'nonsense'; allowed: ruler, niah_m" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "tasks: none"),
        ({"tasks": ("vt",)}, "lengths: none; vt needs one"),
        ({"tasks": ("vt",), "lengths": (0,)}, "1 token and more"),
        (
            {"tasks": ("vt",), "lengths": (64,), "samples": -1},
            "samples: -1; allowed: 1 and more, or 0",
        ),
        ({"tasks": ("vt",), "lengths": (64,), "num_keys": 50}, "values at most 40"),
        ({"tasks": ("vt",), "lengths": (64,), "num_values": 0}, "1 and more, the larger"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_groups_are_written_out():
    options = Options(("niah_m", "niah_multivalue", "longbench"), (4096, 8192))
    assert len(options.pairs()) == 5 * 2 + 21 and options.pairs()[0] == ("niah_multikey_1", 4096)
    assert options.pairs()[-1] == ("longbench:repobench-p", None)


def test_invented_questions_make_no_mean():
    def result(name, **more):
        return {"4096": {"score": 50.0, "count": 100, "parameters": {}} | more}

    real = {name: result(name) for name in suite.GROUPS["ruler"]}
    assert suite.summary(real)["ruler"] == {"4096": 50.0}
    invented = {
        "parameters": {"dataset": "squad"},
        "sources": {"squad": "invented sample, not the data set"},
    }
    found = suite.summary(real | {"qa_1": result("qa_1", **invented)})
    assert "ruler" not in found and found["qa_1"] == {"4096": 50.0} and found["niah_m"]


def test_a_part_of_a_file_makes_no_mean():
    names = suite.GROUPS["longbench"]
    whole = {name: {"all": {"score": 50.0, "count": 200, "of": 200}} for name in names}
    assert suite.summary(whole)["longbench"] == {"all": 50.0}
    part = whole | {names[0]: {"all": {"score": 50.0, "count": 100, "of": 200}}}
    assert "longbench" not in suite.summary(part)


def test_a_comparison_has_a_dash_for_what_was_not_asked():
    table = markdown({"a": {"vt": {"1": 12.34}}, "b": {"cwe": {"1": np.float64(5)}}})
    assert table.splitlines()[2:] == ["| vt | 1 | 12.3 | - |", "| cwe | 1 | - | 5.0 |"]
    far = {"b": {"vt": {"1": {"mean": -1.04, "interval": [-3.0, 0.92]}}}}
    table = markdown({"a": {"vt": {"1": 12.34}}, "b": {"vt": {"1": 11.3}, "cwe": {"1": 5.0}}}, far)
    assert table.splitlines() == [
        "| task | length | a | b | b - a |",
        "| --- | --- | --- | --- | --- |",
        "| vt | 1 | 12.3 | 11.3 | -1.0 [-3.0, +0.9] |",
        "| cwe | 1 | - | 5.0 | - |",
    ]
