"""lm-evaluation-harness asks an lrjax checkpoint: log-likelihoods and texts are those of the model.

Needs requirements-eval.txt; skipped without it.
"""

import json
import shutil
import types

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings(
    "default"
)  # the harness and what it imports warn of themselves

from lrjax.checkpoints import orbax  # noqa: E402
from lrjax.data.tokenizers import byte_tokenizer  # noqa: E402
from lrjax.errors import UserError  # noqa: E402
from lrjax.evaluation import harness  # noqa: E402
from lrjax.evaluation.generate import generate  # noqa: E402
from lrjax.evaluation.perplexity import token_losses  # noqa: E402
from lrjax.models.llama import LlamaConfig, init_params  # noqa: E402

CONFIG = LlamaConfig(
    vocab_size=257, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
    dtype="float32", max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(1))
    orbax.save_model(path, CONFIG, jax.tree.map(lambda leaf: 3 * leaf, params))
    byte_tokenizer().save(path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return harness.LrjaxLM(pretrained=str(checkpoint), dtype="float32")


def request(*args):
    return types.SimpleNamespace(args=args)


def test_loglikelihoods_are_the_models(model):
    pairs = [
        ("The sky is", " blue"),
        ("The sky is", " green"),
        ("", "alone"),
        ("Ends with a space ", "x"),
    ]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    tokenizer = byte_tokenizer()
    for (context, text), (score, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer.encode(context + text)
        count = len(text) + (len(context) - len(context.rstrip()))
        ids = ids if context else np.concatenate([[tokenizer.eos_id], ids])
        ((nll, right),) = token_losses(CONFIG, model.params, [ids])
        assert score == pytest.approx(-nll[-count:].sum(), abs=1e-3)
        assert greedy == bool(right[-count:].all())


def test_rolling_tells_every_token_once(model, monkeypatch):
    """In disjoint windows, as the harness's own models: else perplexities of long texts are not comparable."""
    text = "a text of more tokens than the window holds"
    assert len(text) % 16
    ids = np.concatenate([[256], byte_tokenizer().encode(text)]).astype(np.int32)
    ((nll, _),) = token_losses(CONFIG, model.params, [ids])
    assert model.loglikelihood_rolling([request(text)]) == [pytest.approx(-nll.sum(), abs=1e-3)]
    monkeypatch.setattr(model, "max_length", 16)
    for batch_size in (1, 2):
        monkeypatch.setattr(model, "_batch_size", batch_size)
        texts = [text, text[:32], text[:17], text[:16], "a", ""]
        found = model.loglikelihood_rolling([request(each) for each in texts])
        for each, score in zip(texts, found, strict=True):
            total, told = 0.0, 0
            while told < len(each):
                stop = min(told + 16, len(each))
                # 16 tokens are read and the last one is told: ids[i + 1] is the text's token i.
                piece = ids[max(stop - 16, 0) : stop + 1]
                ((nll, _),) = token_losses(CONFIG, model.params, [piece])
                total, told = total - nll[told - stop :].sum(), stop
            assert score == pytest.approx(total, abs=1e-3)


def test_texts_end_before_their_stop(model):
    ids = byte_tokenizer().encode("Once upon")
    free = byte_tokenizer().decode(generate(CONFIG, model.params, [ids], 12)[0])
    asked = [
        request("Once upon", {"until": [free[6]], "max_gen_toks": 12}),
        request("Once upon", {"max_gen_toks": 5}),
    ]
    texts = model.generate_until(asked)
    assert texts[0] == free[: free.index(free[6])] and free.startswith(texts[1])
    with pytest.raises(UserError, match="generation_kwargs: num_beams"):
        model.generate_until([request("a", {"num_beams": 4})])
    with pytest.raises(UserError, match="nothing is cut"):
        model.generate_until([request("a" * 200, {"max_gen_toks": 100})])


def local_sums(checkpoint, tmp_path, model_args="", **how):
    """What the harness says of a task of four questions in a file."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"{i} plus 1 is", "choices": [str(i + 1), "none"], "answer": 0}
        for i in range(4)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: local_sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return lm_eval.simple_evaluate(
        model="lrjax", model_args=f"pretrained={checkpoint},dtype=float32{model_args}", tasks=["local_sums"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0, **how,
    )  # fmt: skip


def test_a_local_task_runs_through_the_harness(checkpoint, tmp_path):
    found = local_sums(checkpoint, tmp_path)
    assert 0 <= found["results"]["local_sums"]["acc,none"] <= 1
    assert found["n-samples"]["local_sums"]["effective"] == 4


def test_a_chat_template_reaches_the_prompts(checkpoint, tmp_path):
    shutil.copytree(checkpoint / "tokenizer", tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = local_sums(
        checkpoint, tmp_path, f",tokenizer={tmp_path / 'chatty'}", log_samples=True,
        apply_chat_template=True, system_instruction="Be short.",
    )  # fmt: skip
    first = min(found["samples"]["local_sums"], key=lambda sample: sample["doc_id"])
    context = first["arguments"][0][0]
    assert context == "<system>Be short.<user>0 plus 1 is<assistant>"
    assert 0 <= found["results"]["local_sums"]["acc,none"] <= 1


def test_mistakes_are_named(checkpoint, model, monkeypatch):
    with pytest.raises(UserError, match="model_args: unknown load_in_8bit"):
        harness.LrjaxLM(pretrained=str(checkpoint), load_in_8bit=True)
    with pytest.raises(UserError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])
    monkeypatch.setattr("sys.argv", ["x", "--confirm_run_unsafe_code"])
    with pytest.raises(UserError, match="--run_code"):
        harness.main()
