"""What the stages of a run share: its checkpoints, mesh, tokenizer and data, found by name."""

import dataclasses
import functools
import pathlib

import jax

from lrjax import examples, sharding
from lrjax import workdir as wd
from lrjax.checkpoints import orbax
from lrjax.data.sources import open_source
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.models import COMPUTING
from lrjax.models.bits import ready_leaf_by_leaf
from lrjax.models.llama import LlamaConfig, abstract_params
from lrjax.training.state import shardings_of


def on_first_process(function):
    """Runs what needs no device and writes files; the other processes wait. The workdir is on a disk they share."""

    @functools.wraps(function)
    def stage(*args, **kwargs):
        result = function(*args, **kwargs) if jax.process_index() == 0 else None
        sharding.barrier(function.__name__)
        return result

    return stage


def checkpoint(workdir, name: str) -> pathlib.Path:
    return pathlib.Path(workdir) / "checkpoints" / name


def open_mesh(config):
    return sharding.make_mesh(config.mesh.to_dict())


def run_config(config, model_config: LlamaConfig) -> LlamaConfig:
    """A checkpoint's config with the numerics of this run."""
    return dataclasses.replace(model_config, **{name: config.model[name] for name in COMPUTING})


def load_checkpoint(config, workdir, name: str, reading: str | None = None):
    """`(LlamaConfig, params)` of a checkpoint of the run, laid out on its mesh; `reading` as in `orbax.load_model`."""
    path = checkpoint(workdir, name)
    if not orbax.is_model(path):
        raise UserError(f"{path}: not there; run the stages before this one first")
    model_config = orbax.load_config(path)
    shardings = shardings_of(abstract_params(model_config), open_mesh(config))
    model_config, params = orbax.load_model(path, shardings, reading)
    return run_config(config, model_config), params


def load_for_reading(config, workdir, name: str):
    """`load_checkpoint` of what is only read: parameters as `models.bits.ready` has them, rounded on the way."""
    model_config, params = load_checkpoint(config, workdir, name, reading=config.model.dtype)
    return model_config, ready_leaf_by_leaf(model_config, params)


def open_tokenizer(workdir):
    return load_tokenizer(workdir / "tokenizer")


def data_paths(config, workdir) -> dict:
    """Data sources by name: what the prepare module wrote, and those that the config names."""
    prepared = workdir / "data" / "sources.json"
    paths = {}
    if prepared.exists():
        paths = {name: str(workdir / path) for name, path in wd.read_json(prepared).items()}
    return paths | dict(config.data.sources)


def open_data(config, workdir, name: str):
    paths = data_paths(config, workdir)
    if name not in paths:
        raise UserError(
            f"data source {name!r} is not in config.data.sources; there are: {', '.join(paths)}"
        )
    return open_source(paths[name])


def mixture(config, workdir, section, length: int):
    """The packed data sources that a training section mixes in."""
    tokenizer = open_tokenizer(workdir)
    return [
        examples.packed_component(
            open_data(config, workdir, name), tokenizer, length, share, section.mark_weight
        )
        for name, share in section.mixture.items()
    ]
