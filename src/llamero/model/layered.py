"""A model of which one decoder layer is in memory at a time, quantized or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from llamero.model.linear import PackedLinear
from llamero.model.llama import Block, Llama
from llamero.model.load import EMBEDDING, check_codes, open_model, put, stored_names

_TABLE = EMBEDDING.removesuffix("weight")


class Layered:
    """The parts of a model, each read when it is asked for and let go after.

    Packed layers are dequantized once as they come: who walks through a model sends much through each of them.

    Args:
        directory: Of the model.
        dtype: To compute in.
        device: Where to compute.
    """

    def __init__(
        self, directory: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._model, self._tensors, _ = open_model(directory, dtype=dtype)
        self.config = self._model.config
        self._stored = stored_names(self._model, self._tensors)

    @contextmanager
    def embedding(self) -> Iterator[Llama]:
        """Lend the model with nothing in it but the embedding and the last normalization, in the dtype of the files."""
        with self._filled(_TABLE, "model.norm.", dtype=None):
            yield self._model

    @contextmanager
    def layer(self, number: int) -> Iterator[Block]:
        """Lend a decoder layer."""
        prefix = f"model.layers.{number}."
        with self._filled(prefix, dtype=self.dtype):
            block = self._model.get_submodule(prefix.removesuffix("."))
            assert isinstance(block, Block)
            check_codes(self._model, self._tensors, prefix)
            coded = {n: m for n, m in block.named_modules() if isinstance(m, PackedLinear)}
            for name, module in coded.items():
                block.set_submodule(name, module.dense(self.dtype))
            try:
                yield block.eval()
            finally:
                for name, module in coded.items():
                    block.set_submodule(name, module)

    @contextmanager
    def end(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Lend the last normalization and the head."""
        tied = (_TABLE,) if self.config.tie_word_embeddings else ()
        with self._filled("model.norm.", "lm_head.", *tied, dtype=self.dtype):
            self._model.tie()
            head = self._model.lm_head
            yield self._model.model.norm, head.dense(self.dtype) if isinstance(head, PackedLinear) else head

    @contextmanager
    def _filled(self, *prefixes: str, dtype: torch.dtype | None) -> Iterator[None]:
        """Give the parameters under some names their tensors for a while."""
        names = [name for name in self._stored if name.startswith(prefixes)]
        for name in names:
            put(self._model, name, self._tensors, self._stored[name], dtype=dtype, device=self.device)
        try:
            yield
        finally:
            for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
                self._model.get_submodule(owner).to("meta")
            self._model.tie()
