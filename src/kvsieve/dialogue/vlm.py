"""A SmolVLM or Idefics3 model with its tokenizer and pictures: what turns frames and lines into tokens and logits.

Needs neither torchvision nor the processor classes of `transformers` that do.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from .. import zoo
from ..errors import KvsieveError, PolicyError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..cache import SieveCache

__all__ = ["Picture", "StreamFormat", "VisionLanguageModel", "check_device", "dtype_of"]

_FAMILIES = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}
_END = "<end_of_utterance>"
_SILENT = "<silent>"
_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True)
class Picture:
    """A frame as the model takes it.

    Attributes:
        pixels: `[1, tiles, 3, height, width]` float.
        mask: `[1, tiles, height, width]`, true where there is picture and no padding; None if there is no padding.
        text: what stands for it in the text.
    """

    pixels: Tensor
    mask: Tensor | None
    text: str


@dataclass(frozen=True)
class StreamFormat:
    """How a stream is written down.

    Attributes:
        opening: in front of everything.
        before: in front of every frame.
        after: behind every frame, where the model decides whether to speak.
        silence: the token that means "nothing to say", as the first one after a frame.
        end: the token that ends a line.
    """

    opening: str
    before: str
    after: str
    silence: int
    end: int

    def turn(self, role: str, text: str) -> str:
        """A line of the conversation."""
        return f"{role.capitalize()}: {text}{_END}\n"


class VisionLanguageModel:
    """The model and everything around it.

    A model that was trained to stay silent has a token `<silent>`: a frame is then a picture and that token, or a
    picture and a line. With other models a frame is a turn of the user, and to be silent is to end the answer at once.

    Args:
        model: a `SmolVLMForConditionalGeneration` or `Idefics3ForConditionalGeneration`.
        tokenizer: its tokenizer.
        processor: its image processor (the one that works on PIL images).
        split_images: cut frames into tiles, as the model does for single pictures; by default a frame is one tile.

    Raises:
        UnsupportedModelError: another kind of model, or one without vision.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, processor: Any, split_images: bool = False
    ) -> None:
        _check(model.config)
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.split_images = split_images
        self.image_token: int = model.config.image_token_id
        self.tokens_per_tile: int = model.model.image_seq_len
        self.side: int = model.config.vision_config.image_size
        self.format = self._format()
        self._image = str(tokenizer.convert_ids_to_tokens(self.image_token))
        self._marked = self._id(_AROUND) is not None
        self._mean, self._std = (
            torch.tensor(np.float32(v)).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
        )

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
        split_images: bool = False,
    ) -> VisionLanguageModel:
        """Load a bundled model (`"mini-vlm"`), a folder, or a model of the hub.

        Args:
            device: where to put it.
            dtype: of the weights; float32 by default on the CPU, bfloat16 elsewhere.
            cache_dir: where downloads are kept.
            split_images: see the class.

        Raises:
            KvsieveError: the model cannot be found or read.
            UnsupportedModelError: it is not a SmolVLM or Idefics3 model.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

        device = check_device(device)
        bundled = str(name) in zoo.list_models()
        source = str(zoo.path(str(name)) if bundled else name)
        if not bundled and not Path(source).exists() and source.count("/") != 1:
            raise KvsieveError(
                f"there is no model {source!r}: give a folder, a name of the hub such as "
                f"'HuggingFaceTB/SmolVLM2-2.2B-Instruct', or a bundled model ({', '.join(zoo.list_models('vision'))})"
            )
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        where: dict[str, Any] = {"cache_dir": cache_dir} if cache_dir else {}
        where |= {"local_files_only": True} if bundled else {}
        try:
            config = AutoConfig.from_pretrained(source, **where)
            _check(config)
            model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **where)
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            processor = _processor_class(config.model_type).from_pretrained(source, **where)
        except UnsupportedModelError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise KvsieveError(f"the model {source!r} cannot be loaded: {error}") from error
        return cls(model.to(device), tokenizer, processor, split_images)

    def check_same(self, device: str, dtype: torch.dtype | None, cache_dir: str | None, split_images: bool) -> None:
        """Raise where this model is asked for otherwise than it was loaded; see `load`.

        Raises:
            PolicyError: it is.
        """
        wrong = {
            "device": device != "cpu" and torch.device(check_device(device)).type != self.model.device.type,
            "torch_dtype": dtype not in (None, self.model.dtype),
            "cache_dir": cache_dir is not None,
            "split_images": split_images and not self.split_images,
        }
        names = [name for name, differs in wrong.items() if differs]
        if names:
            raise PolicyError(f"the model is loaded already, without regard to {', '.join(names)}; load it as wanted")

    # ---- words

    def encode(self, text: str) -> list[int]:
        """Token ids, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        """What a line says, without marks and without the name of the speaker."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return text.removeprefix("Assistant:").strip()

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return found if isinstance(found, int) and found != self.tokenizer.unk_token_id else None

    def _format(self) -> StreamFormat:
        end, silence = self._id(_END), self._id(_SILENT)
        if end is None:
            raise UnsupportedModelError(
                f"the tokenizer has no {_END}, which ends a line of SmolVLM and Idefics3 models"
            )
        opening = str(self.tokenizer.bos_token or "")
        if silence is not None:
            return StreamFormat(opening, "", "", silence, end)
        return StreamFormat(opening, "User:", f"{_END}\nAssistant:", end, end)

    # ---- pictures

    def picture(self, frame: NDArray[np.uint8]) -> Picture:
        """A frame `[height, width, 3]` as the model takes it."""
        if not self.split_images and frame.shape == (self.side, self.side, 3):
            pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float()
            pixels = (pixels * self.processor.rescale_factor - self._mean) / self._std
            return Picture(self._moved(pixels[None, None]), None, self._text(0, 0))
        try:
            from PIL import Image
        except ImportError as error:
            raise KvsieveError("resizing frames needs pillow: pip install 'kvsieve[vlm]'") from error
        edge = {"longest_edge": self.side}
        whole: dict[str, Any] = {} if self.split_images else {"size": edge, "max_image_size": edge}
        out = self.processor(
            [[Image.fromarray(frame)]],
            do_image_splitting=self.split_images,
            return_row_col_info=True,
            return_tensors="pt",
            **whole,
        )
        rows, columns = (int(out[name][0][0]) for name in ("rows", "cols"))
        mask = out.get("pixel_attention_mask")
        mask = None if mask is None or bool(mask.all()) else mask.bool().to(self.model.device)
        return Picture(self._moved(out["pixel_values"]), mask, self._text(rows, columns))

    def _moved(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.model.device, self.model.dtype)

    def _text(self, rows: int, columns: int) -> str:
        """The tokens of a picture, with the marks of its tiles where the model has any."""
        tile = self._image * self.tokens_per_tile
        if not self._marked:
            return tile
        lines = [
            "".join(f"{_AROUND}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        ]
        return "".join(lines) + ("\n" if lines else "") + f"{_AROUND}{_WHOLE}{tile}{_AROUND}"

    # ---- a step

    @torch.no_grad()
    def forward(self, ids: list[int], pictures: list[Picture], cache: SieveCache, position: int) -> Tensor:
        """Feed tokens, and the pictures that stand among them; `[vocabulary]` float32 logits after the last one.

        Args:
            position: rotary position of the first of them.
        """
        inputs: dict[str, Any] = {}
        if pictures:
            inputs["pixel_values"] = torch.cat([picture.pixels for picture in pictures], 1)
            if any(picture.mask is not None for picture in pictures):
                inputs["pixel_attention_mask"] = torch.cat([_mask(picture) for picture in pictures], 1)
        device = self.model.device
        positions = torch.arange(position, position + len(ids), device=device)[None]
        out = self.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        logits: Tensor = out.logits[0, -1].float()
        return logits


def check_device(device: str) -> str:
    """The device, if it is there.

    Raises:
        KvsieveError: it is not.
    """
    name = str(device)
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).splitlines()[0]
        raise KvsieveError(f"device={device!r} is not there, use 'cpu', or 'cuda' with a GPU: {reason}") from None
    return name


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """The type of weights that a name means.

    Raises:
        PolicyError: it means none.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PolicyError(f"torch_dtype={name!r} is no type of weights; use 'float32', 'bfloat16' or 'float16'")
    return found


def _check(config: Any) -> None:
    kind = getattr(config, "model_type", "")
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(f"a model of type {kind!r} has no vision; video needs a SmolVLM or Idefics3 model")
    if kind not in _FAMILIES:
        raise UnsupportedModelError(f"models of type {kind!r} are not supported; use a SmolVLM or Idefics3 model")


def _processor_class(kind: str) -> Any:
    """The image processor that works without torchvision."""
    family = _FAMILIES[kind]
    module = importlib.import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    return getattr(module, f"{family}ImageProcessorPil")


def _mask(picture: Picture) -> Tensor:
    if picture.mask is not None:
        return picture.mask
    pixels = picture.pixels
    return torch.ones(*pixels.shape[:2], *pixels.shape[3:], dtype=torch.bool, device=pixels.device)
