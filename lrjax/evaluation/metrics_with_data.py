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


@functools.cache
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


@functools.cache
def bert_score(model, layer: int) -> Callable[[str, str], float]:
    """BERTScore (Zhang et al. 2020): how near each token of the answer is to one of the reference, in the mean.

    The cosine of the states of one layer of a model in Hugging Face's format; the tokens that the tokenizer puts around
    a text count in no mean, but may be the nearest ones, as in the package bert-score. Of precision and recall this is
    precision: what LooGLE's script takes, of roberta-large's layer 17. Texts longer than the model reads are cut, as
    there; an empty answer scores 0 (there it is the word "None").

    Raises:
        UserError: no model there, a layer that it does not have, or torch and transformers are not installed.
    """
    folder = pathlib.Path(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"bertscore_model: {folder} has no config.json; needed is a copy of "
            "huggingface.co/FacebookAI/roberta-large, or another model of its kind"
        )
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"BERTScore needs {error.name}, which is not installed; allowed: pip install torch transformers"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder)
    if not 1 <= layer <= config.num_hidden_layers:
        raise UserError(
            f"bertscore_layer: {layer}; {folder} has layers 1 to {config.num_hidden_layers}"
        )

    @functools.cache
    def load():
        # A text's first word is tokenised like its others: byte-level tokenizers would take it for another token.
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
        # Where the tokenizer does not say: two places are not tokens' in models of RoBERTa's kind.
        longest = min(tokenizer.model_max_length, config.max_position_embeddings - 2)
        encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        return tokenizer, longest, encoder

    def states(text):
        tokenizer, longest, encoder = load()
        inputs = tokenizer(
            text.strip(), truncation=True, max_length=longest, return_tensors="pt",
            return_special_tokens_mask=True,
        )  # fmt: skip
        own = inputs.pop("special_tokens_mask")[0] == 0
        with torch.no_grad():
            states_TD = encoder(**inputs, output_hidden_states=True).hidden_states[layer][0]
        return torch.nn.functional.normalize(states_TD, dim=-1), own

    def score(answer, reference):
        if not answer.strip() or not reference.strip():
            return 0.0
        (answer_TD, own_T), (reference_UD, _) = states(answer), states(reference)
        return float((answer_TD @ reference_UD.T).max(dim=1).values[own_T].mean())

    return score
