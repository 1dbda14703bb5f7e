"""Methods of merging: functions of one tensor from each source, in float32.

    merged = linear([a, b], [0.5, 0.5])
    merged = ties(base, [a, b], [0.5, 0.5], density=[0.2, 0.2])

| method | what it gives | source |
|---|---|---|
| linear | sum_i w_i x_i | Wortsman et al. 2022, arXiv 2203.05482 (model soups); LongRecipe: half and half |
| slerp | the great circle between two directions | Shoemake 1985, doi 10.1145/325334.325242 |
| task_arithmetic | x_0 + lambda sum_i w_i (x_i - x_0) | Ilharco et al. 2022, arXiv 2212.04089 |
| ties | the same of trimmed differences whose sign is elected | Yadav et al. 2023, arXiv 2306.01708 |
| dare_linear, dare_ties | the same of differences thinned at random, rescaled | Yu et al. 2023, arXiv 2311.03099 |

Each is written as two steps, so that a tensor larger than the memory can go through in blocks: `prepare` looks at all
blocks and returns what has to be known of the whole tensor (a norm, a threshold), `combine` makes a block of the
result. The functions by name do both on whole arrays. Where the papers leave a choice, it is that of mergekit, and
the docstring says so.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# A part of every source: where in the flattened tensor it starts, and the base first where a method has one.
Block = tuple[int, list[np.ndarray]]
# All blocks in order; `sample=True`: some from all over the tensor.
Blocks = Callable[..., Iterator[Block]]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of one tensor, as all methods take them.

    Attributes:
        weight: one for each source but the base.
        density: share of the differences that is kept, one for each source but the base.
        t: slerp: 0 is the base, 1 the other source.
        scale: lambda, on the sum of the differences.
        normalize: divide by the sum of the weights (ties: of those that agree with the elected sign).
        rescale: dare: divide what is kept by the density.
        seed: dare: together with the tensor's name, what the draw depends on, and nothing else.
    """

    weight: tuple[float, ...] = ()
    density: tuple[float, ...] = ()
    t: float = 0.5
    scale: float = 1.0
    normalize: bool = False
    rescale: bool = True
    seed: int = 0


# ------------------------------------------------------------------------------------------- linear


class Linear:
    """sum_i w_i x_i; the order of the sources changes no bit, a weight of 1 gives the source back."""

    base = False

    def prepare(self, blocks: Blocks, parameters: Parameters, name: str):
        return None

    def combine(self, block: Block, parameters: Parameters, prepared, name: str) -> np.ndarray:
        total = math.fsum(parameters.weight) if parameters.normalize else 1.0
        # Terms of weight 0 are left out: even -0.0 + 0.0 would change a bit.
        pairs = [(w / total, x) for w, x in zip(parameters.weight, block[1], strict=True) if w]
        if not pairs:
            return np.zeros_like(block[1][0])
        if len(pairs) == 1 and pairs[0][0] == 1:
            return pairs[0][1]
        terms = [np.float32(weight) * x for weight, x in pairs]
        if len(terms) > 2:
            _sort_network(terms)
        merged = np.add(terms[0], terms[1]) if len(terms) > 1 else terms[0]
        for term in terms[2:]:
            merged += term
        if all(w > 0 for w, _ in pairs) and math.isclose(math.fsum(w for w, _ in pairs), 1):
            # An average lies between its terms; rounding must not take it outside, so that what is the
            # same in all sources stays as it is. (maximum and minimum would do, but for the sign of zeros.)
            values = [x for _, x in pairs]
            low, high = _reduce(np.minimum, values), _reduce(np.maximum, values)
            np.copyto(merged, low, where=merged < low)
            np.copyto(merged, high, where=merged > high)
        return merged


def _sort_network(terms: list[np.ndarray]) -> None:
    """Sorts element by element over the arrays, in place: the sum then knows no order of the sources."""
    for end in range(len(terms) - 1, 0, -1):
        for i in range(end):
            swap = terms[i] > terms[i + 1]
            low = np.where(swap, terms[i + 1], terms[i])
            np.copyto(terms[i + 1], terms[i], where=swap)
            terms[i] = low


def _reduce(function, arrays):
    result = function(arrays[0], arrays[1]) if len(arrays) > 1 else arrays[0].copy()
    for array in arrays[2:]:
        function(result, array, out=result)
    return result


# ------------------------------------------------------------------------------------------- slerp


class Slerp:
    """sin((1-t) phi) / sin(phi) a + sin(t phi) / sin(phi) b, with phi the angle between a and b.

    The angle is that of the whole tensor; nearly parallel tensors (|cos| > 0.9995, as in mergekit) are averaged.
    """

    base = True
    PARALLEL = 0.9995

    def prepare(self, blocks: Blocks, parameters: Parameters, name: str):
        squares_a, squares_b, products = [], [], []
        for _, (a, b) in blocks():
            # A block is short enough for its dot product in float32; the sum over blocks is exact.
            squares_a.append(float(np.dot(a, a)))
            squares_b.append(float(np.dot(b, b)))
            products.append(float(np.dot(a, b)))
        norms = math.sqrt(math.fsum(squares_a)), math.sqrt(math.fsum(squares_b))
        cosine = math.fsum(products) / math.prod(norm if norm > 1e-8 else 1.0 for norm in norms)
        if abs(cosine) > self.PARALLEL:
            return None
        phi, t = math.acos(cosine), parameters.t
        return math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)

    def combine(self, block: Block, parameters: Parameters, prepared, name: str) -> np.ndarray:
        weights = (1 - parameters.t, parameters.t) if prepared is None else prepared
        return Linear().combine(block, Parameters(weight=weights), None, name)


# ------------------------------------------------------------------------------------------- differences to a base


class _Differences:
    """x_0 + lambda * consensus of w_i * thinned(x_i - x_0); the subclasses say how to thin."""

    base = True
    elect = False

    def __init__(self, elect: bool = False):
        self.elect = elect

    def prepare(self, blocks: Blocks, parameters: Parameters, name: str):
        return None

    def thin(self, index, start, delta, parameters, prepared, name) -> np.ndarray:
        return delta

    def combine(self, block: Block, parameters: Parameters, prepared, name: str) -> np.ndarray:
        start, (base, *others) = block
        deltas = []
        for index, x in enumerate(others):
            delta = self.thin(index, start, np.subtract(x, base), parameters, prepared, name)
            delta *= np.float32(parameters.weight[index])
            deltas.append(delta)
        weights = [np.float32(w) for w in parameters.weight]
        mixed = deltas[0].copy()
        for delta in deltas[1:]:
            mixed += delta
        if self.elect:
            # The sign of the larger sum wins, a sum of 0 counts as positive; what points elsewhere is left out.
            # As integers, floats that point the elected way are over 0 once their sign is turned by the elected one.
            sign = (mixed + np.float32(0)).view(np.int32) & np.int32(-(1 << 31))
            mixed, divisor = np.zeros_like(base), np.zeros_like(base)
            for weight, delta in zip(weights, deltas, strict=True):
                turned = delta.view(np.int32)
                turned ^= sign
                if parameters.normalize:
                    divisor += (turned > 0).astype(np.float32) * weight
                mixed += np.maximum(turned, 0, out=turned).view(np.float32)
            turned = mixed.view(np.int32)
            turned ^= sign
            divisor += divisor == 0
        else:
            divisor = sum(weights, start=np.float32(0))
            divisor = divisor if abs(divisor) >= 1e-8 else np.float32(1)
        if parameters.normalize:
            mixed /= divisor
        if parameters.scale != 1:
            mixed *= np.float32(parameters.scale)
        merged = np.add(base, mixed, out=mixed)
        # -0.0 + 0.0 is 0.0, but where nothing changes, not even the sign of a zero shall.
        if (zero := merged == 0).any():
            np.copyto(merged, base, where=zero & (base == 0))
        return merged


class TaskArithmetic(_Differences):
    """x_0 + lambda sum_i w_i (x_i - x_0)."""


class Ties(_Differences):
    """Trim, elect sign, disjoint merge: of every difference the `density` largest in magnitude.

    Exactly max(1, floor(density * size)) elements are kept, as in mergekit. Which of several elements of the
    threshold's magnitude are among them is open in the paper: they are taken evenly spread over the tensor.
    """

    def __init__(self):
        super().__init__(elect=True)

    def prepare(self, blocks: Blocks, parameters: Parameters, name: str):
        searches = {
            i: _Search(density) for i, density in enumerate(parameters.density) if 0 < density < 1
        }
        while open_ := {i: search for i, search in searches.items() if search.trim is None}:
            samples: dict[int, list] = {i: [] for i in open_}
            for _, (base, *others) in blocks(sample=True):
                for i in open_:
                    step = max(8, base.size >> 16)
                    samples[i].append(_magnitude_bits(others[i][::step] - base[::step]))
            for i, search in open_.items():
                search.guess(np.concatenate(samples[i]))
            for _, (base, *others) in blocks():
                for i, search in open_.items():
                    search.count(_magnitude_bits(others[i] - base))
            for search in open_.values():
                search.conclude()
        return [searches[i].trim if i in searches else None for i in range(len(parameters.weight))]

    def thin(self, index, start, delta, parameters, prepared, name) -> np.ndarray:
        if parameters.density[index] >= 1:
            return delta
        if prepared[index] is None:
            return np.zeros_like(delta)
        delta *= prepared[index].mask(delta)
        return delta


def _magnitude_bits(delta: np.ndarray) -> np.ndarray:
    return delta.view(np.int32) & 0x7FFFFFFF


class _Search:
    """Finds the threshold that keeps a density of a tensor's differences, neither sorting nor holding the tensor.

    A float32's bits without its sign grow with its magnitude. The bits of the threshold lie in [low, high). A sample
    says in which part of it they probably lie; a pass counts the elements of that part and over it, and holds the
    part if it is small: then the threshold is among few. Whatever the sample was, the counts are exact, and the next
    pass goes on with what is left.
    """

    HELD = 1 << 20  # elements, or a sixteenth of the tensor

    def __init__(self, density: float):
        self.density = density
        self.low, self.high = 0, 1 << 31
        self.rank = (
            0  # the threshold is the rank-th largest of all, from 1 on; 0 before the first pass
        )
        self.over, self.inside = 0, 0  # how many there are from `high` on, and in [low, high)
        self.trim: _Trim | None = None

    def guess(self, sample: np.ndarray) -> None:
        """[from_, to), the part that a pass looks at."""
        sample = np.sort(sample[(sample >= self.low) & (sample < self.high)])
        share = (self.rank - self.over) / self.inside if self.rank else self.density
        place = len(sample) * (1 - share)
        # Four standard deviations; and neighbours in a tensor are alike, so that the sample knows less than it counts.
        margin = 4 * math.sqrt(len(sample)) + len(sample) / 256
        first, last = math.floor(place - margin), math.ceil(place + margin)
        self.from_ = int(sample[first]) if 0 <= first < len(sample) else self.low
        self.to = int(sample[last]) + 1 if last < len(sample) else self.high
        if self.rank and self.to - self.from_ == self.high - self.low > 1:
            self.to = (self.low + self.high) // 2  # the sample does not help
        self.seen, self.at_least, self.between = 0, 0, 0
        self.held: list[np.ndarray] | None = []

    def count(self, bits: np.ndarray) -> None:
        self.seen += bits.size
        self.at_least += np.count_nonzero(bits >= self.to)
        offset = (bits - np.int32(self.from_)).view(np.uint32)  # what lies below wraps around
        part = offset < np.uint32(self.to - self.from_)
        self.between += np.count_nonzero(part)
        if self.held is not None and self.to - self.from_ > 1:
            self.held.append(bits[part])
            if self.between > max(self.HELD, self.seen // 16):
                self.held = None

    def conclude(self) -> None:
        if not self.rank:
            self.rank, self.inside = max(1, math.floor(self.density * self.seen)), self.seen
        rest = self.rank - self.at_least  # its rank in [from_, to) and below
        if rest <= 0:
            self.low, self.inside = self.to, self.at_least - self.over
        elif rest > self.between:
            self.inside -= self.between + self.at_least - self.over
            self.high, self.over = self.from_, self.at_least + self.between
        elif self.to - self.from_ == 1:
            self.trim = _Trim(self.from_, self.between, rest)
        elif self.held is not None:
            bits = np.concatenate(self.held)
            bits.sort()
            threshold = bits[-rest]
            first, after = (
                np.searchsorted(bits, threshold),
                np.searchsorted(bits, threshold, "right"),
            )
            self.trim = _Trim(int(threshold), int(after - first), rest - int(len(bits) - after))
        else:
            self.low, self.high = self.from_, self.to
            self.over, self.inside = self.at_least, self.between
        self.held = None


@dataclasses.dataclass
class _Trim:
    """What is kept of a difference: magnitudes over the threshold, and `kept` of the `ties` at it.

    Blocks have to come in order: it counts the ties that it has seen.
    """

    threshold: int
    ties: int
    kept: int
    seen: int = 0

    def mask(self, delta: np.ndarray) -> np.ndarray:
        bits = _magnitude_bits(delta)
        mask = bits > self.threshold
        tied = np.flatnonzero(bits == self.threshold)
        # The m-th that is kept, from 1 on, is the one of number ceil(m ties / kept).
        before = self.seen
        self.seen += len(tied)
        wanted = np.arange(
            before * self.kept // self.ties + 1, self.seen * self.kept // self.ties + 1
        )
        mask[tied[-(-wanted * self.ties // self.kept) - 1 - before]] = True
        return mask


class Dare(_Differences):
    """Drops every element of a difference with probability 1 - density, and divides the rest by the density.

    The draw of an element depends on the seed, the tensor's name, the number of the source and the element's
    index: not on the order of the tensors, on blocks or threads.
    """

    def thin(self, index, start, delta, parameters, prepared, name) -> np.ndarray:
        density = parameters.density[index]
        if density >= 1:
            return delta
        words = _random_words(f"{parameters.seed}/{index}/{name}", start, delta.size)
        delta *= words < np.uint32(min(density * 2**32, 2**32 - 1))
        if parameters.rescale and density > 0:
            delta /= np.float32(density)
        return delta


def _random_words(key: str, start: int, count: int) -> np.ndarray:
    """Words start to start + count of the uint32 stream of a key (Philox: any part can be had by itself)."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    generator.advance(start // 8)  # a step of its counter gives four words of 64 bits
    words = generator.random_raw((start % 8 + count + 7) // 8 * 4).view(np.uint32)
    return words[start % 8 : start % 8 + count]


METHODS = {
    "linear": Linear(),
    "slerp": Slerp(),
    "task_arithmetic": TaskArithmetic(),
    "ties": Ties(),
    "dare_linear": Dare(),
    "dare_ties": Dare(elect=True),
}
# What mergekit assumes where its user says nothing.
NORMALIZED = ("ties",)


# ------------------------------------------------------------------------------------------- whole tensors


def merge_tensors(method: str, tensors: Sequence, parameters: Parameters, name: str = ""):
    """One tensor from each source (the base first, where the method has one) to the merged one, float32."""
    arrays = [np.asarray(tensor, np.float32) for tensor in tensors]
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    chosen = METHODS[method]
    prepared = chosen.prepare(lambda sample=False: iter([(0, flat)]), parameters, name)
    return chosen.combine((0, flat), parameters, prepared, name).reshape(arrays[0].shape)


def linear(tensors, weights, normalize: bool = False):
    """sum_i w_i x_i, divided by the sum of the weights if `normalize`."""
    return merge_tensors("linear", tensors, Parameters(tuple(weights), normalize=normalize))


def slerp(a, b, t: float):
    """From a (t = 0) to b (t = 1) on the great circle through their directions."""
    return merge_tensors("slerp", [a, b], Parameters(t=t))


def task_arithmetic(base, tensors, weights, scale: float = 1.0, normalize: bool = False):
    """base + scale * sum_i w_i (x_i - base)."""
    parameters = Parameters(tuple(weights), scale=scale, normalize=normalize)
    return merge_tensors("task_arithmetic", [base, *tensors], parameters)


def ties(base, tensors, weights, density, scale: float = 1.0, normalize: bool = True):
    """base + scale * the weighted mean of the trimmed differences that point where most of the weight does."""
    parameters = Parameters(tuple(weights), tuple(density), scale=scale, normalize=normalize)
    return merge_tensors("ties", [base, *tensors], parameters)


def dare(
    base, tensors, weights, density, seed: int = 0, *, elect: bool = False, name: str = "", **more
):
    """base + sum_i w_i (x_i - base), thinned to the density at random; `elect`: with the signs of TIES."""
    parameters = Parameters(tuple(weights), tuple(density), seed=seed, **more)
    return merge_tensors(
        "dare_ties" if elect else "dare_linear", [base, *tensors], parameters, name
    )
