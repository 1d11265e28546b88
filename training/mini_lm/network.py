"""The network: a compact Llama whose weights are those of ``LlamaForCausalLM`` under shorter names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-5
OUTPUT_GAIN = 0.04  # of the last norm, at the start; the output matrix is the embedding matrix


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; the defaults give about 4 million parameters."""

    vocab: int = 4096
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 704
    context: int = 2048
    rope_base: float = 500000.0


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, RMS_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout (the first half of a head pairs with the second)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """One transformer layer: grouped-query attention and a gated MLP, both pre-normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        hidden, q_width, kv_width = (
            config.hidden,
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        )
        self.input_layernorm = RMSNorm(hidden)
        self.q_proj = nn.Linear(hidden, q_width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(hidden)
        self.gate_proj = nn.Linear(hidden, config.mlp, bias=False)
        self.up_proj = nn.Linear(hidden, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.input_layernorm(x)

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, length, heads, self.head_dim).transpose(1, 2)

        q = rotate(split(self.q_proj(h), self.heads), cos, sin)
        k = rotate(split(self.k_proj(h), self.kv_heads), cos, sin)
        v = split(self.v_proj(h), self.kv_heads)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class MiniLM(nn.Module):
    """Decoder-only language model with tied input and output embeddings."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden)
        frequency = config.rope_base ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angle = torch.arange(config.context).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Half-scale random matrices, those that write to the residual stream scaled by depth; embeddings of unit size.

        The embeddings must not be small beside what the layers add: then the tokens' identity drowns in the
        residual stream and copying does not appear. The gain of the last norm makes up for it at the output.
        """
        depth_scale = 1 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() != 2:
                continue
            std = 1.0 if name == "embed.weight" else 0.5 / math.sqrt(parameter.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= depth_scale
            nn.init.normal_(parameter, std=std)
        nn.init.constant_(self.norm.weight, OUTPUT_GAIN)

    def forward(self, ids: Tensor) -> Tensor:
        """Final hidden states, [batch, length, hidden]."""
        x = self.embed(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        """Next-token scores, [batch, length, vocab], in float32."""
        return F.linear(self(ids), self.embed.weight).float()

    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of every target, [batch, length], in float32."""
        logits = self.logits(ids)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def huggingface_config(config: ModelConfig) -> dict[str, object]:
    """``config.json`` of the export, in a form that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": RMS_EPS,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "float16",
    }


ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def huggingface_name(name: str) -> str:
    """The name that ``LlamaForCausalLM`` gives to one of our weights."""
    for part in ATTENTION_PARTS:
        name = name.replace(f".{part}.", f".self_attn.{part}.")
    for part in MLP_PARTS:
        name = name.replace(f".{part}.", f".mlp.{part}.")
    return "model." + name.replace("embed.", "embed_tokens.")


def huggingface_state(model: MiniLM, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The weights under the names of ``LlamaForCausalLM`` (the tied output matrix is left out)."""
    state = model.state_dict()
    return {huggingface_name(n): tensor.detach().to("cpu", dtype).contiguous() for n, tensor in state.items()}


def save_checkpoint(path: Path, model: MiniLM, **extra: object) -> None:
    """Writes weights and whatever else is needed to go on, replacing the file only when complete."""
    scratch = path.with_suffix(".part")
    torch.save({"config": asdict(model.config), "model": model.state_dict(), **extra}, scratch)
    scratch.replace(path)


def load_checkpoint(path: Path) -> tuple[MiniLM, dict[str, object]]:
    """The model of a checkpoint, and the checkpoint itself."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = MiniLM(ModelConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model, saved
