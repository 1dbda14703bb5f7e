"""What to merge and how: one description for Python, the command line and mergekit's YAML files.

    recipe = MergeRecipe("linear", {"base": 0.5, "extended": 0.5})
    recipe = read_mergekit("merge.yml")

A number may be given anew for parts of the model. Such a setting is, as in mergekit,

    0.5                                                         for every tensor
    [0.0, 0.5, 1.0]                                             over the layers, interpolated from first to last
    [{"filter": "attention", "value": 0.3}, {"value": 0.5}]     the first whose filter matches the tensor

A filter is a kind of tensor (attention, mlp, norm, embedding, head), a part of its name, or a pattern with * or ?.
Layers are numbered from 0 and lie at 0 to 1 on a list of numbers; what belongs to no layer takes the first.
"""

import dataclasses
import fnmatch
import math
import pathlib
import re
from collections.abc import Mapping

from lrjax.errors import UserError
from lrjax.longrecipe.merge_methods import METHODS, NORMALIZED, Parameters

KINDS = ("attention", "mlp", "norm", "embedding", "head")
_LAYER = re.compile(r"(?:^|[./])(?:layers|h|blocks)[./](\d+)[./]")
_ATTENTION = re.compile(r"attn|attention|(?:^|/)[qkvo](?:_bias)?$")


@dataclasses.dataclass
class MergeRecipe:
    """A merge, before any file is looked at.

    Attributes:
        method: a name in `merge_methods.METHODS`.
        weight: source -> its weight, a setting. The base of a method with one is not in it.
        base: where differences are taken from (task arithmetic, TIES, DARE), or what slerp starts from.
        density: source -> share of its difference that is kept, a setting.
        t: slerp: a setting.
        scale: lambda on the sum of differences, a setting.
        normalize: divide by the sum of the weights; None: as the method does (TIES divides).
        strict_sum: refuse weights of a linear merge that do not sum to 1; False: warn.
        rescale: DARE: divide what is kept by the density.
        seed: DARE's.
        dtype: of the result, float32, float16 or bfloat16; None: as in the first source.
        rope_from: the source whose RoPE and window the result has; tokenizer_from: whose tokenizer.
    """

    method: str
    weight: dict = dataclasses.field(default_factory=dict)
    base: str | None = None
    density: dict = dataclasses.field(default_factory=dict)
    t: object = 0.5
    scale: object = 1.0
    normalize: bool | None = None
    strict_sum: bool = True
    rescale: bool = True
    seed: int = 0
    dtype: str | None = None
    rope_from: str | None = None
    tokenizer_from: str | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"merge method {self.method!r}; allowed: {', '.join(METHODS)}")
        paths = [str(path) for path in self.weight]
        if len({pathlib.Path(path).resolve() for path in paths}) < len(paths):
            raise UserError(f"merge sources {', '.join(paths)}: one of them is there twice")
        self.weight = {str(path): value for path, value in self.weight.items()}
        if METHODS[self.method].base:
            self._take_base()
        elif self.base is not None:
            raise UserError(f"merge method {self.method!r} has no base; leave base out")
        if not self.weight:
            raise UserError("merge: no sources; at least one is needed")
        if not isinstance(self.density, Mapping):
            self.density = dict.fromkeys(self.weight, self.density)
        self.density = {str(path): value for path, value in self.density.items()}
        for name, allowed in (("rope_from", self.sources), ("tokenizer_from", self.sources)):
            value = getattr(self, name)
            if value is not None and str(value) not in allowed:
                raise UserError(
                    f"{name} {str(value)!r} is not a source; allowed: {', '.join(allowed)}"
                )
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            raise UserError(f"dtype {self.dtype!r}; allowed: float32, float16, bfloat16")
        settings = [*self.weight.values(), *self.density.values(), self.t, self.scale]
        if not any(isinstance(setting, list | tuple | Mapping) for setting in settings):
            self.parameters("", num_layers=1)  # plain numbers are checked before any file is opened

    def _take_base(self) -> None:
        if self.method == "slerp" and self.base is None and len(self.weight) == 2:
            # slerp of two weighted sources: the weight of the second is how far to go.
            self.base, other = self.weight
            weights = [self.weight[self.base], self.weight[other]]
            numbers = all(isinstance(weight, int | float) for weight in weights)
            if not numbers or not math.isclose(sum(weights), 1, abs_tol=1e-6):
                raise UserError(
                    f"slerp weights {weights}: two numbers that sum to 1 are needed, or base and t"
                )
            self.t = weights[1]
        if self.base is None:
            raise UserError(
                f"merge method {self.method!r} needs base, a model to take differences to"
            )
        self.base = str(self.base)
        same = pathlib.Path(self.base).resolve()
        self.weight = {p: w for p, w in self.weight.items() if pathlib.Path(p).resolve() != same}
        if self.method == "slerp" and len(self.weight) != 1:
            raise UserError(
                f"slerp merges two sources, a base and another; there are {len(self.weight) + 1}"
            )

    @property
    def sources(self) -> list[str]:
        """All paths, the base first."""
        return [*([self.base] if self.base else []), *self.weight]

    def parameters(self, tensor: str, num_layers: int) -> Parameters:
        """The numbers of one tensor.

        Raises:
            UserError: no setting matches the tensor, or a number is none that the method knows.
        """

        def number(setting, what):
            return resolve(setting, tensor, num_layers, what)

        weight = tuple(number(value, f"weight of {path}") for path, value in self.weight.items())
        normalize = self.method in NORMALIZED if self.normalize is None else self.normalize
        if self.method == "linear":
            self._check_sum(tensor, weight, normalize)
        density = tuple(
            number(self.density.get(path, 1.0), f"density of {path}") for path in self.weight
        )
        for path, value in zip(self.weight, density, strict=True):
            if not 0 <= value <= 1:
                raise UserError(f"density of {path} is {value:g}; allowed is 0 to 1")
        return Parameters(
            weight=weight, density=density, t=number(self.t, "t"), scale=number(self.scale, "lambda"),
            normalize=normalize, rescale=self.rescale, seed=self.seed,
        )  # fmt: skip

    def _check_sum(self, tensor, weight, normalize) -> None:
        total = math.fsum(weight)
        if normalize and abs(total) < 1e-8:
            raise UserError(
                f"merge weights {list(weight)} of {tensor} sum to 0; they cannot be normalized"
            )
        if not normalize and self.strict_sum and not math.isclose(total, 1, abs_tol=1e-6):
            raise UserError(
                f"merge weights {list(weight)} sum to {total:g}; they must sum to 1 (normalize divides by the "
                "sum, strict_sum=False takes them as they are)"
            )


def resolve(setting, tensor: str, num_layers: int, what: str) -> float:
    """The number that a setting gives a tensor; `what` names the setting in errors."""
    if isinstance(setting, list | tuple) and setting and isinstance(setting[0], Mapping):
        for part in setting:
            if unknown := set(part) - {"filter", "value"}:
                raise UserError(f"{what}: {unknown.pop()!r} is unknown; allowed: filter, value")
            if _matches(part.get("filter"), tensor):
                return resolve(part.get("value"), tensor, num_layers, what)
        raise UserError(
            f"{what}: no filter matches {tensor}; end the list with a value for the rest"
        )
    if isinstance(setting, Mapping):
        return resolve([setting], tensor, num_layers, what)
    if isinstance(setting, list | tuple) and setting:
        values = [resolve(value, tensor, num_layers, what) for value in setting]
        layer = layer_of(tensor)
        # mergekit: the only layer of a model lies at the end.
        depth = 0.0 if layer is None else layer / (num_layers - 1) if num_layers > 1 else 1.0
        place = depth * (len(values) - 1)
        low = min(int(place), len(values) - 1)
        high = min(low + 1, len(values) - 1)
        return (1 - (place - low)) * values[low] + (place - low) * values[high]
    try:
        value = float(setting)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is {setting!r}; a number is expected") from error
    if isinstance(setting, bool) or not math.isfinite(value):
        raise UserError(f"{what} is {setting}; a finite number is expected")
    return value


def _matches(pattern, tensor: str) -> bool:
    if pattern is None or pattern == "*":
        return True
    if pattern in KINDS:
        return kind_of(tensor) == pattern
    if "*" in pattern or "?" in pattern:
        return fnmatch.fnmatchcase(tensor, pattern)
    return pattern in tensor


def kind_of(tensor: str) -> str:
    """attention, mlp, norm, embedding, head or "other", from the tensor's name in either format."""
    if "norm" in tensor:
        return "norm"
    if "embed" in tensor or "wte" in tensor:
        return "embedding"
    if tensor in ("head", "lm_head.weight"):
        return "head"
    if _ATTENTION.search(tensor):
        return "attention"
    return "mlp" if layer_of(tensor) is not None else "other"


def layer_of(tensor: str) -> int | None:
    found = _LAYER.search(tensor)
    return int(found.group(1)) if found else None


# ------------------------------------------------------------------------------------------- mergekit's YAML

_TOP = {
    "models", "slices", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "parameters", "rope_from",
}  # fmt: skip
_PARAMETERS = {"weight", "density", "t", "lambda", "normalize", "rescale", "int8_mask"}


def read_mergekit(path, **changes) -> MergeRecipe:
    """A merge as mergekit's YAML describes it; `rope_from` in it is lrjax's own.

    Models are directories on this machine. `slices` may take the layers of the sources where they are, not
    stack them anew. Weights of a linear merge are normalised unless the file says otherwise, as mergekit does.

    Args:
        changes: fields of `MergeRecipe` that go before what the file says.

    Raises:
        UserError: no YAML, a method or a key that lrjax does not know (never ignored), or values as at `MergeRecipe`.
    """
    import yaml

    path = pathlib.Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a YAML mapping is expected")
    _known(content, _TOP, str(path))
    method = content.get("merge_method")
    if method not in METHODS:
        raise UserError(f"{path}: merge_method is {method!r}; allowed: {', '.join(METHODS)}")
    entries, shared = _entries(content, path)
    base = content.get("base_model")
    base = None if base is None else _model(base, path)
    for entry in entries:
        _known(
            entry.get("parameters") or {}, _PARAMETERS, f"{path}: parameters of {entry['model']}"
        )
    _known(shared, _PARAMETERS, f"{path}: parameters")

    def setting(name, entry=None, default=None):
        # What a source says goes before what holds for all.
        for parameters in ((entry or {}).get("parameters") or {}, shared):
            if name in parameters:
                return parameters[name]
        return default

    others = [entry for entry in entries if METHODS[method].base is False or entry["model"] != base]
    needs_weight = method != "slerp"
    weight, density = {}, {}
    for entry in others:
        weight[entry["model"]] = setting("weight", entry, None if needs_weight else 1.0)
        density[entry["model"]] = setting("density", entry, 1.0)
        if weight[entry["model"]] is None:
            raise UserError(f"{path}: {entry['model']} has no weight")
    if method == "slerp" and setting("t", others[0] if others else None) is None:
        raise UserError(f"{path}: slerp has no t")
    fields = {
        "method": method,
        "weight": weight,
        "base": base if METHODS[method].base else None,
        "density": density,
        "t": setting("t", others[0] if others else None, 0.5),
        "scale": setting("lambda", None, 1.0),
        "normalize": setting("normalize", None, method in ("linear", *NORMALIZED)),
        "rescale": setting("rescale", None, method.startswith("dare")),
        "dtype": content.get("out_dtype") or content.get("dtype"),
        "rope_from": content.get("rope_from"),
        "tokenizer_from": _tokenizer_from(content, base, path),
    }
    return MergeRecipe(**fields | {name: v for name, v in changes.items() if v is not None})


def _entries(content: dict, path) -> tuple[list[dict], dict]:
    """The models with their parameters, and the parameters of all, of `models` or of slices that stay in place."""
    shared = content.get("parameters") or {}
    if ("models" in content) == ("slices" in content):
        raise UserError(f"{path}: one of models and slices is needed")
    if "models" in content:
        entries = content["models"] or []
    else:
        slices = content["slices"] or []
        if len(slices) != 1:
            raise UserError(
                f"{path}: {len(slices)} slices; lrjax merges layers where they are (one slice with all of them), "
                "it does not stack them anew"
            )
        _known(slices[0], {"sources", "parameters"}, f"{path}: slices")
        shared = {**shared, **(slices[0].get("parameters") or {})}
        entries = slices[0].get("sources") or []
    found = []
    for entry in entries:
        _known(entry, {"model", "parameters", "layer_range"}, f"{path}: models")
        found.append({**entry, "model": _model(entry.get("model"), path)})
    ranges = {tuple(entry["layer_range"]) for entry in found if "layer_range" in entry}
    if len(ranges) > 1 or any(start for start, _ in ranges):
        raise UserError(
            f"{path}: layer_range {sorted(ranges)}; lrjax merges all layers where they are"
        )
    for entry in found:
        if (stop := entry.get("layer_range", (0, None))[1]) is not None:
            _check_layers(entry["model"], stop, path)
    return found, shared


def _check_layers(model: str, stop: int, path) -> None:
    """A slice that leaves layers out would make another model."""
    import json

    config = pathlib.Path(model) / "config.json"
    if (
        config.is_file()
        and (there := json.loads(config.read_text()).get("num_hidden_layers", stop)) != stop
    ):
        raise UserError(
            f"{path}: layer_range of {model} ends at {stop}, the model has {there} layers"
        )


def _model(reference, path) -> str:
    name = reference
    if isinstance(reference, dict):
        name = (reference.get("model") or {}).get("path")
    if (
        not isinstance(name, str)
        or (isinstance(reference, dict) and reference.get("lora"))
        or "+" in name
    ):
        raise UserError(f"{path}: model {reference!r}; a directory is expected (no adapters)")
    return name


def _tokenizer_from(content: dict, base, path):
    source = content.get("tokenizer_source")
    if (tokenizer := content.get("tokenizer")) is not None:
        _known(tokenizer, {"source"}, f"{path}: tokenizer")
        source = tokenizer.get("source")
    if source == "base":
        return base
    if source == "union":
        raise UserError(
            f"{path}: tokenizer_source 'union' makes a new vocabulary, which lrjax does not; allowed: base, or a source"
        )
    return source


def _known(content, allowed, where: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: a mapping is expected, not {content!r}")
    if unknown := [key for key in content if key not in allowed]:
        raise UserError(
            f"{where}: {unknown[0]!r} is unknown; allowed: {', '.join(sorted(allowed))}"
        )
