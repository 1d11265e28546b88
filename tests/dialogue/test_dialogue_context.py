"""What the model remembers: every strategy against a twin made of stock parts."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import conftest
from conftest import Fed, longest, rule, video
from kvsieve.dialogue.context import StreamContext, greedy, sampler
from kvsieve.dialogue.factory import ContextStrategyFactory, PolicyStrategy
from kvsieve.dialogue.runner import VLMStreamRunner
from kvsieve.dialogue.strategies import DropMiddle, SummarizeAndDrop
from kvsieve.dialogue.vlm import VisionLanguageModel
from kvsieve.errors import BudgetError, DataError
from kvsieve.ledger import KIND, SEGMENT, Kind

LINES = (("user", 0.0, "what next"), ("assistant", 2.0, "place red"), ("user", 7.0, "go on"))
SMALL = {"max_seq_len": 72, "reserved_seq_len": 12, "last_keep_len": 16}


def runner(vlm: VisionLanguageModel, kind: Any, **options: Any) -> VLMStreamRunner:
    own = {name: options.pop(name) for name in ("initial", "positions", "protect_initial") if name in options}
    own |= {name: options.pop(name, SMALL[name]) for name in SMALL if isinstance(kind, str)}
    own |= {name: options.pop(name) for name in list(options) if name.startswith("summary_")}
    return VLMStreamRunner(
        vlm, context_strategy_type=kind, context_strategy_config=own, **{"max_new_tokens": 6} | options
    )


@torch.no_grad()
def stock(fed: list[Fed], model: Any) -> list[Tensor]:
    """Logits after every forward pass, of the stock model over the whole stream at once, without a cache."""
    ids = [token for one in fed for token in one.ids]
    pixels = torch.cat([picture.pixels for one in fed for picture in one.pictures], 1)
    logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False).logits[0]
    ends = torch.tensor([len(one.ids) for one in fed]).cumsum(0) - 1
    return list(logits[ends])


def turned(keys: Tensor, by: int, theta: float = 10000.0) -> Tensor:
    """Rotated keys `[B, H, N, D]`, moved on by so many places."""
    half = keys.shape[-1] // 2
    angles = by / theta ** (torch.arange(half, dtype=torch.float64) / half)
    a, b = keys[..., :half], keys[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).to(keys.dtype)


@torch.no_grad()
def twin(fed: list[Fed], model: Any, initial: int, positions: str) -> list[Tensor]:
    """Logits after every forward pass, of the stock model with a stock cache that is cut and turned by hand to the
    initial tokens and the last ones, as many as the pass found."""
    cache, out, seen = DynamicCache(config=model.config), [], 0
    for one in fed:
        held = cache.get_seq_length()
        if one.before < held:
            gap = held - one.before
            for layer in cache.layers:
                head, tail = layer.keys[:, :, :initial], layer.keys[:, :, initial + gap :]
                layer.keys = torch.cat([head, turned(tail, -gap) if positions == "slot" else tail], 2)
                layer.values = torch.cat([layer.values[:, :, :initial], layer.values[:, :, initial + gap :]], 2)
        start = seen if positions == "original" else one.before
        more = {"pixel_values": one.pictures[0].pixels} if one.pictures else {}
        logits = model(
            input_ids=torch.tensor([one.ids]), position_ids=torch.arange(start, start + len(one.ids))[None],
            past_key_values=cache, **more,
        ).logits[0, -1]  # fmt: skip
        out.append(logits)
        seen += len(one.ids)
    return out


def assert_same(fed: list[Fed], want: list[Tensor], within: float) -> None:
    assert len(fed) == len(want) > 0
    for one, logits in zip(fed, want, strict=True):
        torch.testing.assert_close(one.logits, logits.float(), rtol=within, atol=within)


# ---- nothing dropped


@pytest.mark.parametrize("kind", ["full", "drop_middle", "drop_all"])
@pytest.mark.parametrize("ends", [True, False])
def test_while_nothing_is_dropped_it_is_one_forward_pass(vlm: VisionLanguageModel, kind: str, ends: bool) -> None:
    made = runner(vlm, kind, max_seq_len=400, last_keep_len=100)
    with rule(vlm, lambda frame: frame % 3 == 1, ends=ends) as fed:
        made.run_inference_on_video(video(lines=LINES))
    assert_same(fed, stock(fed, conftest.build().model), 1e-5)
    ids = [token for one in fed for token in one.ids]
    assert len(ids) == made.context.fed == made.context.length == made.context.largest


def test_the_stream_is_written_as_documented(vlm: VisionLanguageModel) -> None:
    """The last token of a line is fed too, with the mark that ends a line which was cut off."""
    picture = "<image>" * 4
    with rule(vlm, lambda frame: frame == 1, says=None) as fed:
        made = runner(vlm, "full", max_new_tokens=3)
        out = made.run_inference_on_video(video(4, lines=(("user", 0.0, "what next"), ("assistant", 1.0, "done"))))
    said = out["predictions"][1].gen
    assert len(said.split()) == 3
    text = f"<|im_start|>System: Watch and help<end_of_utterance>\nUser: what next<end_of_utterance>\n{picture}"
    text += f"<silent>{picture} {said}<end_of_utterance>\n{picture}<silent>{picture}"
    assert [token for one in fed for token in one.ids] == vlm.encode(text)
    assert [one.gen for one in out["predictions"]] == ["", said, "", ""]


def test_the_stream_of_a_hub_model(hub: VisionLanguageModel) -> None:
    """A frame is a turn of the user, and silence is an answer that ends at once."""
    picture = f"<fake_token_around_image> <global-img> {'<image> ' * 4}<fake_token_around_image>"
    with rule(hub, lambda frame: frame == 1, ends=True, says=None) as fed:
        made = runner(hub, "full", max_new_tokens=3)
        out = made.run_inference_on_video(video(3))
    said = hub.encode(out["predictions"][1].gen)
    turn = hub.encode(f"User: {picture} <end_of_utterance> \n Assistant:")
    end, line = hub.format.end, hub.encode("\n")
    assert said
    assert hub.format.silence == end
    words = [token for one in fed for token in one.ids]
    first = hub.encode("<|im_start|> System:") + hub.encode("Watch")
    assert words[: len(first)][:2] == first[:2]
    tail = words[words.index(turn[0]) :]
    assert tail == [*turn, end, *line, *turn, *said, end, *line, *turn]
    assert_same(fed, stock(fed, conftest.build(hub=True).model), 1e-5)


def test_the_twin_family(idefics: VisionLanguageModel) -> None:
    made = runner(idefics, "drop_middle")
    with rule(idefics, lambda frame: frame % 3 == 1) as fed:
        made.run_inference_on_video(video(20, lines=LINES))
    assert made.context.compressions > 1
    assert_same(fed, twin(fed, conftest.build("idefics3").model, _initial(fed), "slot"), 1e-4)


# ---- drop_middle


def _initial(fed: list[Fed]) -> int:
    """Tokens in front of the first picture."""
    return next(one.before for one in fed if one.pictures)


@pytest.mark.parametrize("positions", ["slot", "original", "naive"])
def test_drop_middle_equals_a_twin_made_by_hand(vlm: VisionLanguageModel, positions: str) -> None:
    made = runner(vlm, "drop_middle", positions=positions)
    with rule(vlm, lambda frame: frame % 4 == 1) as fed:
        made.run_inference_on_video(video(30, lines=LINES))
    assert made.context.compressions > 3
    assert_same(fed, twin(fed, conftest.build().model, _initial(fed), positions), 1e-4)
    starts = [one.position for one in fed]
    if positions == "original":
        assert starts == [sum(len(one.ids) for one in fed[:i]) for i in range(len(fed))]
    else:
        assert starts == [one.before for one in fed]


@pytest.mark.parametrize("positions", ["slot", "original", "naive"])
@pytest.mark.parametrize("keep", [0, 1, 16, 30])
def test_drop_middle_keeps_the_beginning_and_the_end(vlm: VisionLanguageModel, positions: str, keep: int) -> None:
    made = runner(vlm, "drop_middle", positions=positions, last_keep_len=keep)
    with rule(vlm, lambda frame: frame % 4 == 1, look=True) as fed:
        made.run_inference_on_video(video(24, lines=LINES))
    initial, seen, reductions = _initial(fed), 0, 0
    held: list[int] = []
    for one in fed:
        if one.before < len(held):
            reductions += 1
            n = len(held)
            assert one.before == initial + min(keep, n - initial)
            held = [*held[:initial], *held[initial + n - one.before :]]
        assert one.held == held
        assert held[:initial] == list(range(min(initial, seen)))
        held = [*held, *range(seen, seen + len(one.ids))]
        seen += len(one.ids)
    assert reductions == made.context.compressions > 2
    for layer in range(2):
        assert (made.context.cache.kept_positions(layer)[0] == torch.tensor(held)).all()


def test_a_long_line_that_leaves_no_room_for_the_initial_context(vlm: VisionLanguageModel) -> None:
    """It must not cost the instruction in silence."""
    lines = (("user", 0.0, "what next"), ("assistant", 2.0, "done"), ("user", 5.0, "go on " * 26))
    made = runner(vlm, "drop_middle")
    with rule(vlm), pytest.raises(DataError, match="beside the initial context"):
        made.run_inference_on_video(video(lines=lines))


# ---- the limit


STRATEGIES = ["none", "drop_all", "drop_middle", "summarize_and_drop", "h2o", "snapkv", "tova", "streaming_llm"]
STRATEGIES += ["expected_attention", "pyramidkv", "adakv_snapkv", "knorm"]


@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_cache_never_exceeds_its_limit(kind: str) -> None:
    """Random conversations, sizes and settings, every line as long as it may be."""
    random.seed(kind)
    runs = 0
    for seed in range(2):
        vlm = conftest.build(hub=seed == 1, scale=random.choice([1, 2]))
        reserved = random.randint(3, 12)
        longest_line = random.randint(1, reserved)
        asked = random.choice([{"summary_max_length": random.randint(3, 20), "summary_prompt": "summarize"}])
        frame = len(vlm.encode(vlm.picture(conftest.frames(1)[0]).text)) + 10
        keep = random.randint(0, 30)
        own = asked if kind == "summarize_and_drop" else {}
        most = 50 + keep + reserved + frame + random.randint(0, 40) + (50 if own else 0)
        lines = [("user", 0.0, "what next"), ("assistant", 3.0, "done")]
        lines += [("user", 4.0 + i, "go on " * random.randint(1, 8)) for i in range(0, 12, 3)]
        made = runner(
            vlm, kind, max_seq_len=most, reserved_seq_len=reserved, last_keep_len=keep, max_new_tokens=longest_line,
            initial=random.choice(["user_turn", "system"]), **own,
        )  # fmt: skip
        with rule(vlm, lambda frame: random.random() < 0.3) as fed:
            out = made.run_inference_on_video(video(20, lines=tuple(lines)))
        measured = max(one.after for one in fed)
        assert measured == made.context.largest == out["prediction"].numbers["max_cache_size"] <= most
        assert all(one.cache_tokens <= most for one in out["predictions"])
        runs += made.context.compressions
        lengths = [len(vlm.encode(one.gen)) for one in out["predictions"] if one.gen]
        assert max(lengths) == longest_line
    assert runs > 2 or kind == "none"


def test_initial_contexts_that_do_not_fit(vlm: VisionLanguageModel) -> None:
    with rule(vlm):
        with pytest.raises(BudgetError, match="last_keep_len=16"):
            runner(vlm, "drop_middle").run_inference_on_video(video(system="go on " * 20))
        with pytest.raises(BudgetError, match="initial context"):
            runner(vlm, "none").run_inference_on_video(video(system="go on " * 28))
        with pytest.raises(BudgetError, match="initial context"):
            runner(vlm, "drop_all").run_inference_on_video(video(system="go on " * 200))
        with pytest.raises(BudgetError, match="a frame of 4 tokens does not fit below 4"):
            runner(vlm, "drop_all", max_seq_len=16).run_inference_on_video(video(system=""))
        with pytest.raises(BudgetError, match="longer than max_seq_len"):
            runner(vlm, "drop_middle").run_inference_on_video(
                video(40, lines=(("user", 30.0, "what next"), ("assistant", 31.0, "done")))
            )


# ---- none, drop_all, summarize_and_drop


@pytest.mark.parametrize("initial", ["user_turn", "system"])
@pytest.mark.parametrize("system", ["Watch and help", ""])
def test_none_with_a_cache_is_none_without(vlm: VisionLanguageModel, system: str, initial: str) -> None:
    lines: Any = LINES
    if not system:
        lines = (("assistant", 2.0, "place red"),)
    outs, feds = [], []
    for cached in (True, False):
        made = runner(vlm, "none", use_kv_cache=cached, initial=initial)
        with rule(vlm, lambda frame: frame % 3 == 1) as fed:
            out = made.run_inference_on_video(video(lines=lines, system=system))
        outs.append(out["predictions"])
        feds.append([one for one in fed if one.pictures])
        assert out["prediction"].numbers["cache_compressions"] == 0
        assert out["prediction"].events == ()
    assert [(one.gen, one.silence, one.cache_tokens) for one in outs[0]] == [
        (one.gen, one.silence, one.cache_tokens) for one in outs[1]
    ]
    for with_cache, without in zip(*feds, strict=True):
        assert (with_cache.ids, with_cache.before, with_cache.position) == (
            without.ids,
            without.before,
            without.position,
        )
        assert torch.equal(with_cache.logits, without.logits)


def test_under_none_a_frame_hears_the_line_in_front_of_it(vlm: VisionLanguageModel) -> None:
    made = runner(vlm, "none")
    with rule(vlm) as fed:
        made.run_inference_on_video(video(lines=LINES))
    shown = [one for one in fed if one.pictures]
    assert shown[7].before == shown[6].before + len(vlm.encode("User: go on<end_of_utterance>\n"))
    assert shown[8].before == shown[6].before == _initial(fed)


def test_drop_all_begins_with_what_is_pending(vlm: VisionLanguageModel) -> None:
    made = runner(vlm, "drop_all")
    with rule(vlm, lambda frame: frame % 4 == 1) as fed:
        out = made.run_inference_on_video(video(30, lines=LINES))
    starts = [i for i, one in enumerate(fed) if i and not one.before]
    assert len(starts) == made.context.compressions == len(out["prediction"].events) > 2
    model = conftest.build().model
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        assert_same(fed[start:end], stock(fed[start:end], model), 1e-5)
        assert fed[start].ids[0] != vlm.image_token  # the silence, or the last word, before it
        assert [one.position for one in fed[start:end]] == [one.before for one in fed[start:end]]


def test_a_summary_opens_the_new_context(vlm: VisionLanguageModel) -> None:
    made = runner(vlm, "summarize_and_drop", max_seq_len=110, summary_max_length=8, summary_prompt="summarize")
    system = "Watch and help Task knowledge: one two"
    with rule(vlm, says={"summarize": "three done"}) as fed:
        out = made.run_inference_on_video(video(45, lines=LINES, system=system))
    asked = [i for i, one in enumerate(fed) if vlm.encode("summarize")[0] in one.ids]
    assert len(asked) == len(out["prediction"].summaries) == made.context.compressions > 2
    assert {one.text for one in out["prediction"].summaries} == {"three done"}
    assert {one.prompt for one in out["prediction"].summaries} == {"summarize"}
    opening = "<|im_start|>System: Watch and help three done Task knowledge: one two<end_of_utterance>\n"
    request = "System: summarize<end_of_utterance>\nAssistant:"
    model = conftest.build().model
    for i in asked:
        assert fed[i].ids[-len(vlm.encode(request)) :] == vlm.encode(request)
        assert fed[i].before > 0  # it is asked of what has been seen
        new = next(j for j in range(i, len(fed)) if not fed[j].before)
        assert fed[new].ids == vlm.encode(opening)
        assert [one.ids for one in fed[i + 1 : new]] == [[token] for token in vlm.encode("three done")]
        after = fed[new : new + 4]
        assert_same(after, stock(after, model), 1e-5)
    store = made.context.cache.managed[0].core.store
    assert int((store.read(SEGMENT)[0, 0] == 0).sum()) == len(vlm.encode(opening)) == made.context.initial
    events = out["prediction"].events
    assert all(one["tokens_after"] == len(vlm.encode(opening)) < one["tokens_before"] for one in events)


def test_a_summary_fits_behind_the_longest_reply(vlm: VisionLanguageModel) -> None:
    """A reply may take all that is reserved; the request and the summary come after it."""
    made = runner(
        vlm, "summarize_and_drop", max_seq_len=100, reserved_seq_len=20, max_new_tokens=20, summary_max_length=10,
        summary_prompt="summarize",
    )  # fmt: skip
    with rule(vlm, lambda frame: True) as fed:
        out = made.run_inference_on_video(video(8, lines=LINES))
    assert out["prediction"].summaries
    assert all(len(one.text.split()) == 10 for one in out["prediction"].summaries)
    assert max(one.after for one in fed) <= 100


def test_a_video_that_may_begin_may_go_on(vlm: VisionLanguageModel) -> None:
    """The tightest settings that are accepted at its start do not fail at its first summary."""
    own = {"reserved_seq_len": 6, "summary_prompt": "summarize", "summary_max_length": 8}
    initial, frame = 10, 4
    reserved = SummarizeAndDrop(4096, **own)
    most = initial + 8 + frame + 1 + 4096 - reserved.ctxlen_to_reduce
    with rule(vlm, lambda frame: frame % 3 == 1) as fed:
        out = runner(vlm, SummarizeAndDrop(most, **own)).run_inference_on_video(video(12, lines=LINES))
    assert len(out["prediction"].summaries) > 2
    assert max(one.after for one in fed) <= most
    with rule(vlm), pytest.raises(BudgetError, match="summary_max_length=8"):
        runner(vlm, SummarizeAndDrop(most - 1, **own)).run_inference_on_video(video(12, lines=LINES))


# ---- the ledger


@pytest.mark.parametrize(
    ("initial", "lines", "want"),
    [
        ("user_turn", LINES, "<|im_start|>System: Watch and help<end_of_utterance>User: what next<end_of_utterance>"),
        ("system", LINES, "<|im_start|>System: Watch and help<end_of_utterance>"),
        (
            "user_turn",
            (("user", 2.0, "what next"), ("assistant", 3.0, "done")),
            "<|im_start|>System: Watch and help<end_of_utterance>"
            + "<image><image><image><image><silent>" * 2
            + "User: what next<end_of_utterance>",
        ),
        (
            "first_turn",
            LINES,
            "<|im_start|>System: Watch and help<end_of_utterance>User: what next<end_of_utterance>"
            "<image><image><image><image>",
        ),
        ("user_turn", (("assistant", 3.0, "done"),), "<|im_start|>System: Watch and help<end_of_utterance>"),
    ],
)
def test_segment_0_is_the_initial_context(vlm: VisionLanguageModel, initial: str, lines: Any, want: str) -> None:
    made = runner(vlm, "drop_middle", initial=initial)
    with rule(vlm) as fed:
        made.run_inference_on_video(video(24, lines=lines))
    assert made.context.compressions > 0
    ids = vlm.encode(want)
    stream = [token for one in fed for token in one.ids]
    assert stream[: len(ids)] == ids
    store = made.context.cache.managed[1].core.store
    first = store.read(SEGMENT)[0, 0] == 0
    assert made.context.cache.kept_positions(1)[0, 0][first].tolist() == list(range(len(ids)))
    assert made.context.initial == len(ids)
    kept = torch.tensor(stream)[made.context.cache.kept_positions(1)[0, 0]]
    assert ((store.read(KIND)[0, 0] == int(Kind.PATCH)) == (kept == vlm.image_token)).all()
    rest = store.read(SEGMENT)[0, 0][~first]
    assert (rest.diff() >= 0).all()
    assert int(rest.unique().numel()) > 2


def test_a_reply_belongs_to_its_frame(vlm: VisionLanguageModel) -> None:
    made = runner(vlm, "full")
    with rule(vlm, lambda frame: frame == 0):
        made.run_inference_on_video(video(2, lines=(("assistant", 0.0, "done"),)))
    segments = made.context.cache.managed[0].core.store.read(SEGMENT)[0, 0].tolist()
    assert segments == [0] * 6 + [1] * 9 + [2] * 6  # 5 of 6 words with the frame; the last, its end, the next frame


# ---- exactness of dtypes, and memory


def test_half_precision_rotates_as_it_reads(vlm: VisionLanguageModel) -> None:
    half = conftest.build()
    half.model.to(torch.bfloat16)
    for kind in ("drop_middle", "h2o"):
        made = runner(half, kind)
        with rule(half, lambda frame: frame % 4 == 1) as fed:
            out = made.run_inference_on_video(video(20, lines=LINES))
        assert made.context.cache.positions == "slot"
        assert made.context.compressions > 1
        assert all(one.logits.isfinite().all() for one in fed)
        assert out["prediction"].numbers["cache_bytes"] <= 2 * 2 * 2 * 2 * 8 * 80
    made = runner(half, "drop_middle")
    with rule(half) as fed:
        made.run_inference_on_video(video(20, lines=LINES))
    exact = runner(vlm, "drop_middle")
    with rule(vlm) as full:
        exact.run_inference_on_video(video(20, lines=LINES))
    assert [one.ids for one in fed] == [one.ids for one in full]
    away = torch.stack([(a.logits - b.logits).abs().max() for a, b in zip(fed, full, strict=True)])
    assert float(away.median()) < 0.1 * float(torch.stack([one.logits for one in full]).std())


def test_a_long_stream_is_flat(vlm: VisionLanguageModel) -> None:
    made = runner(vlm, "drop_middle")
    sizes, tensors = [], []
    steps = made.stream(video(600, lines=LINES, system="Watch and help"))
    stock_forward, calls = vlm.forward, 0

    def forward(*args: Any) -> Tensor:
        logits = stock_forward(*args)
        logits[vlm.format.silence] = 50.0
        return logits

    vlm.forward = forward  # type: ignore[method-assign]
    try:
        for _ in steps:
            calls += 1
            sizes.append(made.context.bytes)
            if calls in (100, 599):
                gc.collect()
                tensors.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))
    finally:
        del vlm.forward  # type: ignore[method-assign]
    assert calls == 600
    assert made.context.compressions > 50
    assert max(sizes[300:]) == max(sizes[50:300]) <= max(sizes[:50]) <= made.context.bytes_largest
    assert tensors[1] <= tensors[0]


def test_a_stream_left_half_way_frees_its_cache(vlm: VisionLanguageModel) -> None:
    made = runner(vlm, "full")
    for i, _ in enumerate(made.stream(video(30))):
        if i == 5:
            break
    first = made.run_inference_on_video(video())
    again = made.run_inference_on_video(video())
    assert [one.gen for one in first["predictions"]] == [one.gen for one in again["predictions"]]
    gc.collect()
    contexts = [one for one in gc.get_objects() if type(one) is StreamContext and one.strategy is made.strategy]
    assert contexts == [made.context]


# ---- parts


def test_nothing_is_carried_over_to_the_next_video(vlm: VisionLanguageModel) -> None:
    for kind in ("h2o", "summarize_and_drop"):
        more = {"max_seq_len": 110, "summary_max_length": 8, "summary_prompt": "summarize"}
        more = more if kind == "summarize_and_drop" else {}
        shared, fresh = runner(vlm, kind, **more), runner(vlm, kind, **more)
        with rule(vlm, lambda frame: frame % 5 == 1):
            shared.run_inference_on_video(video(20, lines=LINES, system="help done", seed=1))
        with rule(vlm, lambda frame: frame % 5 == 1) as first:
            shared.run_inference_on_video(video(16, lines=LINES))
        with rule(vlm, lambda frame: frame % 5 == 1) as second:
            fresh.run_inference_on_video(video(16, lines=LINES))
        assert [one.ids for one in first] == [one.ids for one in second]
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(first, second, strict=True))


def test_what_is_drawn() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    assert greedy(logits) == 2

    def draws(temperature: float, top_p: float, seed: int = 0) -> list[int]:
        choose = sampler(temperature, top_p, torch.Generator().manual_seed(seed))
        return [choose(logits) for _ in range(400)]

    assert draws(1.0, 1.0) == draws(1.0, 1.0) != draws(1.0, 1.0, seed=1)
    assert set(draws(1.0, 1.0)) == {0, 1, 2, 3}
    share = logits.softmax(-1)
    assert set(draws(1.0, float(share[2]) - 0.01)) == {2}
    assert set(draws(1.0, float(share[2]) + 0.01)) == {1, 2}
    assert set(draws(0.01, 1.0)) == {2}
    even = draws(100.0, 1.0)
    assert all(60 < even.count(i) < 140 for i in range(4))
    assert abs(draws(1.0, 1.0).count(2) / 400 - float(share[2])) < 0.08


def test_a_line_never_asks_for_a_picture(vlm: VisionLanguageModel) -> None:
    context = StreamContext(vlm, PolicyStrategy("full"))
    context.feed(vlm.encode("<|im_start|>"))
    logits = torch.zeros(len(vlm.tokenizer))
    logits[vlm.image_token] = 9.0
    assert vlm.image_token not in context.reply(logits, 1, greedy)


def test_more_than_there_is_room_for(vlm: VisionLanguageModel) -> None:
    context = StreamContext(vlm, DropMiddle(20, 5, 5))
    with pytest.raises(DataError, match="21 tokens do not fit: 0 of max_seq_len=20"):
        context.feed([7] * 21)
    context.feed([7] * 20)
    assert (context.room, context.length, longest(context.cache)) == (0, 20, 20)


def test_methods_that_spread_a_budget_unevenly_keep_within_it(vlm: VisionLanguageModel) -> None:
    """Asked for 22 tokens, the longest head alone would keep more."""
    strategy = ContextStrategyFactory.create_strategy("adakv_snapkv", 60, 10, 20)
    sizes = []
    for by_hand in (True, False):
        context = StreamContext(vlm, strategy)
        context.feed(vlm.encode("what next"))
        context.close_initial(4)
        context.feed(vlm.encode("go on " * 23))
        if by_hand:
            context.cache.evict(22)
        else:
            assert context.make_room(4, 4)
        sizes.append(longest(context.cache))
    assert sizes[0] > 22 >= sizes[1] >= 12
