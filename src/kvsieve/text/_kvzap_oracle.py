"""The oracle that a KVzap surrogate imitates: KVzip+ (KVzap, arXiv 2601.07891, section 3.1).

The text is followed by an instruction to repeat it and by the text once more. A key is worth as much as the repeated
part attends to it, weighted by what its value adds to the residual stream.

Shapes: `H` query heads, `Hkv` key-value heads, `T` tokens of a text, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .. import hf
from ..cache import SieveCache
from ..errors import UnsupportedModelError, UnsupportedOperationError
from ..policy import Policy
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["KVzapTargets", "kvzap_targets", "listen", "listening"]


@dataclass
class KVzapTargets:
    """What the oracle says about one layer and one text.

    Attributes:
        hidden: `[T, hidden]` input of the attention block.
        target: `[Hkv, T]` float32 natural log of the KVzip+ score.
        key_norm: `[Hkv, T]` float32 L2 norm of the keys, to compare with.
    """

    hidden: Tensor
    target: Tensor
    key_norm: Tensor


@dataclass(frozen=True, eq=False)
class _Oracle(Scorer):
    """Listens at a cache that evicts nothing. Not a method: it sees the future, and keeps what it sees.

    Attributes:
        projections: by layer, the weight of the output projection, `[hidden, H * Dv]`.
        found: by layer, what it has seen.
    """

    wants_hidden: ClassVar[bool] = True

    projections: dict[int, Tensor]
    found: dict[int, KVzapTargets] = field(default_factory=dict)

    def observe(self, view: LayerView) -> None:
        before = view.seen - view.new
        if not before:
            empty = torch.empty(0)
            self.found[view.layer_idx] = KVzapTargets(view.hidden[0], empty, empty)
            return
        layer = self.found[view.layer_idx]
        length = layer.hidden.shape[0]
        if before == length:
            return  # the instruction
        heads, kv_heads = view.queries.shape[1], view.positions.shape[1]
        group = heads // kv_heads
        norm = view.hidden.float().norm(dim=-1)
        values = view.values[0, :, :length].float()
        outward = self.projections[view.layer_idx].float().unflatten(1, (kv_heads, group, values.shape[-1]))
        best = values.new_zeros(kv_heads, length)
        for g in range(group):
            # one head of every group at a time, because each projects a value in its own way
            weights = norm.new_zeros(1, heads, view.new)
            weights[:, g::group] = 1 / norm
            mass = view.attention_mass(weights=weights, reduce="max")[0, :, :length]
            size = torch.stack([(values[k] @ outward[:, k, g].T).norm(dim=-1) for k in range(kv_heads)])
            best = torch.maximum(best, mass.float() * size)
        layer.target = best.clamp_min(torch.finfo(torch.float32).tiny).log()
        layer.key_norm = view.keys[0, :, :length].float().norm(dim=-1)


def kvzap_targets(
    model: PreTrainedModel, token_ids: Tensor, instruction_ids: Tensor, begin_ids: Tensor | None = None
) -> dict[int, KVzapTargets]:
    """The oracle's verdict on one text, `log(max_jg a_ji ||W_O v_i|| / ||h_j||)` over queries `j` of the repeated text
    and query heads `g` of the group.

    The model is left as it was. No `N x N` matrix is formed.

    Args:
        model: a decoder-only model in evaluation mode.
        token_ids: `[T]` int64, the text.
        instruction_ids: `[I]` int64, put between the text and its repetition.
        begin_ids: `[S]` int64, put before the text (a beginning-of-sequence token); judged as a part of it.

    Returns:
        By layer index, for the layers whose cache can be managed; `S + T` tokens each.

    Raises:
        UnsupportedModelError: no output projection can be found in the model.
        UnsupportedOperationError: the model is in training mode.
    """
    with listening(model) as (cache, oracle):
        listen(model, cache, token_ids, instruction_ids, begin_ids)
        return oracle.found


def listen(model: PreTrainedModel, cache: SieveCache, text: Tensor, instruction: Tensor, begin: Tensor | None) -> None:
    """Feed a text, the instruction, and the text again, one forward pass each."""
    first = text if begin is None else torch.cat([begin, text])
    cache.reset()
    with torch.no_grad():
        for ids in (first, instruction, text):
            model.base_model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True)


@contextmanager
def listening(model: PreTrainedModel) -> Iterator[tuple[SieveCache, _Oracle]]:
    """A cache that evicts nothing and its oracle; afterwards the model is as it was."""
    if model.training:
        raise UnsupportedOperationError("targets come from inference: call model.eval() first")
    modules = list(model.modules())
    configs = {id(c): c for m in modules if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    implementations = [(config, config._attn_implementation) for config in configs.values()]
    marked = {id(module) for module in modules if hasattr(module, hf.BEFORE)}
    hooks = {id(module): set(module._forward_pre_hooks) for module in modules}
    try:
        oracle = _Oracle(_projections(model))
        yield SieveCache(model, Policy(oracle)), oracle
    finally:
        for config, implementation in implementations:  # parents come first, and pass theirs on to their parts
            config._attn_implementation = implementation
        for module in modules:
            if hasattr(module, hf.BEFORE) and id(module) not in marked:
                delattr(module, hf.BEFORE)
            for key in set(module._forward_pre_hooks) - hooks[id(module)]:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """By layer, the weight `[hidden, H * Dv]` that turns the heads' outputs into the residual stream's."""
    config = hf.text_config(model)
    found: dict[int, Tensor] = {}
    for index, module in hf.attention_modules(model).items():
        linear = next((m for n in ("o_proj", "dense", "out_proj") if (m := getattr(module, n, None)) is not None), None)
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != config.hidden_size:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no output projection that can be read as a matrix with "
                f"{config.hidden_size} rows (o_proj, dense or out_proj); quantized weights cannot be used"
            )
        found[index] = weight.detach()
    return found
