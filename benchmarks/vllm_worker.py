"""The part of `benchmarks.vllm_parity` that runs in vLLM's environment: loads directories and writes what they say.

    PYTHON benchmarks/vllm_worker.py JOBS.json RESULTS.json

JOBS: {name: {"model": DIR, "max_model_len": tokens or null, "prompts": [[token id, ...], ...], "new": tokens}}.
RESULTS, by name: {"logprobs": one [tokens, vocabulary] a prompt (new 0), "tokens": one list a prompt (new > 0)}, or
{"error": the last line of it}.
"""

import json
import os
import pathlib
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: it starts sooner
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB


def answer(job: dict) -> dict:
    import vllm

    model = vllm.LLM(
        model=job["model"], dtype="float32", enforce_eager=True, skip_tokenizer_init=not job["new"],
        max_logprobs=-1, enable_prefix_caching=False,
        max_num_batched_tokens=2048, max_num_seqs=4,
        max_model_len=job["max_model_len"],
    )  # fmt: skip
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["new"] or 1, ignore_eos=True, detokenize=False,
        prompt_logprobs=None if job["new"] else -1,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    answers = model.generate(prompts, sampling, use_tqdm=False)
    if job["new"]:
        return {"tokens": [list(one.outputs[0].token_ids) for one in answers]}
    return {
        "logprobs": [
            [[row[token].logprob for token in sorted(row)] for row in one.prompt_logprobs[1:]]
            for one in answers
        ]
    }


def main() -> None:
    jobs, results = (pathlib.Path(path) for path in sys.argv[1:])
    found = {}
    for name, job in json.loads(jobs.read_text()).items():
        try:
            found[name] = answer(job)
        except Exception as error:  # vLLM raises many kinds, and each is a result
            found[name] = {"error": (str(error).strip() or repr(error)).splitlines()[-1]}
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
