"""A piece of a Llama that one process runs: all of it, or some neighbouring layers of a pipeline."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from llamero.kernels.cross_entropy import Seen, Share, linear_cross_entropy, sharded_linear_cross_entropy
from llamero.model.attention import Documents
from llamero.model.device import brought
from llamero.model.dropout import SILENT, Noise
from llamero.model.llama import Llama


class Micro(NamedTuple):
    """What goes through a model at a time: documents that lie one after the other, and what is learned of them."""

    ids: Int[Tensor, " tokens"]
    lengths: tuple[int, ...]
    """Tokens of each document."""
    learned: Int[Tensor, " learned"]
    """Positions in `ids` whose next token is learned."""
    targets: Int[Tensor, " learned"]
    """That next token."""
    weights: Float[Tensor, " learned"]
    """How much it counts."""
    noise: Noise | None = None
    """What training leaves out or adds."""
    sources: Int[Tensor, " learned"] | None = None
    """Number of the source that each learned token is of; None where they are not told apart."""

    def to(self, device: torch.device) -> "Micro":
        """Return it on a device."""
        noise, sources = self.noise, self.sources
        if noise is not None:
            noise = replace(noise, keys=brought(noise.keys, device), lengths=brought(noise.lengths, device))
        ids, learned, targets, weights = (
            brought(tensor, device) for tensor in (self.ids, self.learned, self.targets, self.weights)
        )
        sources = sources if sources is None else brought(sources, device)
        return Micro(ids, self.lengths, learned, targets, weights, noise, sources)

    def padded(self, tokens: int) -> "Micro":
        """Return it with a last document of which nothing is learned, so that it has that many tokens."""
        missing = tokens - len(self.ids)
        if not missing:
            return self
        noise, extra = self.noise, self.ids.new_zeros(missing)
        if noise is not None:
            keys, lengths = torch.cat([noise.keys, extra]), torch.cat([noise.lengths, extra + missing])
            noise = replace(noise, keys=keys, lengths=lengths)
        return self._replace(ids=torch.cat([self.ids, extra]), lengths=(*self.lengths, missing), noise=noise)


class Part(nn.Module):
    """Neighbouring layers of a model, with its embedding before the first and norm, head and loss after the last.

    Args:
        llama: The model; its modules are shared, not copied.
        layers: Which of its layers.
        autocast: Precision of products; `None` is that of the weights.
    """

    def __init__(self, llama: Llama, layers: range, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == llama.config.num_layers
        self.tied = self.last and llama.lm_head.weight is llama.model.embed_tokens.weight
        """Whether the head's weight is the embedding's table, of which a last part that is not the first has a copy."""
        self._rotation: Callable[[Documents, torch.device], Tensor] = llama.document_rotation
        self._autocast, self._heads = autocast, llama.config.num_heads
        self._residual = llama.model.embed_tokens.weight.dtype  # whatever the weights are rounded to on their way here
        self.z_loss = 0.0
        """How much large logits cost."""
        self.tally: Float[Tensor, "kinds sources"] | None = None
        """What is added up by source on the way, see `Spread.losses`."""
        self.tensor: DeviceMesh | None = None
        """The processes that share this part's matrices."""
        self.spread: Placement = Replicate()
        """How the tokens of residuals lie over these processes."""
        self.micros: Sequence[Micro] = ()
        """What can go through, the same for all parts of a pipeline."""
        self.layers = nn.ModuleDict({str(number): llama.model.layers[number] for number in layers})
        if self.first or self.tied:
            self.embed_tokens = llama.model.embed_tokens
        if self.last:
            self.norm = llama.model.norm
            self.lm_head = llama.lm_head

    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters under their names in the whole model, in its order."""
        found = {canonical(name): parameter for name, parameter in self.named_parameters()}
        order = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        layers = [name for name in found if name not in order]
        return {name: found[name] for name in [order[0], *layers, *order[1:]] if name in found}

    def forward(self, x: Tensor | None, number: int | Tensor) -> Tensor:
        """Return what the next part needs, or of the last Σ weight·nll as a tensor of one element.

        Args:
            x: What the part before returned; nothing that counts for the first.
            number: Which of `micros` goes through.
        """
        micro = self.micros[int(number)]
        with self._precision(micro.ids.device):
            noise = self._noise(micro)
            if self.first:
                embedded = self.embed_tokens(micro.ids).to(self._residual)
                x = embedded if noise is None else noise.on_embeddings(embedded)
            device = micro.ids.device
            layout = Documents(micro.lengths).on(device)
            rotation = self._rotation(layout, device)
            for layer, block in self.layers.items():
                x = block(x, rotation, layout, None, SILENT if noise is None else noise.of_layer(int(layer)))
            assert x is not None
            return torch.stack([self._loss(self.norm(x), micro)]) if self.last else x

    def _noise(self, micro: Micro) -> Noise | None:
        """Return the noise on what of the tokens, and which of the heads, this process has."""
        if micro.noise is None or self.tensor is None:
            return micro.noise
        rank, size = self.tensor.get_local_rank(), self.tensor.size()
        tokens = len(micro.ids) // size
        rows = None if self.spread == Replicate() else slice(rank * tokens, (rank + 1) * tokens)
        return replace(micro.noise, rows=rows, first_head=rank * self._heads // size)

    def _loss(self, hidden: Tensor, micro: Micro) -> Tensor:
        weight: Tensor = self.lm_head.weight
        share = None
        if self.tensor is not None:
            if not isinstance(hidden, DTensor):
                hidden = DTensor.from_local(hidden, self.tensor, [self.spread], run_check=False)
            hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
            assert isinstance(weight, DTensor)
            whole, weight = weight.shape[0], weight.to_local()
            largest = -(-whole // self.tensor.size())
            share = Share(self.tensor.get_group(), min(whole, largest * self.tensor.get_local_rank()), largest)
        learned = hidden if len(micro.learned) == len(micro.ids) else hidden[micro.learned]
        learned = learned if self._autocast is None else learned.to(self._autocast)
        seen = None if self.tally is None else Seen.blank(learned, right=len(self.tally) > 1)
        about = micro.targets, micro.weights
        if self.first and share is None:
            loss = linear_cross_entropy(learned, weight, *about, self.z_loss, seen)
        else:
            loss = sharded_linear_cross_entropy(learned, weight, *about, share, self.z_loss, seen)
        if seen is not None:
            self._count(seen, micro)
        return loss

    def _count(self, seen: Seen, micro: Micro) -> None:
        """Add to the tally what was seen, by a product, which unlike atomics has one order of summation."""
        assert self.tally is not None
        sources = torch.zeros_like(micro.targets) if micro.sources is None else micro.sources
        belongs = sources[:, None] == torch.arange(self.tally.shape[1], device=sources.device)
        kinds = [seen.nll * micro.weights, seen.right]
        found = torch.stack([kind.double() for kind in kinds if kind is not None])
        self.tally += found @ belongs.double()

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self._autocast is None else torch.autocast(device.type, self._autocast)


def canonical(name: str) -> str:
    """Return the name that a parameter of a part has in the whole model and in checkpoints."""
    name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
    return name if name.startswith("lm_head.") else f"model.{name}"
