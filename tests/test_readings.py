"""Readings: documents begin with what the tokenizer puts before a text; one model chooses the key tokens of all."""

import jax
import numpy as np
import pytest
import tokenizers

from lrjax import assessment, evaluate
from lrjax import config as config_lib
from lrjax import workdir as wd
from lrjax.checkpoints import orbax
from lrjax.config import default
from lrjax.data.tokenizers import JsonTokenizer, byte_tokenizer, new_config
from lrjax.errors import UserError
from lrjax.evaluation import longppl, perplexity, readings
from lrjax.models.bits import ready
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=258, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, dtype="float32",
)  # fmt: skip
BOS = 257
TEXTS = [
    "A short one.",
    "Then another, which is longer: it goes on and on, past the end.",
    "More. " * 20,
]


def with_bos():
    """Bytes whose tokenizer.json puts <bos> before every text, as Llama's does."""
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer()._backend.to_str())
    backend.add_special_tokens(["<bos>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return JsonTokenizer(backend, new_config({"bos_token": "<bos>", "eos_token": "<eos>"}), "bos")


def of_vocabulary(vocab):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return JsonTokenizer(backend, new_config({}), "other")


def shuffled():
    """As many bytes, with other ids."""
    vocab = byte_tokenizer()._backend.get_vocab()
    return of_vocabulary({token: (index + 1) % 257 for token, index in vocab.items()})


@pytest.fixture(scope="module")
def params():
    return [
        jax.tree.map(
            lambda leaf: 3 * leaf, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(s))
        )
        for s in (0, 1)
    ]


def read(params, tokenizer, **more):
    return readings.read(
        readings.NAMES, CONFIG, params, tokenizer, TEXTS, lengths=(16, 32), documents=3, window=16, stride=8,
        key_context=16, **more,
    )  # fmt: skip


def test_documents_begin_with_bos_within_their_length(params):
    text = np.concatenate([byte_tokenizer().encode(text) for text in TEXTS])
    tokenizer = with_bos()
    assert tokenizer.opening_ids() == [BOS]
    pieces = readings.joined(tokenizer, TEXTS, 32, 3)
    assert [piece.shape for piece in pieces] == [(32,)] * 3
    for index, piece in enumerate(pieces):
        np.testing.assert_array_equal(piece, [BOS, *text[31 * index : 31 * (index + 1)]])
    found = read(params[0], tokenizer)
    # Every token of the text is told, bos never.
    assert [bucket["tokens"] for bucket in found["perplexity"]["buckets"]] == [3 * 15, 3 * 16]
    assert found["perplexity"]["sliding_window"]["tokens"] == found["longppl"]["tokens"] == 3 * 31
    assert found["perplexity"]["bos"] is found["longppl"]["bos"] is True
    expected = [nll for nll, _ in perplexity.token_losses(CONFIG, params[0], pieces)]
    assert found["longppl"]["perplexity"] == pytest.approx(
        np.exp(np.mean(np.concatenate(expected)))
    )
    told = perplexity.sliding_window(CONFIG, params[0], pieces, 16, 8, opening=[BOS])
    assert found["perplexity"]["sliding_window"] == told


def test_without_an_opening_nothing_is_added(params):
    tokenizer = byte_tokenizer()
    text = np.concatenate([tokenizer.encode(text) for text in TEXTS])
    pieces = readings.joined(tokenizer, TEXTS, 32, 3)
    np.testing.assert_array_equal(np.concatenate(pieces), text[: 3 * 32])
    found = read(params[0], tokenizer)
    assert found["perplexity"].pop("bos") is found["longppl"]["bos"] is False
    sliding = found["perplexity"].pop("sliding_window")
    assert found["perplexity"] == perplexity.perplexity_by_position(
        CONFIG, params[0], pieces, (16, 32)
    )
    assert sliding == perplexity.sliding_window(CONFIG, params[0], pieces, 16, 8)
    assert found["longppl"] == longppl.longppl(CONFIG, params[0], pieces, context=16)


def test_an_evaluator_chooses_the_key_tokens(params, monkeypatch):
    seen = []

    def chosen(config, judge, document, nll, *others):
        seen.append(judge)
        return np.arange(len(nll)) % 2 == 0

    monkeypatch.setattr(longppl, "key_tokens", chosen)
    found = read(params[0], with_bos(), evaluator=(CONFIG, params[1], with_bos()))
    assert len(seen) == 3 and all(judge is params[1] for judge in seen)
    assert found["longppl"]["evaluator"] == "another"


@pytest.mark.parametrize("kind", ["smaller", "shuffled"])
def test_an_evaluator_of_another_vocabulary_is_refused(params, kind):
    vocab = byte_tokenizer()._backend.get_vocab()
    few = {token: index for token, index in vocab.items() if index < 64}
    other = shuffled() if kind == "shuffled" else of_vocabulary(few)
    with pytest.raises(
        UserError, match="evaluator has another vocabulary: the tokens of document 0"
    ):
        read(params[0], with_bos(), evaluator=(CONFIG, params[1], other))


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), with_bos()], ids=["bytes", "bos"])
def test_a_run_reads_its_documents_and_needles_with_bos(params, tokenizer, tmp_path, monkeypatch):
    opening = tokenizer.opening_ids()
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text("The river ran on. Nobody knew why it ran. " * 30)
    config = default()
    with config.unlocked():
        config.data.sources = {"river": str(tmp_path / "texts.txt")}
        config.evaluate.short.update(sources={"river": "river"}, documents=1, length=24)
        config.evaluate.perplexity.update(
            source="river", documents=1, length=48, buckets=(24, 48), window=16, stride=8, key_context=16
        )  # fmt: skip
        config.evaluate.niah.update(lengths=(160,), depths=(0.5,), haystack="river", fast=True)
    read_tokens, losses = [], perplexity.token_losses

    def kept(config, params, documents, **more):
        read_tokens.extend(documents)
        return losses(config, params, documents, **more)

    monkeypatch.setattr(perplexity, "token_losses", kept)
    tasks = assessment.make_tasks(config, tmp_path)
    short, _, _ = tasks["short"](CONFIG, params[0])
    assert short["river"]["bos"] is bool(opening) and short["river"]["tokens"] == 23
    by_position, _, length = tasks["perplexity"](CONFIG, params[0])
    assert by_position["bos"] is bool(opening) and length == 48
    assert by_position["longppl"]["bos"] is bool(opening)
    found, _, _ = tasks["niah"](CONFIG, params[0])
    assert found["bos"] is bool(opening) and found["tokens"] == 160
    assert {len(document) for document in read_tokens} <= {24, 16, 48}
    for document in read_tokens[:2]:
        assert document[: len(opening)].tolist() == opening
        assert tokenizer.decode(document[len(opening) :]).startswith("The river ran on.")


def test_a_checkpoint_of_the_run_chooses_the_key_tokens_of_all(params, tmp_path, monkeypatch):
    byte_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text("The river ran on. Nobody knew why it ran. " * 30)
    orbax.save_model(tmp_path / "checkpoints" / "base", CONFIG, params[1])
    config = default().unlock()
    config.data.sources = {"river": str(tmp_path / "texts.txt")}
    config.evaluate.perplexity.update(
        source="river", documents=1, length=48, buckets=(24, 48), key_context=16, key_evaluator="base"
    )  # fmt: skip
    config_lib.check(config)
    judges = []
    monkeypatch.setattr(
        longppl, "longppl", lambda *model, evaluator, **more: judges.append(evaluator) or {}
    )
    found, _, _ = assessment.make_tasks(config, tmp_path)["perplexity"](CONFIG, params[0])
    assert found["longppl"]["evaluator"] == "base"
    ((judge_config, judge),) = judges
    assert judge_config.vocab_size == CONFIG.vocab_size
    jax.tree.map(np.testing.assert_array_equal, judge, ready(judge_config, params[1]))
    config.evaluate.perplexity.key_evaluator = "another"
    with pytest.raises(UserError, match=r"key_evaluator 'another': allowed: '', 'base', 'probe'"):
        config_lib.check(config)


@pytest.fixture(scope="module")
def checkpoints(params, tmp_path_factory):
    paths = []
    for seed, tokenizer in ((0, with_bos()), (1, with_bos()), (0, shuffled())):
        path = tmp_path_factory.mktemp("models") / f"model{len(paths)}"
        orbax.save_model(path, CONFIG, params[seed])
        tokenizer.save(path / "tokenizer")
        paths.append(str(path))
    return paths


def test_the_first_checkpoint_chooses_the_key_tokens_of_all(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text(" ".join(TEXTS))
    calls = []

    def kept(names, config, params, *others, evaluator=None, **more):
        calls.append(evaluator and evaluator[1])
        return {"longppl": {"longppl": 2.0, "evaluator": "?"}}

    def call(*more):
        command = [
            "evaluate",
            *more,
            "--tasks=longppl",
            "--lengths=32",
            "--key_context=16",
            "--dtype=float32",
        ]
        flags = evaluate._FLAGS
        for name in flags.values:
            flags[name].unparse()
        evaluate.main(
            flags.parse(
                [*command, f"--texts={tmp_path / 'texts.txt'}", f"--out={tmp_path / 'out'}"]
            )
        )
        return [
            (wd.read_json(file)["found"]["longppl"], wd.read_json(file)["asked"])
            for file in sorted((tmp_path / "out").glob("*/readings.json"))
        ]

    first, second, shuffled_ids = checkpoints
    with pytest.raises(UserError, match="evaluator has another vocabulary"):
        call(first, f"--key_evaluator={shuffled_ids}")
    monkeypatch.setattr(readings, "read", kept)
    found = call(first, second)
    assert [each["evaluator"] for each, _ in found] == [first, first]
    assert [(asked["checkpoint"], asked["key_evaluator"]) for _, asked in found] == [
        (first, first),
        (second, first),
    ]
    assert calls[0] is None and calls[1] is not None
    call(first, second)
    assert len(calls) == 2  # the same call reads nothing again
    found = call(second)
    assert len(calls) == 3 and calls[2] is None and found[1][0]["evaluator"] == second
    found = call(first, second, f"--key_evaluator={second}")
    assert len(calls) == 4 and calls[3] is not None  # the second has read itself already
    assert [each["evaluator"] for each, _ in found] == [second, second]
