"""METEOR and BERTScore, as LooGLE's scripts have them: metrics that go by data and models which lrjax does not ship.

    meteor("/data/nltk_data")(answer, reference)            # a folder with corpora/wordnet
    bert_score("/models/roberta-large", 17)(answer, reference)

Each gives 0 to 1. What is missing is said when the metric is made, the data are read at the first answer.
"""

import functools
import pathlib
import warnings
from collections.abc import Callable

from lrjax.errors import UserError


def meteor(nltk_data) -> Callable[[str, str], float]:
    """METEOR (Banerjee and Lavie 2005) of the different words, by nltk with the WordNet in `nltk_data`.

    The published script hands nltk sets of words, whose order (and with it the penalty for words out of order) is
    another one in every process; here every word stands where it is said first.

    Raises:
        UserError: no WordNet there, or nltk is not installed.
    """
    try:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
        from nltk.translate.meteor_score import single_meteor_score
    except ModuleNotFoundError as error:
        raise UserError(
            "METEOR is counted by nltk, which is not installed; allowed: pip install -r requirements-eval.txt"
        ) from error
    folder = pathlib.Path(nltk_data).absolute()
    places = ("corpora/wordnet", "corpora/wordnet.zip")
    place = next((name for name in places if (folder / name).exists()), None)
    if place is None:
        raise UserError(
            f"nltk_data: {folder} has no corpora/wordnet; it is had by nltk.download('wordnet', '{folder}')"
        )
    if str(folder) not in nltk.data.path:  # nltk reads from these alone
        nltk.data.path.insert(0, str(folder))

    @functools.cache
    def wordnet():
        inside = f"{place}/wordnet/" if place.endswith("zip") else place
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The multilingual functions are not available")
            return WordNetCorpusReader(nltk.data.find(inside, [str(folder)]), omw_reader=None)

    def score(answer, reference):
        words = (list(dict.fromkeys(text.split())) for text in (reference, answer))
        return float(single_meteor_score(*words, wordnet=wordnet()))

    return score


def bert_score(model, layer: int) -> Callable[[str, str], float]:
    """BERTScore (Zhang et al. 2020) by the states of one layer of a model in Hugging Face's format.

    Of precision and recall what the published script takes: how much of the answer the reference has. Its model is
    roberta-large, of which layer 17 is read.

    Raises:
        UserError: no model there, a layer that it does not have, or bert-score is not installed.
    """
    folder = pathlib.Path(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"bertscore_model: {folder} has no config.json; needed is a copy of "
            "huggingface.co/FacebookAI/roberta-large, or another model of its kind"
        )
    try:
        import transformers
        from bert_score import BERTScorer
    except ModuleNotFoundError as error:
        raise UserError(
            f"BERTScore needs {error.name}, which is not installed; allowed: pip install bert-score==0.3.13"
        ) from error
    layers = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
    if not 1 <= layer <= layers:
        raise UserError(f"bertscore_layer: {layer}; {folder} has layers 1 to {layers}")
    load = functools.cache(lambda: BERTScorer(str(folder), num_layers=layer))

    def score(answer, reference):
        if not answer.strip():
            return 0.0
        precision, _, _ = load().score([answer], [reference])
        return float(precision[0])

    return score
