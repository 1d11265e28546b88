"""Training of KVzap surrogates: the oracle against its definition, what is learned, and a model left as it was."""

from __future__ import annotations

import json
import sys
import sysconfig

import pytest
import torch
from transformers import DynamicCache

import kvsieve
import models
from kvsieve import hf
from kvsieve.errors import DataError, PolicyError, UnsupportedModelError, UnsupportedOperationError
from kvsieve.surrogates import KVzapSurrogate, SurrogateShape
from kvsieve.text._kvzap_oracle import kvzap_targets
from kvsieve.text.data import Document, python_reference
from kvsieve.text.train_kvzap import INSTRUCTION, standard_library_docstrings, train_kvzap

BEGIN, TEXT, ASK = torch.tensor([1]), models.words(1, 40)[0], models.words(1, 6, seed=2)[0]


@pytest.fixture(scope="module")
def mini_lm():
    return kvsieve.zoo.load("mini-lm")


@pytest.fixture(scope="module")
def docstrings() -> list[Document]:
    return standard_library_docstrings()


@pytest.fixture(scope="module")
def texts(docstrings) -> list[str]:
    """The beginnings of many modules' docstrings."""
    return [document.text[:1500] for document in docstrings]


@pytest.fixture(scope="module")
def trained(mini_lm, texts, tmp_path_factory):
    """By kind, the folder and the measurements."""
    found = {}
    for kind in ("linear", "mlp"):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = (folder, train_kvzap(*mini_lm, texts, folder, kind=kind, **QUICK))
    return found


QUICK = {"hidden_dim": 32, "epochs": 8, "window_tokens": 160, "max_texts": 24, "progress": False}


# ---- the oracle


def naive_targets(model, begin: torch.Tensor, text: torch.Tensor, instruction: torch.Tensor) -> dict[int, torch.Tensor]:
    """By layer `[Hkv, S + T]`: the formula, on the whole attention matrix of one forward pass, key by key."""
    ids = torch.cat([begin, text, instruction, text])[None]
    first, repeated = len(begin) + len(text), len(text)
    hidden, hooks, modules = {}, [], hf.attention_modules(model)
    for module in modules.values():
        hooks.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs: hidden.update({m.layer_idx: (*args, kwargs.get("hidden_states"))[0]}),
                with_kwargs=True,
            )
        )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(ids, past_key_values=cache, output_attentions=True)
    for hook in hooks:
        hook.remove()
    targets = {}
    for index, module in modules.items():
        attention, values = out.attentions[index][0].double(), cache.layers[index].values[0].double()
        if values.shape[1] != ids.shape[1]:
            continue  # a sliding layer has dropped its first keys
        heads, kv_heads = attention.shape[0], values.shape[0]
        norm = hidden[index][0].double().norm(dim=-1)
        weight = getattr(module, "o_proj", None) or module.dense
        best = torch.zeros(kv_heads, first, dtype=torch.double)
        for h in range(heads):
            k = h // (heads // kv_heads)
            own = weight.weight.double()[:, h * values.shape[-1] : (h + 1) * values.shape[-1]]
            for i in range(first):
                size = (own @ values[k, i]).norm()
                best[k, i] = max(best[k, i], (attention[h, -repeated:, i] * size / norm[-repeated:]).max())
        targets[index] = best.log().float()
    return targets


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "gpt_neox"])
@pytest.mark.parametrize("begin", [BEGIN, BEGIN[:0]])
def test_targets_follow_the_definition(family, begin):
    model = models.build(family, attention="eager", initializer_range=0.1)
    want = naive_targets(model, begin, TEXT, ASK)
    got = kvzap_targets(model, TEXT, ASK, begin)
    managed = [i for i in want if i in got]
    assert sorted(got) == managed
    for index in managed:
        torch.testing.assert_close(got[index].target, want[index], rtol=1e-4, atol=1e-4)
        assert got[index].hidden.shape == (len(begin) + 40, 64)
        assert got[index].key_norm.shape == want[index].shape
        assert want[index].std() > 0.1


@pytest.mark.parametrize("already", [False, True])
def test_the_model_is_left_as_it_was(already, tmp_path):
    model = models.build("llama")
    if already:
        kvsieve.SieveCache(model, kvsieve.get_policy("full"))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    implementation = model.config._attn_implementation
    assert implementation == ("kvsieve" if already else "sdpa")
    state = torch.get_rng_state()
    ids = models.words(1, 12)
    with torch.no_grad():
        before = model(ids).logits
    kvzap_targets(model, TEXT, ASK)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == implementation
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_the_model_is_left_as_it_was_after_an_error():
    model = models.build("llama")
    with pytest.raises(IndexError):
        kvzap_targets(model, TEXT + models.VOCAB, ASK)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or hasattr(module, hf.BEFORE) for module in model.modules())


def test_models_that_cannot_serve():
    with pytest.raises(UnsupportedOperationError, match="eval"):
        kvzap_targets(models.build("llama").train(), TEXT, ASK)
    model = models.build("llama")
    model.model.layers[1].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="LlamaAttention has no output projection"):
        kvzap_targets(model, TEXT, ASK)


# ---- what is learned


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_learning_beats_a_constant_and_the_key_norm(kind, trained):
    _, record = trained[kind]
    measured = record["held_out"]
    assert measured["r2"] > 0.1, "a constant scores 0"
    assert measured["correlation"] > 0.3
    assert measured["correlation"] > abs(measured["knorm_correlation"])
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2, 3]
    quantiles = list(record["score_quantiles"].values())
    assert quantiles == sorted(quantiles)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_what_is_written(kind, trained, mini_lm, docstrings):
    folder, record = trained[kind]
    assert json.loads((folder / "training.json").read_text()) == record
    assert record["model"] == "mini_lm"
    assert record["tokens"]["training"] + record["tokens"]["held_out"] <= record["windows"] * 161
    surrogate = KVzapSurrogate.load(folder)
    assert surrogate.shape == SurrogateShape(256, 2, 32 if kind == "mlp" else None, 4)
    threshold = record["score_quantiles"]["0.5"]
    policy = kvsieve.get_policy("kvzap", threshold=threshold, window=16, scorer=str(folder))
    model, tokenizer = mini_lm
    cache = kvsieve.SieveCache(model, policy)
    ids = tokenizer(docstrings[-1].text[:2000], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert 0.2 < cache.report()["compression_ratio"] < 0.8


def test_measurements_are_those_of_the_written_surrogate(tmp_path):
    """Everything again by hand, for one text to learn from and one to hold out."""
    model, tokenizer = models.build("llama", initializer_range=0.1), _Numbers()
    texts = [" ".join(map(str, models.words(1, 60, seed=s)[0].tolist())) for s in (5, 6)]
    record = train_kvzap(model, tokenizer, texts, tmp_path, kind="linear", tokens_per_text=10_000, progress=False)
    surrogate = KVzapSurrogate.load(tmp_path)
    measured = []
    for text in texts:
        ids, begin = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]), torch.tensor([1])
        instruction = torch.tensor(tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"])
        layer = kvzap_targets(model, ids, instruction, begin)[1]
        predicted = surrogate.score(1, layer.hidden[None])[0]
        pairs = [torch.corrcoef(torch.stack([p, t]))[0, 1] for p, t in zip(predicted, layer.target, strict=True)]
        norms = [torch.corrcoef(torch.stack([-k, t]))[0, 1] for k, t in zip(layer.key_norm, layer.target, strict=True)]
        error = (predicted - layer.target).square().sum(1)
        r2 = 1 - error / (layer.target - layer.target.mean(1, keepdim=True)).square().sum(1)
        measured.append((float(r2.mean()), float(sum(pairs) / 2), float(sum(norms) / 2)))
    got = record["layers"][1]
    got = (got["r2"], got["correlation"], got["knorm_correlation"])
    held_out = min(measured, key=lambda values: abs(values[0] - got[0]))
    assert got == pytest.approx(held_out, abs=1e-3)
    assert max(measured) != held_out, "the other text was learned from"


class _Numbers:
    """A tokenizer of numbers; other characters are tokens of their own."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **settings) -> dict[str, list[int]]:
        pieces = text.split() if text[:1].isdigit() else [str(ord(c) % 100 + 10) for c in text]
        return {"input_ids": [1] * add_special_tokens + [int(piece) for piece in pieces]}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_training_is_repeatable(kind, tmp_path):
    model = models.build("llama", initializer_range=0.1)
    texts = [" ".join(map(str, models.words(1, 50, seed=s)[0].tolist())) for s in range(4)]
    state = torch.get_rng_state()
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_kvzap(model, _Numbers(), texts, tmp_path / folder, kind=kind, seed=seed, hidden_dim=8, epochs=2,
                    progress=False)  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc")
    assert a == b != c


def test_long_texts_become_windows_and_every_text_comes_first(tmp_path):
    model = models.build("llama", max_position_embeddings=138)
    texts = [" ".join(map(str, models.words(1, n, seed=n)[0].tolist())) for n in (400, 50, 10, 60)]
    record = train_kvzap(model, _Numbers(), texts, tmp_path, kind="linear", max_texts=4, progress=False)
    assert record["window_tokens"] == (138 - 1 - len(INSTRUCTION)) // 2 == 49
    assert record["windows"] == 4  # the first 49 tokens of three texts, and one more window; 10 tokens are too few
    alone = train_kvzap(model, _Numbers(), texts[:1], tmp_path, kind="linear", progress=False)
    assert alone["windows"] == 8  # parts of one text, of which one is held out
    assert alone["tokens"] == {"training": 7 * 50, "held_out": 50}


def test_one_token_of_every_text_is_enough_to_run(tmp_path):
    model = models.build("llama", initializer_range=0.1)
    texts = [" ".join(map(str, models.words(1, 50, seed=s)[0].tolist())) for s in range(2)]
    record = train_kvzap(model, _Numbers(), texts, tmp_path, tokens_per_text=1, hidden_dim=4, progress=False)
    assert record["tokens"] == {"training": 1, "held_out": 1}
    weights = KVzapSurrogate.load(tmp_path).state_dict().values()
    assert all(bool(weight.isfinite().all()) for weight in weights)


def test_layers_that_no_cache_manages_are_zero(tmp_path):
    model = models.build("gemma2", attention="eager", initializer_range=0.1)
    texts = [" ".join(map(str, models.words(1, 50, seed=s)[0].tolist())) for s in range(2)]
    record = train_kvzap(model, _Numbers(), texts, tmp_path, kind="linear", progress=False)
    assert [layer["layer"] for layer in record["layers"]] == [1, 3]
    surrogate = KVzapSurrogate.load(tmp_path)
    assert [bool(module.weight.any()) for module in surrogate.layers] == [False, True, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tree"}, "kind='tree' is not one of mlp, linear"),
        ({"epochs": 0}, "must be 1 or more"),
        ({"lr": 0.0}, "lr above 0"),
        ({"window_tokens": 31}, "window_tokens 32 or more"),
    ],
)
def test_settings_out_of_range(settings, message, tmp_path):
    with pytest.raises(PolicyError, match=message):
        train_kvzap(models.stock("llama"), _Numbers(), ["1 2"], tmp_path, **settings)


@pytest.mark.parametrize("texts", [[], ["10 11 12"], [" ".join(["10"] * 40)]])
def test_too_little_text(texts, tmp_path):
    with pytest.raises(DataError, match="too little text"):
        train_kvzap(models.stock("llama"), _Numbers(), texts, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_stops_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file cannot be made a folder"):
        train_kvzap(models.stock("llama"), _Numbers(), [" ".join(["10"] * 90)] * 2, tmp_path / "file")


# ---- its default text


def test_docstrings_of_the_standard_library(docstrings, monkeypatch, tmp_path):
    already = set(sys.modules)
    few = standard_library_docstrings(max_samples=3)
    assert set(sys.modules) == already, "sources are parsed, not imported"
    assert few == docstrings[:3]
    names = [document.id for document in docstrings]
    assert names == sorted(names)
    assert {"argparse", "asyncio.base_events", "textwrap"} <= set(names)
    assert not any(name.startswith(("pydoc_data", "test.", "site-packages")) for name in names)
    assert all(len(document.text) >= 2000 for document in docstrings)
    assert docstrings[names.index("argparse")].text.startswith("Command-line parsing library")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="comes without the sources"):
        standard_library_docstrings()


def test_docstrings_are_not_what_methods_are_compared_on(docstrings):
    reference = {line for document in python_reference() for line in document.text.splitlines() if len(line) > 40}
    lines = [line for document in docstrings for line in document.text.splitlines()]
    assert sum(line in reference for line in lines) < 0.001 * len(lines)
