"""Parity with transformers: random tiny models of every architecture with every position encoding it can carry.

    python -m benchmarks.parity --out=docs/models.md

Each cell writes a transformers model to a directory, reads it with lrjax, and compares float32 logits at plain
positions past the original window, at random increasing positions and on packed segments (with the 4D mask
written out for transformers). The figure is the largest absolute difference; the most likely token has to be the same
everywhere. For the architectures in GRADIENTS the gradient of the loss is compared too, tensor by tensor.
`tests/test_parity.py` runs the same cells.
"""

import argparse
import dataclasses
import functools
import pathlib
import tempfile

import jax
import numpy as np

WINDOW, LENGTH, FARTHEST = (
    32,
    48,
    120,
)  # the original window, tokens in a row, the last random position
TOLERANCE = 2e-4
GRADIENTS = {
    "Llama 2/3": "llama3",
    "Qwen3": "yarn",
}  # architecture: the encoding it is compared with
GRADIENT_TOLERANCE = 1e-3  # |ours - theirs| / |theirs| of every tensor
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
GRADIENTS_BEGIN, GRADIENTS_END = "<!-- gradients: begin -->", "<!-- gradients: end -->"

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW,
    "initializer_range": 0.2, "tie_word_embeddings": False, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

# Name: (transformers' model_type, what differs from SHAPE).
ARCHITECTURES = {
    "Llama 2/3": ("llama", {}),
    "Llama 3.2, SmolLM2 (tied)": ("llama", {"tie_word_embeddings": True}),
    "Mistral v0.1 (window)": ("mistral", {"sliding_window": 20}),
    "Mistral v0.3": ("mistral", {"sliding_window": None}),
    "Qwen2/2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Gemma 3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 20, "tie_word_embeddings": True, "query_pre_attn_scalar": 24,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi 3/4 (partial rotary)": (
        "phi3",
        # Its config has the original window once more, 4,096 if nothing is said, and that counts.
        {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "original_max_position_embeddings": WINDOW},
    ),
}  # fmt: skip

ENCODINGS = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "ABF": {"rope_type": "default", "rope_theta": 48900.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
             "original_max_position_embeddings": WINDOW, "beta_fast": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": WINDOW},
    "longrope": {"rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0,
                 "original_max_position_embeddings": WINDOW},
}  # fmt: skip


def carries(architecture: str, encoding: str) -> bool:
    """Phi 3 knows plain RoPE and LongRoPE only (transformers refuses the others)."""
    kind = ARCHITECTURES[architecture][0]
    return kind != "phi3" or encoding in ("default", "ABF", "longrope")


def cells() -> list[tuple[str, str]]:
    return [(a, e) for a in ARCHITECTURES for e in ENCODINGS if carries(a, e)]


def make_model(architecture: str, encoding: str, **more):
    """A random transformers model in float32, with norms and biases that are not the trivial ones.

    `more`: fields of its config that differ from the architecture's here.
    """
    import torch
    import transformers

    kind, changes = ARCHITECTURES[architecture]
    shape = {**SHAPE, **changes, **more}
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    rope = dict(ENCODINGS[encoding])
    if encoding == "longrope":
        h = int(head_dim * shape.get("partial_rotary_factor", 1.0)) // 2
        rope["short_factor"] = np.linspace(1.0, 1.5, h).tolist()
        rope["long_factor"] = np.linspace(1.2, 4.0, h).tolist()
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 50.0}
        rope = {"full_attention": rope, "sliding_attention": local}
    config = transformers.AutoConfig.for_model(kind, **shape, rope_parameters=rope)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, positions and segment ids, [2, LENGTH] each. Both rows end at the same position, since transformers
    takes the largest of the batch where an encoding depends on the length, and lrjax each row's own."""
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, SHAPE["vocab_size"], (2, LENGTH))
    ones_BL = np.ones((2, LENGTH), np.int64)
    plain_BL = np.broadcast_to(np.arange(LENGTH), (2, LENGTH)).copy()
    gaps_BL = np.stack(
        [
            np.append(np.sort(rng.choice(FARTHEST, LENGTH - 1, replace=False)), FARTHEST)
            for _ in (0, 1)
        ]
    )
    cuts = (11, 7)
    segments_BL = np.stack([1 + (np.arange(LENGTH) >= cut) for cut in cuts])
    packed_BL = np.stack([np.r_[np.arange(cut), np.arange(LENGTH - cut)] for cut in cuts])
    packed_BL[:, -1] = LENGTH
    return {
        "plain": (tokens_BL, plain_BL, ones_BL),
        "random": (tokens_BL, gaps_BL, ones_BL),
        "packed": (tokens_BL, packed_BL, segments_BL),
    }


def their_logits(model, tokens_BL, positions_BL, segments_BL):
    """transformers with its masks written out: causal, same segment, and the window of a sliding layer.

    Returns a torch tensor, with a graph behind it unless `torch.no_grad()` is in force.
    """
    import torch

    config = model.config
    # transformers' dynamic NTK keeps the base of the longest input so far; every call here is to be the first.
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, WINDOW)
    index = np.arange(LENGTH)
    seen = (index <= index[:, None]) & (segments_BL[:, :, None] == segments_BL[:, None, :])

    def mask(seen_BLS):
        return torch.tensor(np.where(seen_BLS, 0.0, np.finfo(np.float32).min))[:, None].float()

    window = getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (index > index[:, None] - window)
    if config.model_type == "gemma3_text":
        masks = {"full_attention": mask(seen), "sliding_attention": mask(near)}
    else:
        masks = mask(near)
    return model(
        torch.tensor(tokens_BL),
        position_ids=torch.tensor(positions_BL),
        attention_mask=masks,
        use_cache=False,
    ).logits


@functools.lru_cache(maxsize=2)
def _run(config):
    """One compiled model for an architecture; the encodings come in as angles."""
    from lrjax.models import head
    from lrjax.models.llama import Llama

    def run(params, tokens_BL, angles, segments_BL):
        x_BLD = Llama(config).apply(
            {"params": params}, tokens_BL, angles, segments_BL, method="run"
        )
        return head.logits(params, x_BLD)

    return jax.jit(run)


def compare(architecture: str, encoding: str, directory) -> dict:
    """{"difference": by input, "top1": whether the likeliest token is the same everywhere}."""
    import torch

    from lrjax.checkpoints import huggingface
    from lrjax.models.llama import model_angles
    from lrjax.models.rope import PLAIN

    model = make_model(architecture, encoding)
    model.save_pretrained(directory)
    config, params = huggingface.load(directory)
    config = dataclasses.replace(config, dtype="float32")
    plain = dataclasses.replace(
        config, rope_scaling=PLAIN, rope_theta=1.0, max_position_embeddings=1
    )
    differences, top1 = {}, True
    for name, (tokens_BL, positions_BL, segments_BL) in inputs().items():
        angles = model_angles(config, positions_BL)
        ours = np.asarray(_run(plain)(params, tokens_BL, angles, segments_BL))
        with torch.no_grad():
            theirs = their_logits(model, tokens_BL, positions_BL, segments_BL).numpy()
        differences[name] = float(np.abs(ours - theirs).max())
        # Where the likeliest token differs, the two candidates have to be tied within the tolerance.
        top1 = top1 and bool((ours.argmax(-1) == theirs.argmax(-1)).all())
    return {"difference": differences, "top1": top1}


def compare_gradients(architecture: str, directory) -> dict:
    """{input: {tensor: relative error}} of the gradient of the mean cross-entropy of the next token.

    The error of a tensor is the norm of the difference over the norm of torch's gradient. The names are the file's.
    """
    import torch

    from lrjax.checkpoints import families, huggingface
    from lrjax.checkpoints.tensors import scatter
    from lrjax.models import head
    from lrjax.models.llama import Llama

    model = make_model(architecture, GRADIENTS[architecture])
    model.save_pretrained(directory)
    config, params = huggingface.load(directory)
    config = dataclasses.replace(config, dtype="float32")
    names = families.tensor_names(config)

    @jax.jit
    @jax.grad
    def gradient(params, tokens_BL, positions_BL, segments_BL):
        x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segments_BL)
        weights_BL = np.ones(tokens_BL[:, 1:].shape, np.float32)
        loss = head.weighted_cross_entropy(params, x_BLD[:, :-1], tokens_BL[:, 1:], weights_BL)[0]
        return loss / weights_BL.size

    errors = {}
    for name, (tokens_BL, positions_BL, segments_BL) in inputs().items():
        model.zero_grad()
        logits_BLV = their_logits(model, tokens_BL, positions_BL, segments_BL)[:, :-1]
        targets_N = torch.tensor(tokens_BL[:, 1:]).flatten()
        torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_N).backward()
        theirs = {key: value.grad.numpy() for key, value in model.named_parameters()}
        ours = scatter(
            config, jax.device_get(gradient(params, tokens_BL, positions_BL, segments_BL))
        )
        errors[name] = {
            key: float(
                np.linalg.norm(np.concatenate([ours[slot].all() for slot in slots]) - theirs[key])
                / np.linalg.norm(theirs[key])
            )
            for key, slots in names.items()
        }
    return errors


def gradient_table(results: dict) -> str:
    lines = ["| architecture, encoding | plain | random | packed |", "|---|---|---|---|"]
    for architecture, errors in results.items():
        worst = " | ".join(f"{max(tensors.values()):.1e}" for tensors in errors.values())
        lines.append(f"| {architecture}, {GRADIENTS[architecture]} | {worst} |")
    return "\n".join(lines)


def table(results: dict) -> str:
    lines = [
        "| architecture | " + " | ".join(ENCODINGS) + " |",
        "|---" * (len(ENCODINGS) + 1) + "|",
    ]
    for architecture in ARCHITECTURES:
        row = []
        for encoding in ENCODINGS:
            cell = results.get((architecture, encoding))
            if cell is None:
                row.append("-")
                continue
            worst = max(cell["difference"].values())
            row.append(f"{worst:.1e}" + ("" if cell["top1"] else " (top-1 differs)"))
        lines.append(f"| {architecture} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="Markdown file whose table is renewed.")
    out = parser.parse_args().out
    results = {}
    for cell in cells():
        with tempfile.TemporaryDirectory() as directory:
            results[cell] = compare(*cell, directory)
        print(*cell, results[cell], flush=True)
    gradients = {}
    for architecture in GRADIENTS:
        with tempfile.TemporaryDirectory() as directory:
            gradients[architecture] = compare_gradients(architecture, directory)
    print(table(results), gradient_table(gradients), sep="\n\n")
    if out is not None:
        text = replaced(out.read_text(), BEGIN, END, table(results))
        text = replaced(text, GRADIENTS_BEGIN, GRADIENTS_END, gradient_table(gradients))
        out.write_text(text)


def replaced(text: str, begin: str, end: str, content: str) -> str:
    """The text with what stands between two marks replaced."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
