"""`positions="slot"`: keys at places inside the cache, so that a stream can run past the trained length."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from scenarios import METHODS, policy, same
from transformers import Cache

import models
from kvsieve import SieveCache, UnsupportedModelError, UnsupportedOperationError, get_policy

LONG = {"factor": 8.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", **LONG},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
}
SIZES = {"token by token": [1] * 40, "chunks": [13, 9, 9, 3, 1, 1, 1, 1, 1, 1], "prefill then tokens": [28] + [1] * 12}


def llama(rope: str) -> Any:
    return models.build("llama", torch.float64, rope_parameters=ROPES[rope])


def against_hand_llama(rope: str, chosen, sizes: list[int], batch: int = 1) -> None:
    model, ids = llama(rope), models.words(batch, sum(sizes))
    cache = SieveCache(model, chosen, positions="slot")
    original = SieveCache(model, chosen)
    hand, held, start, other = oracle.HandLlama(model), {}, 0, 0.0
    for size in sizes:
        piece = ids[:, start : start + size]
        start += size
        with torch.no_grad():
            got = model(input_ids=piece, past_key_values=cache).logits
            plain = model(input_ids=piece, past_key_values=original).logits
        want = hand.step(piece, held)
        assert float((got - want).abs().max()) < 3e-4  # cosines and sines are float32 everywhere
        other = max(other, float((plain - want).abs().max()))
        held = {layer: oracle.as_mask(cache.kept_positions(layer), start) for layer in range(2)}
    assert cache.report()["evictions"] > 0
    assert other > 0.5, "original positions would have passed as well"


@pytest.mark.parametrize("how", SIZES)
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "adakv_snapkv", "threshold"])
@pytest.mark.parametrize("rope", ROPES)
def test_equals_a_hand_written_llama(rope, name, how):
    chosen = get_policy("random", threshold=0.6, window=3) if name == "threshold" else policy(name, 10)
    against_hand_llama(rope, chosen, SIZES[how], batch=2)


@pytest.mark.parametrize("name", [m for m in METHODS if m != "full"])
def test_every_method(name):
    against_hand_llama("default", policy(name, 10), SIZES["chunks"])


FULL = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {}, "qwen3": {}, "mistral": {}, "phi3": {}, "gpt_neox": {}, "gemma3": FULL, "gpt_oss": FULL, "smolvlm": {},
}  # fmt: skip


def frequencies(model: Any) -> torch.Tensor:
    """What the model multiplies positions with."""
    buffers = {name.split(".")[-1]: b for name, b in model.named_buffers() if "vision" not in name}
    return buffers.get("full_attention_inv_freq", buffers.get("inv_freq")).to(model.dtype)


@pytest.mark.parametrize("name", ["streaming_llm", "adakv_snapkv"])
@pytest.mark.parametrize("family", OTHERS)
def test_every_family(family, name):
    """The stock model, told that every token is at place 0, with a cache that places them by rank."""
    model, stock = (models.build(family, torch.float64, **OTHERS[family]) for _ in range(2))
    ids = models.words(2, 26)
    cache = SieveCache(model, policy(name, 8), positions="slot")
    layers = [oracle.UnrotatedLayer(frequencies(stock)) for _ in range(2)]
    unrotated = Cache(layers=layers)
    scale = 0.0
    for i in range(26):
        token = ids[:, i : i + 1]
        for index, layer in enumerate(layers):
            held = oracle.as_mask(cache.kept_positions(index), i) if i else torch.zeros(2, 1, 0, dtype=torch.bool)
            layer.visible = torch.cat([held, torch.ones_like(held[..., :1]) if i else torch.ones(2, 1, 1).bool()], -1)
        heads = model.config.get_text_config().num_attention_heads
        kv_heads = getattr(model.config.get_text_config(), "num_key_value_heads", heads)
        for layer in layers:
            layer.visible = layer.visible.expand(2, kv_heads, i + 1)
        with torch.no_grad():
            got = model(input_ids=token, past_key_values=cache).logits
            with oracle.masked(stock, {n: layer.visible[:, :, None] for n, layer in enumerate(layers)}):
                want = stock(input_ids=token, past_key_values=unrotated, position_ids=torch.zeros_like(token)).logits
        scale = max(scale, float(want.abs().max()))
        assert float((got - want).abs().max()) < 1e-5 * scale
    assert cache.report()["evictions"] > 0


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "adakv_snapkv"])
def test_padded_row_equals_the_row_alone(name):
    model, chosen = llama("default"), policy(name, 8)
    inputs = models.prompt("llama", 3, 24, padded=True)
    cache = SieveCache(model, chosen, positions="slot")
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**inputs, past_key_values=cache, **settings)
    for row in range(3):
        ids = inputs["input_ids"][row : row + 1, 3 * (2 - row) :]
        alone = model.generate(ids, past_key_values=SieveCache(model, chosen, positions="slot"), **settings)
        for a, b in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-4)


def test_padding_in_the_middle_is_refused():
    model = llama("default")
    cache = SieveCache(model, policy("streaming_llm", 8), positions="slot")
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 5:7] = 0
    with pytest.raises(UnsupportedOperationError, match="left only"), torch.no_grad():
        model(input_ids=models.words(1, 12), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_steps_do_not_drift(dtype):
    """In a model of one layer, logits depend on the tokens held and their order only; so a long stream that ends in
    the same words as a short one has to end in the same logits. (Rotating stored keys on by one place per step in
    bfloat16 would be off by half of their length here.)"""
    model = models.build("llama", dtype, num_hidden_layers=1, max_position_embeddings=128)
    chosen = policy("streaming_llm", 12)
    start, end = models.words(1, 4), models.words(1, 10, seed=2)
    last = {}
    for length in (20, 1000):
        ids = torch.cat([start, models.words(1, length, seed=3), end], 1)
        cache = SieveCache(model, chosen, positions="slot")
        with torch.no_grad():
            for i in range(ids.shape[1]):
                logits = model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
        assert cache.kept_positions(0)[0, 0, :2].tolist() == [0, 1]
        last[length] = logits.float()
    scale = float(last[20].abs().max())
    tolerance = 5e-3 if dtype == torch.float32 else 3e-2  # the angles of place 1,000 are float32
    assert float((last[20] - last[1000]).abs().max()) < tolerance * scale


TRAINED = 32
"""Trained length of the models that read far more than that."""


@pytest.mark.parametrize("chunk", [1, 12])
def test_past_the_trained_length_a_fresh_model_reads_the_same(chunk):
    """A model of one layer for 32 tokens reads 300. In such a model the key of a token depends on that token alone, so
    another one, without a cache, that reads the tokens held and the new ones at positions 0 .. n-1 must see the same.
    All of its rotations lie within the trained length."""
    model, fresh = (models.build("llama", num_hidden_layers=1, max_position_embeddings=TRAINED) for _ in range(2))
    ids, far = models.words(1, 300), 0.0
    cache, plain = (SieveCache(model, policy("streaming_llm", 16), positions=how) for how in ("slot", "original"))
    for start in range(0, 300, chunk):
        new = torch.arange(start, start + chunk)
        kept = torch.cat([cache.kept_positions(0)[0, 0], new]) if start else new
        assert len(kept) <= min(TRAINED, 16 + chunk)
        with torch.no_grad():
            got = model(input_ids=ids[:, new], past_key_values=cache).logits
            other = model(input_ids=ids[:, new], past_key_values=plain).logits
            want = fresh(input_ids=ids[:, kept], position_ids=torch.arange(len(kept))[None], use_cache=False).logits
        want = want[:, -chunk:]
        assert float((got - want).abs().max()) < 2e-3 * float(want.abs().max())  # the angles of place 300 are float32
        far = max(far, float((other - want).abs().max()))
    assert cache.report()["evictions"] > 0
    assert far > 0.5, "original positions would have passed as well"


@pytest.mark.parametrize("name", ["h2o", "adakv_snapkv"])
def test_past_the_trained_length_heads_may_differ(name):
    """The same in two layers, where every head has tokens of its own, against the hand-written twin, whose rotations
    are by 0 .. n-1 at every step."""
    model = models.build("llama", torch.float64, max_position_embeddings=TRAINED)
    ids, held, hand = models.words(1, 160), {}, oracle.HandLlama(model)
    cache = SieveCache(model, policy(name, 12), positions="slot")
    for start in range(0, 160, 4):
        piece = ids[:, start : start + 4]
        with torch.no_grad():
            got = model(input_ids=piece, past_key_values=cache).logits
        assert float((got - hand.step(piece, held)).abs().max()) < 1e-3
        kept = [cache.kept_positions(layer) for layer in range(2)]
        assert max(table.shape[-1] for table in kept) + 4 <= TRAINED
        held = {layer: oracle.as_mask(table, start + 4) for layer, table in enumerate(kept)}
    assert cache.report()["tokens_seen"] == [5 * TRAINED]


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "snapkv", "adakv_snapkv"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_rewinding_changes_nothing_but_positions(name, chunk):
    """What is held and what the model says stay the same when positions begin anew, before and after evictions."""
    model, ids = llama("default"), models.words(2, 80)
    caches = [SieveCache(model, policy(name, 10), positions="slot") for _ in range(2)]
    for start in range(0, 80, chunk):
        piece, rewound = ids[:, start : start + chunk], caches[1]
        if start in (5, 35, 40, 65):
            rewound.rewind()
            rewound = caches[1] = copy.deepcopy(rewound)
        places = torch.arange(chunk)[None] + rewound.next_position
        with torch.no_grad():
            want = model(input_ids=piece, past_key_values=caches[0]).logits
            got = model(input_ids=piece, past_key_values=rewound, position_ids=places.expand(2, -1)).logits
        torch.testing.assert_close(got, want, rtol=0, atol=3e-4)  # cosines and sines are float32
        for layer in range(2):
            assert torch.equal(rewound.kept_positions(layer), caches[0].kept_positions(layer))
    assert caches[1].next_position < 40
    assert caches[0].next_position == 80


def test_what_cannot_be_rewound():
    with pytest.raises(UnsupportedOperationError, match="slot"):
        SieveCache(models.managed("llama"), policy("h2o", 8)).rewind()
    with pytest.raises(UnsupportedOperationError, match="all managed"):
        SieveCache(models.managed("gemma3"), policy("h2o", 8), positions="slot").rewind()
    for name in ("expected_attention", "keydiff", "lagkv"):  # the latter hold rotated keys against each other
        with pytest.raises(ValueError, match="reckons with keys as they came"):
            SieveCache(models.managed("llama"), policy(name, 12), positions="slot").rewind()


def test_nothing_evicted_is_nothing_shifted():
    inputs = models.prompt("llama", 1, 20)
    model = models.managed("llama")
    cache = SieveCache(model, policy("h2o"), positions="slot")
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    got = model.generate(**inputs, past_key_values=cache, **settings)
    want = models.stock("llama").generate(**inputs, **settings)
    assert all(same(a, b, exact=False) for a, b in zip(got.logits, want.logits, strict=True))


def test_copies_and_rows():
    model, chosen, ids = llama("default"), policy("adakv_snapkv", 8), models.words(2, 24)
    cache = SieveCache(model, chosen, positions="slot")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 1]))
        token = models.words(1, 1, seed=4)
        a = model(input_ids=token.expand(2, 1), past_key_values=cache).logits
        b = model(input_ids=token.expand(2, 1), past_key_values=twin).logits
    torch.testing.assert_close(b[0], a[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(b[1], a[1], rtol=0, atol=1e-9)


# ---- what is refused


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 512, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            },
            "original_max_position_embeddings": 512,
        },
        "longrope",
    ),
    "several axes": ("qwen2_5_vl", {}, "several axes"),
    "several interleaved axes": ("qwen3_vl", {}, "several axes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    family, changes, message = REFUSED[case]
    model = models.build(family, **changes)
    ids = models.words(1, 20)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(UnsupportedModelError, match=message):
            SieveCache(model, policy("streaming_llm", 8), positions="slot")
        assert torch.equal(model(input_ids=ids).logits, before)
    SieveCache(model, policy("streaming_llm", 8))


NOT_ROTATED: dict[str, tuple[str, dict[str, Any]]] = {
    "no rotation in some layers": ("SmolLM3", {"num_hidden_layers": 4}),
    "no rotation in global layers": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 24}),
    "keys normalised after rotation": ("HunYuanDenseV1", {"head_dim": 16}),
}


@pytest.mark.parametrize("case", NOT_ROTATED)
def test_layers_whose_keys_are_not_just_rotated(case):
    """Their functions alone would pass; what the layers do with them does not."""
    name, changes = NOT_ROTATED[case]
    model = models.causal(name, **changes)
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    for chosen, positions in (("streaming_llm", "slot"), ("expected_attention", "original")):
        with pytest.raises(UnsupportedModelError, match="does not rotate its keys, or changes them after it"):
            SieveCache(model, policy(chosen, 8), positions=positions)
    SieveCache(model, policy("streaming_llm", 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Phi", "StableLm", "Cohere", "Glm", "Olmo2", "Granite"])
def test_other_layouts_are_accepted(name, dtype):
    """Parts of a head, interleaved pairs, other scales."""
    SieveCache(models.causal(name).to(dtype), policy("streaming_llm", 8), positions="slot")


def test_dynamic_frequencies_are_tested_on_a_copy():
    """The self-test looks past the trained length, which such an embedding remembers."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = models.build("llama", rope_parameters=rope, max_position_embeddings=64)
    ids = models.words(1, 100)
    with torch.no_grad():
        before = model(input_ids=ids[:, :50]).logits, model(input_ids=ids).logits
        with pytest.raises(UnsupportedModelError, match="cannot be shifted"):
            SieveCache(model, policy("expected_attention", 8))
        after = model(input_ids=ids[:, :50]).logits, model(input_ids=ids).logits
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    longer = models.build("llama", rope_parameters=rope, max_position_embeddings=4096)
    SieveCache(longer, policy("expected_attention", 8))


def test_expected_attention_on_several_axes_is_refused():
    with pytest.raises(UnsupportedModelError, match="several axes"):
        SieveCache(models.build("qwen3_vl"), policy("expected_attention", 8))


def test_unknown_positions():
    with pytest.raises(ValueError, match="original"):
        SieveCache(models.managed("llama"), policy("h2o", 8), positions="shifted")
