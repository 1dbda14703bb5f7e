"""lrjax: extend the context window of language models with LongRecipe (arXiv 2409.00509), in JAX.

import lrjax
model = lrjax.load("runs/demo")                      # HF directory, GGUF file, lrjax model or a run's workdir
model.generate(["The pass key is"], max_new_tokens=8)
lrjax.positions.longrecipe(segment_lengths, target_length, rng)
lrjax.score(base, extended, tokens_BL)
lrjax.merge({"base": 0.5, "extended": 0.5}, out="merged")
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Looked up when asked for: `import lrjax` stays quick, and the command-line modules load what they need.
    if name in ("load", "score", "merge", "Model"):
        from lrjax import api

        return getattr(api, name)
    if name == "positions":
        from lrjax.longrecipe import positions

        return positions
    raise AttributeError(f"module 'lrjax' has no attribute {name!r}")
