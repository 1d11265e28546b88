"""Pictures, words and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

import conftest
from kvsieve.dialogue.context import StreamContext
from kvsieve.dialogue.factory import PolicyStrategy
from kvsieve.dialogue.runner import VLMStreamRunner
from kvsieve.dialogue.vlm import VisionLanguageModel, check_device, dtype_of
from kvsieve.errors import KvsieveError, PolicyError, UnsupportedModelError


@pytest.fixture
def saved(vlm: VisionLanguageModel, tmp_path: Path) -> Path:
    vlm.model.save_pretrained(tmp_path)
    vlm.tokenizer.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    return tmp_path


def test_the_fast_path_is_what_the_processor_makes(vlm: VisionLanguageModel, idefics: VisionLanguageModel) -> None:
    frame = conftest.frames(1)[0]
    for one in (vlm, idefics):
        picture = one.picture(frame)
        edge = {"longest_edge": one.side}
        want = one.processor(
            [[Image.fromarray(frame)]], do_image_splitting=False, size=edge, max_image_size=edge, return_tensors="pt"
        )["pixel_values"]
        assert picture.mask is None
        torch.testing.assert_close(picture.pixels, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (20, 20), (48, 30), (31, 90)])
def test_frames_of_other_sizes_are_resized(hub: VisionLanguageModel, size: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = hub.picture(frame)
    assert picture.pixels.shape == (1, 1, 3, 32, 32)
    assert picture.text == hub.picture(conftest.frames(1)[0]).text
    context = StreamContext(hub, PolicyStrategy("full"))
    assert context.feed(hub.encode(picture.text), (picture,)).isfinite().all()


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_split_frames_have_the_tokens_the_model_expects(family: str) -> None:
    made = conftest.build(family, hub=True)
    tiled = VisionLanguageModel(made.model, made.tokenizer, made.processor, split_images=True)
    for size in ((64, 64), (32, 32), (40, 64)):
        frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        picture = tiled.picture(frame)
        tiles = picture.pixels.shape[1]
        ids = tiled.encode(picture.text)
        assert ids.count(tiled.image_token) == tiles * tiled.tokens_per_tile
        assert tiles > 1
        context = StreamContext(tiled, PolicyStrategy("full"))
        assert context.feed(ids, (picture,)).isfinite().all()
    out = VLMStreamRunner(tiled, context_strategy_type="drop_all", max_new_tokens=4, max_seq_len=80, reserved_seq_len=8)
    assert len(out.run_inference_on_video(conftest.video(5))["predictions"]) == 5


def test_the_text_of_a_picture_is_that_of_the_family(hub: VisionLanguageModel, vlm: VisionLanguageModel) -> None:
    for rows, columns in ((0, 0), (1, 2), (2, 2), (3, 4)):
        want = get_image_prompt_string(rows, columns, 4, "<fake_token_around_image>", "<image>", "<global-img>")
        assert hub._text(rows, columns) == want
    assert vlm.picture(conftest.frames(1)[0]).text == "<image>" * 4


def test_words(vlm: VisionLanguageModel, hub: VisionLanguageModel) -> None:
    ids = vlm.encode("Assistant: place red<end_of_utterance>")
    assert vlm.decode(ids) == "place red"
    assert vlm.decode(vlm.encode("place red")) == "place red"
    assert vlm.format.turn("user", "go on") == "User: go on<end_of_utterance>\n"
    assert vlm.format.silence == vlm.tokenizer.convert_tokens_to_ids("<silent>")
    assert hub.format.silence == hub.format.end
    assert (hub.format.before, hub.format.after) == ("User:", "<end_of_utterance>\nAssistant:")


def test_a_folder(saved: Path, vlm: VisionLanguageModel) -> None:
    made = VisionLanguageModel.load(saved)
    frame = conftest.frames(1)[0]
    assert torch.equal(made.picture(frame).pixels, vlm.picture(frame).pixels)
    record = conftest.video(6)
    outs = [VLMStreamRunner(one, max_new_tokens=4).run_inference_on_video(record) for one in (made, vlm)]
    first, second = ([one.silence for one in out["predictions"]] for out in outs)
    assert first == pytest.approx(second, rel=1e-4)
    half = VLMStreamRunner(saved, torch_dtype="bfloat16", max_new_tokens=4)
    assert (half.vlm.model.dtype, half.settings["dtype"], half.settings["model"]) == (
        torch.bfloat16,
        "bfloat16",
        str(saved),
    )


def test_what_cannot_be_loaded(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(KvsieveError, match="there is no model 'no-such-model'"):
        VLMStreamRunner("no-such-model")
    with pytest.raises(KvsieveError, match="cannot be loaded"):
        VisionLanguageModel.load(tmp_path.parent)
    (saved / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(KvsieveError, match="cannot be loaded"):
        VisionLanguageModel.load(saved)
    LlamaConfig().save_pretrained(saved)
    with pytest.raises(UnsupportedModelError, match="'llama' has no vision"):
        VisionLanguageModel.load(saved)


def test_models_that_will_not_do(vlm: VisionLanguageModel, hub: VisionLanguageModel) -> None:
    text = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UnsupportedModelError, match="has no vision"):
        VisionLanguageModel(text, vlm.tokenizer, vlm.processor)

    class Other:
        config = AutoConfig.for_model("llava")

    with pytest.raises(UnsupportedModelError, match="'llava' are not supported"):
        VisionLanguageModel(Other(), vlm.tokenizer, vlm.processor)
    bare = PreTrainedTokenizerFast(tokenizer_object=_without_end(), unk_token="<unk>")
    with pytest.raises(UnsupportedModelError, match="no <end_of_utterance>"):
        VisionLanguageModel(vlm.model, bare, vlm.processor)


def _without_end() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3, "<image>": 4}, unk_token="<unk>"))


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "gpu", ""])
def test_devices_that_are_not_there(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(KvsieveError, match="is not there"):
        VLMStreamRunner("mini-vlm", device=device)
    assert check_device("cpu") == "cpu"


def test_types_of_weights(vlm: VisionLanguageModel) -> None:
    assert dtype_of("torch.float16") is dtype_of("float16") is torch.float16
    assert dtype_of(None) is None
    for wrong in ("int8", "half-ish", "nn"):
        with pytest.raises(PolicyError, match="no type of weights"):
            dtype_of(wrong)
    for asked in ({"torch_dtype": "bfloat16"}, {"split_images": True}, {"cache_dir": "x"}):
        with pytest.raises(PolicyError, match="loaded already, without regard to " + next(iter(asked))):
            VLMStreamRunner(vlm, **asked)  # type: ignore[arg-type]
    VLMStreamRunner(vlm, torch_dtype="float32", device="cpu")
