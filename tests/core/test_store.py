"""Both layouts against a plain dictionary of tokens: whatever is appended, dropped or reordered, every token keeps
its own key, value and record, and memory follows."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsieve.ledger import KEY, POSITION, VALUE
from kvsieve.ragged import RaggedStore
from kvsieve.store import DenseStore, Store, put


def tokens(b: int, h: int, first: int, t: int) -> dict[str, torch.Tensor]:
    """Tokens whose key and value can be recomputed from batch row, head and position."""
    position = torch.arange(first, first + t, dtype=torch.int32).expand(b, h, t)
    code = torch.arange(b)[:, None, None] * 1e6 + torch.arange(h)[None, :, None] * 1e4 + position
    return {
        KEY: torch.stack([code, code + 0.25], -1),
        VALUE: torch.stack([code + 0.5, code, -code], -1),
        POSITION: position,
        "mass": code * 2,
    }


def contents(store: Store) -> list[list[list[tuple[float, ...]]]]:
    """`[b][h]` sorted list of (position, key, value, mass)."""
    columns = [store.read(name) for name in (POSITION, KEY, VALUE, "mass")]
    live = store.live
    out = []
    for b in range(store.batch):
        out.append([])
        for h in range(store.heads):
            rows = [
                (int(p), *k.tolist(), *v.tolist(), float(m))
                for p, k, v, m, alive in zip(*(c[b, h] for c in columns), live[b, h], strict=True)
                if alive
            ]
            out[b].append(sorted(rows))
    return out


@settings(max_examples=120, deadline=None)
@given(data=st.data(), b=st.integers(1, 2), h=st.integers(1, 3))
def test_store_is_a_dictionary_of_tokens(data, b, h):
    store: Store = DenseStore(b, h)
    seen = 0
    rows = list(range(b))  # which original batch row each row is a copy of
    alive = [[set() for _ in range(h)] for _ in range(b)]
    for _ in range(data.draw(st.integers(1, 8))):
        t = data.draw(st.sampled_from([1, 1, 1, 3, 9]))
        new = tokens(b, h, seen, t)
        store.append({k: v[rows] for k, v in new.items()}, t, limit=data.draw(st.sampled_from([None, 6])))
        for r in range(b):
            for heads in alive[r]:
                heads.update(range(seen, seen + t))
        seen += t
        move = data.draw(st.sampled_from(["nothing", "one", "same", "differ", "drop", "rows"]))
        if move == "rows":
            chosen = data.draw(st.lists(st.integers(0, b - 1), min_size=b, max_size=b))
            store = store.map_rows(torch.tensor(chosen))
            rows = [rows[c] for c in chosen]
            alive = [copy.deepcopy(alive[c]) for c in chosen]
        elif move == "drop":
            some = isinstance(store, RaggedStore) and data.draw(st.booleans())
            slots = torch.full((b, h), -1)
            for r in range(b):
                for i in range(h):
                    if len(alive[r][i]) > 1 and not (some and data.draw(st.booleans())):
                        slots[r, i] = data.draw(st.integers(0, len(alive[r][i]) - 1))
                        alive[r][i].remove(int(store.read(POSITION)[r, i, slots[r, i]]))
            if isinstance(store, RaggedStore) or bool((slots >= 0).all()):
                store.drop(slots)
        elif move != "nothing":
            drop = {"one": 1, "same": 4}.get(move)
            mask = store.live.clone()
            for r in range(b):
                for i in range(h):
                    slots = mask[r, i].nonzero().flatten().tolist()
                    count = data.draw(st.integers(0, len(slots) - 1)) if drop is None else min(drop, len(slots) - 1)
                    order = data.draw(st.permutations(slots))
                    mask[r, i, list(order[:count])] = False
                    kept = store.read(POSITION)[r, i][mask[r, i]].tolist()
                    alive[r][i] = set(kept)
            store = store.keep(mask, uniform=data.draw(st.booleans()))
        assert store.lengths.tolist() == [[len(s) for s in row] for row in alive]
        if data.draw(st.booleans()):
            continue  # nobody looks: what was dropped leaves its slot to the next token
        everything = tokens(b, h, 0, seen)
        for r, row in enumerate(contents(store)):
            for i, head in enumerate(row):
                assert [p for p, *_ in head] == sorted(alive[r][i])
                for p, k0, k1, v0, v1, v2, m in head:
                    code = float(everything[KEY][rows[r], i, p, 0])
                    assert (k0, k1, v0, v1, v2, m) == (code, code + 0.25, code + 0.5, code, -code, code * 2)
        for position in range(seen):
            slots = store.find(position)
            if slots is not None:
                want = everything["mass"][rows, :, position]
                assert torch.equal(store.at("mass", slots).double(), want.double())
            else:
                assert any(position not in head for row in alive for head in row)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), b=st.integers(1, 2), h=st.integers(1, 3), room=st.sampled_from([None, 1, 3, 9]))
def test_room_changes_where_tokens_lie_and_nothing_else(data, b, h, room):
    """Fitted to the byte after every cut, the same tokens in every head as in a store without."""
    fitted, plain = DenseStore(b, h, spare_share=4), DenseStore(b, h)
    for i in range(data.draw(st.integers(1, 8))):
        t = room if room is not None and data.draw(st.booleans()) else data.draw(st.sampled_from([1, 4]))
        for store in (fitted, plain):
            store.append(tokens(b, h, 10 * i, t), t)
        drop = data.draw(st.integers(0, fitted.n - 1))
        position = fitted.read(POSITION)
        gone = torch.stack([
            torch.stack([head[torch.tensor(data.draw(st.permutations(range(fitted.n))))[:drop]] for head in row])
            for row in position
        ])  # fmt: skip
        if drop == 1 and data.draw(st.booleans()):
            for store in (fitted, plain):
                victims = (store.read(POSITION) == gone).to(torch.uint8).argmax(-1)
                store.drop(victims, room if store is fitted else None)
        else:
            for store in (fitted, plain):
                mask = ~(store.read(POSITION)[..., None] == gone[:, :, None]).any(-1)
                assert store.keep(mask, room=room if store is fitted else None) is store
        assert contents(fitted) == contents(plain)
        if room is not None and drop:
            assert fitted.capacity == fitted.n + room
            assert fitted.bytes_of((KEY, VALUE)) == b * h * (fitted.n + room) * fitted.bytes_per_token
        for store in (fitted, plain):
            position = store.read(POSITION)
            assert not store.ordered or bool((position.diff(dim=-1) > 0).all())


def test_a_steady_stream_of_frames_copies_nothing():
    """Only the tokens that fill the gaps move."""
    store = DenseStore(1, 2, spare_share=4)
    g, buffers = torch.Generator().manual_seed(0), set()
    for i in range(30):
        store.append(tokens(1, 2, 8 * i, 8), 8)
        if store.n > 20:
            mask = torch.zeros(1, 2, store.n, dtype=torch.bool)
            mask.scatter_(2, torch.rand(1, 2, store.n, generator=g).argsort(-1)[..., :20], True)
            store.keep(mask, room=8)
            buffers.add(store.columns[KEY].data_ptr())
            assert (store.n, store.capacity) == (20, 28)
    assert len(buffers) == 1


@pytest.mark.parametrize("differ", [False, True], ids=["dense", "ragged"])
def test_memory_goes_down(differ):
    store: Store = DenseStore(1, 2)
    store.append(tokens(1, 2, 0, 1000), 1000)
    mask = torch.zeros(1, 2, 1000, dtype=torch.bool)
    mask[:, :, ::4] = True
    if differ:
        mask[0, 0, :100] = False
    store = store.keep(mask)
    assert isinstance(store, RaggedStore if differ else DenseStore)
    assert store.bytes_of((KEY, VALUE)) == int(mask.sum()) * store.bytes_per_token
    store.append(tokens(1, 2, 1000, 1), 1)
    assert store.bytes_of((KEY, VALUE)) <= 1.05 * (int(mask.sum()) + 2) * store.bytes_per_token + 16 * 20


def test_steady_state_copies_nothing():
    store: Store = DenseStore(1, 2)
    store.append(tokens(1, 2, 0, 64), 64, limit=65)
    store.append(tokens(1, 2, 64, 1), 1, limit=65)
    buffer = store.columns[KEY].data_ptr()
    for i in range(65, 165):
        mask = torch.ones(1, 2, 65, dtype=torch.bool)
        mask[0, 0, i % 60], mask[0, 1, (7 * i) % 60] = False, False
        store = store.keep(mask)
        store.append(tokens(1, 2, i, 1), 1, limit=65)
        assert store.columns[KEY].data_ptr() == buffer
        assert store.columns[KEY].shape[2] == 65


def stores_with_a_gap(h: int = 2) -> list[Store]:
    """A dense and a ragged one, from which the token at position 2 has just been dropped."""
    dense, ragged = DenseStore(1, h), DenseStore(1, h)
    for store in (dense, ragged):
        store.append(tokens(1, h, 0, 7), 7)
        store.append(tokens(1, h, 7, 1), 1)  # with room to spare
    mask = torch.ones(1, h, 8, dtype=torch.bool)
    mask[0, 0, 7] = False
    both = [dense, ragged.keep(mask)]
    for store in both:
        store.drop(torch.full((1, h), 2))
    return both


@pytest.mark.parametrize("which", [0, 1], ids=["dense", "ragged"])
def test_what_was_stored_in_inference_mode_can_be_looked_at_outside(which):
    with torch.inference_mode():
        store = stores_with_a_gap()[which]
    want = contents(stores_with_a_gap()[which])
    assert contents(store) == want
    assert contents(store) == want


@pytest.mark.parametrize("which", [0, 1], ids=["dense", "ragged"])
def test_a_failed_write_leaves_the_gap(which):
    store = stores_with_a_gap()[which]
    with pytest.raises(RuntimeError):
        store.append({**tokens(1, 2, 8, 1), VALUE: torch.zeros(1, 2, 1, 9)}, 1)
    assert contents(store) == contents(stores_with_a_gap()[which])


@pytest.mark.parametrize("which", [0, 1], ids=["dense", "ragged"])
def test_new_tokens_are_known_until_storage_changes(which):
    store = stores_with_a_gap()[which]
    store.append(tokens(1, 2, 8, 1), 1)
    store.write_new("mass", torch.full((1, 2, 1), 7.0))
    position, mass = store.read(POSITION), store.read("mass")
    assert (mass[position == 8] == 7).all()
    assert (mass[(position != 8) & store.live] != 7).all()
    store.pack()
    with pytest.raises(ValueError, match="0 tokens are new, not 1"):
        store.write_new("mass", torch.full((1, 2, 1), 9.0))


def test_records_may_come_from_another_device():
    rows, where = torch.zeros(4, device="meta"), torch.tensor([1, 2], device="meta")
    put(rows, where, torch.ones(1, 2, 1, dtype=torch.uint8))
