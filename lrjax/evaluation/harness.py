"""lrjax as a model of lm-evaluation-harness: MMLU, GSM8K and its other tasks on any checkpoint.

    python -m lrjax.evaluation.harness run --model lrjax \\
        --model_args pretrained=runs/smollm2,dtype=bfloat16 --tasks gsm8k --output_path out

takes the arguments of `lm_eval` (requirements-eval.txt); in Python, importing this module is what registers the model:

    import lm_eval, lrjax.evaluation.harness
    lm_eval.simple_evaluate(model="lrjax", model_args="pretrained=smollm2", tasks=["mmlu"])

Tasks of the harness that run what the model wrote (HumanEval) are refused: `python -m lrjax.evaluate --tasks=humaneval
--run_code` runs it in a sandbox.
"""

import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lrjax.checkpoints import loading
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation.perplexity import token_losses
from lrjax.evaluation.questions import before_stop
from lrjax.evaluation.reader import Reader, answers

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise UserError(
        f"lm-evaluation-harness is not installed ({error}); allowed: pip install -r requirements-eval.txt"
    ) from error

DEFAULT_BUDGET = 256  # new tokens where a task does not say; the harness's own default


@register_model("lrjax")
class LrjaxLM(TemplateLM):
    """A checkpoint, asked one request at a time; what requests share at their beginning is read once.

    Args:
      pretrained: what `lrjax.load` takes: an HF directory, a GGUF file, an lrjax model, a run's workdir, smollm2.
      dtype: of the computation.
      max_length: most tokens of context and answer; default: the checkpoint's window.
      tokenizer: instead of the checkpoint's own.
      batch_size: of generation.
    """

    def __init__(
        self, pretrained, dtype="bfloat16", max_length=None, tokenizer=None, batch_size=1, **unknown
    ):
        super().__init__()
        given = {key for key, value in unknown.items() if value is not None}
        if extra := given - {"max_batch_size", "device"}:  # the harness passes these two by itself
            raise UserError(f"model_args: unknown {', '.join(sorted(extra))}; allowed: pretrained, dtype, "
                            "max_length, tokenizer, batch_size")  # fmt: skip
        self.config, self.params, own = loading.load_for_reading(pretrained, dtype)
        spec = tokenizer or own
        if spec is None:
            raise UserError(
                f"{pretrained}: the checkpoint brings no tokenizer; allowed: tokenizer=PATH"
            )
        self.tokenizer = load_tokenizer(spec)
        self.max_length = int(max_length or self.config.max_position_embeddings)
        self._batch_size = 1 if batch_size in (None, "auto") else int(batch_size)
        self._name = str(pretrained)

    # ------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_id is None:
            raise UserError(
                "the tokenizer names no end token, which the harness puts before empty contexts"
            )
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
        """Token ids; the tokenizer's own opening (bos) comes first, unless it is there or not wanted."""
        ids = self.tokenizer.encode(string).tolist()
        opening = self.tokenizer.opening_ids() if add_special_tokens in (None, True) else []
        return ids if ids[: len(opening)] == opening else opening + ids

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{self._name}: its tokenizer has no chat template; allowed: without --apply_chat_template"
            )
        return self.tokenizer.chat(chat_history, add_generation_prompt=add_generation_prompt)

    # ------------------------------------------------------------------------------- requests

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) of each request."""
        rows = []
        for (text, _), context, continuation in requests:
            if len(context) + len(continuation) > self.max_length:
                raise UserError(
                    f"a request of {len(context) + len(continuation)} tokens ({text[:40]!r}...); max_length is "
                    f"{self.max_length}, and nothing is cut silently"
                )
            rows.append((np.asarray(context, np.int32), np.asarray(continuation, np.int32)))
        longest = max(len(context) + len(continuation) for context, continuation in rows)
        reader = Reader(self.config, self.params, longest + 8)
        found: list = [None] * len(rows)
        # In the order of their contexts, so that the choices of a question read it once.
        for index in sorted(range(len(rows)), key=lambda i: rows[i][0].tolist()):
            context, continuation = rows[index]
            if not len(continuation):
                found[index] = (0.0, True)
                continue
            (score,) = reader.filled(context).score([continuation])
            greedy = bool(np.array_equal(score.argmax, continuation))
            found[index] = (-float(score.nll.sum(dtype=np.float64)), greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Log-probability of whole texts, each token once, in the windows of the harness's own models.

        A window tells max_length tokens after the last one of the window before; the last one is filled up with
        tokens before its own.
        """
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, False), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = [make_disjoint_window(pair) for pair in windows]
            total = 0.0
            if pairs:  # an empty text has none
                pieces = [np.asarray([*context, *told], np.int32) for context, told in pairs]
                losses = token_losses(self.config, self.params, pieces, batch_size=self._batch_size)
                for (nll, _), (_, told) in zip(losses, pairs, strict=True):
                    total -= nll[-len(told) :].sum()
            found.append(float(total))
        return found

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Continuations up to a stop string, the end token or the task's budget of tokens."""
        found: list = [None] * len(requests)
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in kinds.values():
            until, budget, options = _generation(requests[members[0]].args[1])
            prompts = [np.asarray(self.tok_encode(requests[i].args[0]), np.int32) for i in members]
            for prompt, index in zip(prompts, members, strict=True):
                if len(prompt) + budget > self.max_length:
                    raise UserError(
                        f"a prompt of {len(prompt)} tokens and a budget of {budget} "
                        f"({requests[index].args[0][:40]!r}...); max_length is {self.max_length}, and nothing is cut "
                        "silently"
                    )
            rows = answers(
                self.config, self.params, prompts, budget, batch_size=self._batch_size,
                eos_id=self.tokenizer.end_ids or None, stop=self._stopper(until), **options,
            )  # fmt: skip
            for place, row in rows:
                if len(row) and row[-1] in self.tokenizer.end_ids:
                    row = row[:-1]
                text = before_stop(self.tokenizer.decode(row), until)
                found[members[place]] = text
                self.cache_hook.add_partial("generate_until", requests[members[place]].args, text)
        return found

    def _stopper(self, until: Sequence[str]) -> Callable[[np.ndarray], bool] | None:
        if not until:
            return None
        return lambda ids: any(word in self.tokenizer.decode(ids) for word in until)


def _generation(arguments: dict) -> tuple[list[str], int, dict]:
    """(stop strings, new tokens, options of `answers`) of a task's generation_kwargs."""
    arguments = dict(arguments)
    until = arguments.pop("until", None) or []
    until = [until] if isinstance(until, str) else [word for word in until if word]
    budget = DEFAULT_BUDGET
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        budget = int(arguments.pop(name, budget))
    temperature = float(arguments.pop("temperature", 0.0) or 0.0)
    if not arguments.pop("do_sample", temperature > 0):
        temperature = 0.0
    options: dict = {"temperature": temperature, "top_p": float(arguments.pop("top_p", 1.0) or 1.0)}
    if temperature:
        options["rng"] = jax.random.key(int(arguments.pop("seed", 0)))
    if arguments:
        raise UserError(f"generation_kwargs: {', '.join(sorted(arguments))} are not known to lrjax")
    return until, budget, options


def main() -> None:
    if any("unsafe_code" in argument for argument in sys.argv):
        raise UserError(
            "the harness would run the model's programs unguarded; allowed: python -m lrjax.evaluate "
            "--tasks=humaneval --run_code"
        )
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    try:
        # Under its real name: the harness asks for the class that an import registers.
        from lrjax.evaluation import harness

        harness.main()
    except UserError as error:
        print(f"lrjax.evaluation.harness: {error}", file=sys.stderr)
        sys.exit(2)
