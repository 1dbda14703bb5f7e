"""Any checkpoint by its path: an HF directory, a GGUF file, an lrjax model, or the workdir of a run.

config, params, tokenizer = load("runs/smollm2")          # the newest model of a run
config, params, tokenizer = load("smollm2")               # the packaged SmolLM2-135M-Instruct
"""

import dataclasses
import pathlib

from lrjax.checkpoints import gguf, huggingface, orbax
from lrjax.errors import UserError
from lrjax.models.bits import ready_leaf_by_leaf
from lrjax.models.llama import COMPUTE_DTYPES

# What a run's workdir stands for, the most finished first.
FINISHED = ("merged", "replayed", "base")


def load(
    source, *, dtype: str = "float32", reading: str | None = None, shardings=None, progress=None
):
    """Reads the model at `source`.

    Args:
        dtype: of the parameters, or "stored"; an lrjax model keeps its own.
        reading: as in `tensors.gather`; `load_for_reading` gives it.
        shardings: a function from the `LlamaConfig` to a tree of shardings; None: the first device.
        progress: called with (bytes read, bytes in all) after each tensor; an lrjax model is read in one go.

    Returns:
        `(LlamaConfig, params, tokenizer)`; the tokenizer as `data.tokenizers.load_tokenizer` takes it, None when
        the checkpoint brings none.

    Raises:
        UserError: nothing there, or nothing that lrjax can read.
    """
    if str(source) == "smollm2":
        source = gguf.packaged_smollm2()
    path = pathlib.Path(source)
    how = {"dtype": dtype, "reading": reading, "shardings": shardings, "progress": progress}
    if path.suffix == ".gguf":
        return (*gguf.load(path, **how), path)
    if orbax.is_model(path):
        of_model = None if shardings is None else shardings(orbax.load_config(path))
        return (*orbax.load_model(path, of_model, reading), _tokenizer_of(path))
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        for name in FINISHED:
            if orbax.is_model(path / "checkpoints" / name):
                return load(path / "checkpoints" / name, **how)
        raise UserError(f"{source}: a run without a finished model yet")
    if (path / "config.json").is_file():
        return (*huggingface.load(path, **how), path)
    raise UserError(
        f"{source}: no checkpoint there; allowed: a Hugging Face directory, a .gguf file, an lrjax model, "
        "the workdir of a run, or smollm2"
    )


def load_for_reading(source, dtype: str):
    """`load` of a model that is only read and computes in `dtype`: its config says so, its parameters are `ready`.

    They are rounded while they are read: a model in bfloat16 takes half the memory of float32 from the start.
    """
    if dtype not in COMPUTE_DTYPES:
        raise UserError(f"dtype: {dtype!r}; allowed: {', '.join(COMPUTE_DTYPES)}")
    config, params, tokenizer = load(source, reading=dtype)
    config = dataclasses.replace(config, dtype=dtype)
    return config, ready_leaf_by_leaf(config, params), tokenizer


def _tokenizer_of(path):
    """A model's own tokenizer, or its run's (workdir/tokenizer beside workdir/checkpoints)."""
    for folder in (path / "tokenizer", path.parent.parent / "tokenizer"):
        if folder.is_dir():
            return folder
    return None
