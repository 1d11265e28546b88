"""Learned surrogates of an oracle score: one small network per layer that reads the attention block's input.

A surrogate is a folder or a Hub repository with two files, in the layout of the published KVzap ones:
`config.json` with `model_type` ("kvzap"), `input_dim`, `output_dim`, `hidden_dim` (null for a linear surrogate) and
`n_modules`; `model.safetensors` with `layers.{i}.weight`, `layers.{i}.bias` (linear), or `layers.{i}.0.*` and
`layers.{i}.2.*` (mlp).

Shapes: `B` batch, `Hkv` key-value heads, `T` new tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from .errors import DataError, UnsupportedModelError

__all__ = ["KVzapSurrogate", "SurrogateShape", "shared"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class SurrogateShape:
    """What has to fit the model.

    Attributes:
        input_dim: hidden size of the model.
        output_dim: its key-value heads, `Hkv`.
        hidden_dim: units of the hidden layer; `None` for a linear surrogate.
        n_modules: its decoder layers.
    """

    input_dim: int
    output_dim: int
    hidden_dim: int | None
    n_modules: int

    @classmethod
    def read(cls, source: str | Path) -> SurrogateShape:
        """Read the configuration of a surrogate, not its weights.

        Raises:
            DataError: there is no such folder or repository, or it does not hold a KVzap surrogate.
        """
        return cls._parse(_folder(source) / CONFIG)

    @classmethod
    def _parse(cls, file: Path) -> SurrogateShape:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not valid JSON ({error})") from None
        kind = values.get("model_type") if isinstance(values, dict) else None
        if kind != "kvzap":
            raise DataError(f'{file} does not describe a KVzap surrogate: model_type must be "kvzap", not {kind!r}')
        read = {f.name: values.get(f.name) for f in fields(cls)}
        for name, value in read.items():
            optional = name == "hidden_dim" and value is None
            if not optional and (type(value) is not int or value < 1):
                raise DataError(f"{file}: {name} must be a whole number of 1 or more, not {value!r}")
        return cls(**read)

    def check_model(self, config: Any, source: str = "this surrogate") -> None:
        """Raise unless it was made for a model of this shape.

        Args:
            config: the `transformers` configuration of the decoder.
            source: how to call the surrogate in the message.

        Raises:
            UnsupportedModelError: hidden size, key-value heads or layers differ.
        """
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        want = (config.hidden_size, heads, config.num_hidden_layers)
        have = (self.input_dim, self.output_dim, self.n_modules)
        if have != want:
            raise UnsupportedModelError(
                f"kvzap: {source} was made for a model with hidden size {have[0]}, {have[1]} key-value heads and "
                f"{have[2]} layers, but this model has hidden size {want[0]}, {want[1]} key-value heads and {want[2]} "
                "layers; train one for it with `kvsieve train-kvzap`"
            )


class KVzapSurrogate(nn.Module):
    """Predicts the log of an oracle's score of every token from the input of each layer's attention block
    (KVzap, arXiv 2601.07891, section 3).

    Args:
        shape: dimensions. `hidden_dim=None`: one linear map per layer; else linear, GELU (exact), linear. Weights are
            random until they are loaded or trained.
    """

    def __init__(self, shape: SurrogateShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(self._module() for _ in range(shape.n_modules))
        self.requires_grad_(False)

    def _module(self) -> nn.Module:
        size, heads, hidden = self.shape.input_dim, self.shape.output_dim, self.shape.hidden_dim
        if hidden is None:
            return nn.Linear(size, heads)
        return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, heads))

    @property
    def kind(self) -> str:
        """`"linear"` or `"mlp"`."""
        return "linear" if self.shape.hidden_dim is None else "mlp"

    def forward(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Same as `score`."""
        return self.score(layer_idx, hidden)

    def score(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Predicted log score of every token.

        Args:
            layer_idx: index among the model's layers.
            hidden: `[B, T, input_dim]` input of that layer's attention block.

        Returns:
            `[B, Hkv, T]` float32 (float64 for float64 input), whatever the weights are kept in.

        Raises:
            UnsupportedModelError: there is no such layer, or the input has another width.
        """
        if not 0 <= layer_idx < len(self.layers) or hidden.shape[-1] != self.shape.input_dim:
            raise UnsupportedModelError(
                f"kvzap: this surrogate has {len(self.layers)} layers of input width {self.shape.input_dim}; it was "
                f"asked for layer {layer_idx} with input width {hidden.shape[-1]}"
            )
        module = self.layers[layer_idx]
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if isinstance(module, nn.Linear):
            return _linear(module, x).transpose(1, 2)
        assert isinstance(module, nn.Sequential)
        return _linear(module[2], gelu(_linear(module[0], x))).transpose(1, 2)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is created if needed."""
        from safetensors.torch import save_file

        target = Path(folder).expanduser()
        target.mkdir(parents=True, exist_ok=True)
        config = {"architectures": ["KVzapModel"], "model_type": "kvzap", **asdict(self.shape)}
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        save_file(tensors, target / WEIGHTS, {"format": "pt"})
        shared.cache_clear()

    @classmethod
    def load(
        cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KVzapSurrogate:
        """Read a surrogate.

        Args:
            source: a folder, or else the id of a Hub repository such as `"nvidia/KVzap-mlp-Qwen3-8B"`.
            device: where to put it.
            dtype: what to keep the weights in.

        Raises:
            DataError: there is no such folder or repository, it cannot be reached, or its files are not those of a
                KVzap surrogate.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = _folder(source)
        shape = SurrogateShape._parse(folder / CONFIG)
        with torch.device("meta"):
            surrogate = cls(shape)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{folder / WEIGHTS} cannot be read: {error}") from None
        want = {name: tuple(tensor.shape) for name, tensor in surrogate.state_dict().items()}
        have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if want != have:
            name = min(set(want.items()) ^ set(have.items()))[0]
            raise DataError(
                f"{folder / WEIGHTS} does not fit its {CONFIG}: {name} has shape {have.get(name, 'none')} where "
                f"{want.get(name, 'none')} is expected"
            )
        surrogate.load_state_dict(tensors, assign=True)
        return surrogate.to(device=device, dtype=dtype)


@lru_cache(maxsize=8)
def shared(source: str, device: torch.device, dtype: torch.dtype) -> KVzapSurrogate:
    """`KVzapSurrogate.load`, once per process for the same arguments, so that a policy can name a surrogate by path.
    `KVzapSurrogate.save` makes the next call load anew."""
    return KVzapSurrogate.load(source, device, dtype)


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    weight: Any = module.weight
    bias: Any = module.bias
    if weight.device != x.device:
        raise UnsupportedModelError(
            f"kvzap: the surrogate is on {weight.device} and the hidden states on {x.device}; move it there with .to()"
        )
    return linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _folder(source: str | Path) -> Path:
    """The local folder of a surrogate, downloaded if needed."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} is not a KVzap surrogate: it has no {' and no '.join(missing)}")
        return folder
    if not _HUB_ID.fullmatch(str(source)):
        raise DataError(
            f"there is no folder {source}; give the folder of a KVzap surrogate (`kvsieve train-kvzap` makes one), or "
            "the id of a Hub repository such as nvidia/KVzap-mlp-Qwen3-8B"
        )
    return _download(str(source))


@cache
def _download(repository: str) -> Path:
    """Both files of a Hub repository, from the local cache where they are current."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        files = [Path(hf_hub_download(repository, name)) for name in (CONFIG, WEIGHTS)]
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{repository} is not a folder here and could not be read from the Hugging Face Hub ({reason}). Check the "
            "name and the connection, or give the folder of a surrogate"
        ) from None
    return files[0].parent
