"""Train a KVzap surrogate: run an oracle over texts, then fit one small network per layer to its verdicts
(KVzap, arXiv 2601.07891, section 3).

Shapes: `Hkv` key-value heads, `n` tokens to learn from.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sysconfig
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from .. import __version__, hf
from ..errors import DataError, PolicyError
from ..surrogates import KVzapSurrogate, SurrogateShape
from ._kvzap_oracle import KVzapTargets, listen, listening
from .data import Document

__all__ = ["INSTRUCTION", "standard_library_docstrings", "train_kvzap"]

INSTRUCTION = "\n\nRepeat the previous context exactly.\n"
KINDS = ("mlp", "linear")
MIN_TOKENS = 32
BATCH_SIZE = 512
RIDGE = 1.0
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def train_kvzap(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    output_dir: str | Path,
    *,
    kind: str = "mlp",
    hidden_dim: int = 512,
    epochs: int = 15,
    lr: float = 5e-3,
    window_tokens: int = 1024,
    tokens_per_text: int = 500,
    max_texts: int = 500,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a surrogate for `model` and write it to `output_dir`, with `training.json` beside it.

    Texts are cut to windows that fit twice into the model's positions, and each window is a sample of its own. A tenth
    of the texts is held out for the measurements. About `max_texts * tokens_per_text * hidden size * layers` numbers
    are kept in main memory, in the model's dtype. The model stays as and where it is.

    Args:
        model: a decoder-only model in evaluation mode.
        tokenizer: its tokenizer.
        texts: what to learn from; not what the surrogate will be judged on.
        output_dir: folder for `config.json`, `model.safetensors` and `training.json`.
        kind: `"mlp"` (AdamW, cosine schedule, gradients clipped at 1, mean squared error) or `"linear"` (ridge
            regression in closed form).
        hidden_dim: units of the mlp's hidden layer.
        epochs, lr: of the mlp.
        window_tokens: tokens of a window, at most; shorter than 32 is left out.
        tokens_per_text: how many of a window's tokens to learn from, drawn at random; its first one is always there.
        max_texts: windows, at most. One from every text comes first.
        seed: of the draws and of the mlp's first weights.
        device: where to fit the surrogate; by default where the model is.
        progress: show progress bars.

    Returns:
        What `training.json` holds: the settings, and on held-out tokens, averaged over heads, R^2 (`r2`) and Pearson
        correlation with the target (`correlation`), that of the negative key norm (`knorm_correlation`), and the
        scores below which a share of the tokens lies (`score_quantiles`), from which to choose a threshold.

    Raises:
        DataError: too little text to learn from and to hold out, or a folder that cannot be written.
        PolicyError: a setting outside its range.
        UnsupportedModelError: the model's cache cannot be managed, or its output projection cannot be read.
        UnsupportedOperationError: the model is in training mode.
    """
    began = time.perf_counter()
    counts = {"hidden_dim": hidden_dim, "epochs": epochs, "tokens_per_text": tokens_per_text, "max_texts": max_texts}
    if kind not in KINDS:
        raise PolicyError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if min(counts.values()) < 1 or lr <= 0 or window_tokens < MIN_TOKENS:
        raise PolicyError(
            f"{', '.join(counts)} must be 1 or more, lr above 0 and window_tokens {MIN_TOKENS} or more; they are "
            f"{', '.join(str(v) for v in (*counts.values(), lr, window_tokens))}"
        )
    draw = torch.Generator().manual_seed(seed)
    config = hf.text_config(model)
    begin, instruction = _frame(tokenizer)
    room = getattr(config, "max_position_embeddings", None) or 2 * window_tokens + 64
    longest = min(window_tokens, (room - len(begin) - len(instruction)) // 2)
    windows = _windows(tokenizer, texts, longest, max_texts, draw)
    folder = _make_folder(output_dir)
    train, held_out = (
        _collect(model, part, begin, instruction, tokens_per_text, draw, f"{name} targets", progress)
        for name, part in zip(("training", "held-out"), _split(windows, draw), strict=True)
    )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    hidden = hidden_dim if kind == "mlp" else None
    shape = SurrogateShape(config.hidden_size, heads, hidden, config.num_hidden_layers)
    where = torch.device(model.device if device is None else device)
    surrogate = _fit(shape, train, epochs, lr, seed, where, progress)
    surrogate.save(folder)
    predicted = {i: surrogate.score(i, x.hidden[None].to(where).float())[0].T.cpu() for i, x in held_out.items()}
    layers = [{"layer": i, **_quality(predicted[i], held_out[i])} for i in sorted(predicted)]
    scores = torch.cat([p.flatten() for p in predicted.values()]).sort().values
    record = {
        "model": _name_of(model),
        "kind": kind,
        "hidden_dim": hidden,
        "training": {"epochs": epochs, "lr": lr, "batch_size": BATCH_SIZE} if hidden else {"ridge": RIDGE},
        "seed": seed,
        "instruction": INSTRUCTION,
        "window_tokens": longest,
        "tokens_per_text": tokens_per_text,
        "windows": len(windows),
        "tokens": {name: len(next(iter(part.values())).hidden) for name, part in
                   (("training", train), ("held_out", held_out))},
        "data_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "held_out": {key: _mean([layer[key] for layer in layers]) for key in MEASURES},
        "layers": layers,
        "score_quantiles": {str(q): round(float(scores[int(q * (len(scores) - 1))]), 4) for q in QUANTILES},
        "device": str(where),
        "versions": {
            "kvsieve": __version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
            "python": platform.python_version(),
        },
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _make_folder(output_dir: str | Path) -> Path:
    """Before the work rather than after it, so that a wrong name costs nothing."""
    folder = Path(output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made a folder for the surrogate: {error.strerror}") from None
    return folder


def _name_of(model: PreTrainedModel) -> str:
    """The model's Hub id; of a local one, the name of its folder."""
    name = str(model.config.name_or_path)
    return Path(name).name if Path(name).is_dir() else name


def _frame(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids that come before a text, and between it and its repetition."""
    begin = tokenizer.bos_token_id
    own = begin is not None and tokenizer("")["input_ids"][:1] == [begin]
    instruction = tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"]
    return torch.tensor([begin] if own else [], dtype=torch.long), torch.tensor(instruction, dtype=torch.long)


def _windows(
    tokenizer: Any, texts: Sequence[str], longest: int, count: int, draw: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Up to `count` pieces of text `[<= longest]` with the index of their text; first one of every text, then more."""
    found: list[tuple[int, int, Tensor]] = []
    used = 0
    for index in torch.randperm(len(texts), generator=draw).tolist():
        ids = tokenizer(texts[index], add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [p for p in torch.tensor(ids, dtype=torch.long).split(max(longest, 1)) if len(p) >= MIN_TOKENS]
        found += [(rank, index, piece) for rank, piece in enumerate(pieces)]
        used += bool(pieces)
        if used == count:
            break
    if len(found) < 2:
        raise DataError(
            f"there is too little text: {len(texts)} text(s) give {len(found)} window(s) of {MIN_TOKENS} to {longest} "
            "tokens, and at least two are needed, one to learn from and one to hold out"
        )
    found.sort(key=lambda entry: entry[0])
    return [(index, piece) for _, index, piece in found[:count]]


def _split(windows: list[tuple[int, Tensor]], draw: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to learn from and windows to hold out: whole texts, or parts of it if there is only one text."""
    owners = [index for index, _ in windows]
    if len(set(owners)) == 1:
        owners = list(range(len(windows)))
    names = list(dict.fromkeys(owners))
    chosen = torch.randperm(len(names), generator=draw)[: max(1, len(names) // 10)].tolist()
    held_out = {names[i] for i in chosen}
    train = [piece for owner, (_, piece) in zip(owners, windows, strict=True) if owner not in held_out]
    return train, [piece for owner, (_, piece) in zip(owners, windows, strict=True) if owner in held_out]


def _collect(
    model: PreTrainedModel,
    windows: list[Tensor],
    begin: Tensor,
    instruction: Tensor,
    count: int,
    draw: torch.Generator,
    title: str,
    progress: bool,
) -> dict[int, KVzapTargets]:
    """By layer, `hidden` `[n, hidden]`, `target` and `key_norm` `[n, Hkv]` of up to `count` tokens per window."""
    rows: dict[int, list[KVzapTargets]] = {}
    with listening(model) as (cache, oracle):
        for window in tqdm(windows, desc=title, disable=not progress):
            listen(model, cache, window, instruction, begin)
            # the first token is what every head sinks its attention into, and there is only one of it
            others = 1 + torch.randperm(len(begin) + len(window) - 1, generator=draw)[: count - 1]
            chosen = torch.cat([torch.zeros(1, dtype=torch.long), others]).to(model.device)
            for index, layer in oracle.found.items():
                part = KVzapTargets(
                    layer.hidden[chosen].cpu(), layer.target.T[chosen].cpu(), layer.key_norm.T[chosen].cpu()
                )
                rows.setdefault(index, []).append(part)
    return {
        index: KVzapTargets(
            torch.cat([p.hidden for p in parts]),
            torch.cat([p.target for p in parts]),
            torch.cat([p.key_norm for p in parts]),
        )
        for index, parts in rows.items()
    }


def _fit(
    shape: SurrogateShape,
    samples: dict[int, KVzapTargets],
    epochs: int,
    lr: float,
    seed: int,
    device: torch.device,
    progress: bool,
) -> KVzapSurrogate:
    """A surrogate fitted to the targets of every layer; zeros for layers that have none."""
    with torch.device("meta"):
        surrogate = KVzapSurrogate(shape)
    surrogate.to_empty(device=device)
    for parameter in surrogate.parameters():
        nn.init.zeros_(parameter)
    for index in tqdm(sorted(samples), desc="surrogate layers", disable=not progress):
        x, y = samples[index].hidden.to(device).float(), samples[index].target.to(device)
        hidden = shape.hidden_dim
        fitted = _fit_linear(x, y) if hidden is None else _fit_mlp(x, y, hidden, epochs, lr, seed + index)
        surrogate.layers[index].load_state_dict(fitted)
    return surrogate


def _fit_linear(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Ridge regression of `y` `[n, Hkv]` on `x` `[n, hidden]`; the constant is not penalized."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred + RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y)).T
    return {"weight": weight.float(), "bias": (mean_y - weight @ mean_x).float()}


def _fit_mlp(x: Tensor, y: Tensor, hidden_dim: int, epochs: int, lr: float, seed: int) -> dict[str, Tensor]:
    """Fit `y` `[n, Hkv]` from `x` `[n, hidden]`, both standardized, which is folded into the weights afterwards."""
    mean_x, scale_x = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    mean_y, scale_y = y.mean(0), y.std(0, correction=0).clamp_min(1e-6)
    inputs, targets = (x - mean_x) / scale_x, (y - mean_y) / scale_y
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(x.shape[1], hidden_dim), nn.Linear(hidden_dim, y.shape[1])
    network = nn.Sequential(first, nn.GELU(), last).to(x.device)
    steps = epochs * -(-len(x) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).to(x.device).split(BATCH_SIZE):
            optimizer.zero_grad()
            mse_loss(network(inputs[batch]), targets[batch]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        weight = first.weight.double() / scale_x
        return {
            "0.weight": weight.float(),
            "0.bias": (first.bias.double() - weight @ mean_x.double()).float(),
            "2.weight": last.weight * scale_y[:, None],
            "2.bias": last.bias * scale_y + mean_y,
        }


# ---- measuring

MEASURES = ("r2", "correlation", "knorm_correlation")


def _quality(predicted: Tensor, sample: KVzapTargets) -> dict[str, float]:
    """Measures of `predicted` `[n, Hkv]`, averaged over heads."""
    target = sample.target
    error, spread = (predicted - target).square().sum(0), (target - target.mean(0)).square().sum(0)
    return {
        "r2": _mean((1 - error / spread.clamp_min(1e-12)).tolist()),
        "correlation": _mean(_correlation(predicted, target).tolist()),
        "knorm_correlation": _mean(_correlation(-sample.key_norm, target).tolist()),
        "target_mean": _mean(target.mean(0).tolist()),
        "target_std": _mean(target.std(0, correction=0).tolist()),
    }


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation along the first dimension."""
    a, b = a.double() - a.double().mean(0), b.double() - b.double().mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


# ---- text that every Python brings


def standard_library_docstrings(min_chars: int = 2000, max_samples: int | None = None) -> list[Document]:
    """Docstrings of the Python standard library, one document per module, in alphabetical order of modules.

    Sources are parsed, never imported. The language reference (`pydoc_data`), on which methods are compared by
    default, is left out, and so are tests. The text belongs to the interpreter that runs this.

    Args:
        min_chars: leave out modules with less.
        max_samples: stop after this many documents.

    Raises:
        DataError: this Python comes without the sources of its library, or nothing is long enough.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"pydoc_data", "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    documents: list[Document] = []
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if skipped & set(place.parts[:-1]) or place.name in ("antigravity.py", "this.py"):
            continue
        text = _docstrings(file)
        if len(text) >= min_chars:
            documents.append(Document(".".join(place.with_suffix("").parts), text))
        if len(documents) == max_samples:
            break
    if not documents:
        raise DataError(
            f"Python {platform.python_version()} comes without the sources of its standard library (or no module has "
            f"{min_chars} characters of docstrings); give a JSONL file with --data instead"
        )
    return documents


def _docstrings(file: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ""  # templates with a .py name
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return "\n\n".join(dict.fromkeys(text for text in found if text))
