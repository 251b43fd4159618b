"""One module tree that runs the weights of several models.

Two small models take the time of Python and of hundreds of tiny operations twice. A `Shell` is the tree of one of
them with every module that has weights replaced by one that runs each member's own module on that member's tokens;
whatever has none (rotary embedding, attention, activations, residuals) runs once for all of them, as transformers
wrote it. Nothing is copied but the weights of norms (kilobytes, which the memory plan leaves out), nothing is padded,
and each matrix meets the rows that it would meet alone, so that results are the same bits.

    packed row:    a a a | b | c c      tokens of members a, b, c
    linear layer:  A(a a a), B(b), C(c c), side by side again
    norm:          (a a a b c c) / size, times [A A A B C C]

Measured on a 2-core AVX-512 machine with one thread, two models of 5M parameters (hidden 128, 6 layers, vocabulary
32,000), one after the other / together, for 1, 8, 32 tokens of each: float32 1.30, 1.22, 1.12, bfloat16 1.25, 1.19,
1.13. Stacked weights and batched products instead of one product per member gave 1.05 more in float32 at 1 and 8
tokens, 0.9 at 32 tokens of models of 15M, and would need equal numbers of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxyserve.engine.adapters import adapter_plan
from proxyserve.engine.attention import Plan, attention_plan
from proxyserve.engine.heads import HeadRows, head_rows
from proxyserve.engine.packed_row import PackedRow

#: Tokens of all members up to which a norm's weights are gathered; beyond, each member's own norm runs.
_GATHERED = 256


#: A member's own layers, each with what runs it.
Seat = list[tuple["MemberLayers", nn.Module]]


class NotAlike(Exception):
    """Why models cannot run together."""


@dataclass(slots=True)
class Turn:
    """Whose tokens the forward under way has: of each member that takes part its place, how many tokens, how many of
    them need logits, and what goes through its head in their stead. `owners` [tokens] int64 is the place of each
    token's member. Heads leave their rows in `logits`, of each member [rows, width]."""

    members: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    heads: list[HeadRows | None] = field(default_factory=list)
    tokens: int = 0
    owners: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    logits: list[Tensor] = field(default_factory=list)


class Shell:
    """Members have places 0, 1, …; the place of one that was removed goes to the next that comes. Not thread-safe."""

    def __init__(self, like: PreTrainedModel) -> None:
        """For models like this one, which is not a member yet. Raises NotAlike if its tree is of no use."""
        self.turn = Turn()
        self._device = like.device
        #: Whether the model's logits are what its head puts out, with nothing done to them afterwards.
        self.bare = False
        self._leaves: dict[str, MemberLayers] = {}
        self._signature = _signature(like)
        self._buffers = dict(like.named_buffers())
        self._taken: list[bool] = []
        self._module = self._twin(like, "", like.get_output_embeddings())

    def _twin(self, module: nn.Module, path: str, head: nn.Module | None) -> nn.Module:
        own = [name for name, weight in module.named_parameters(recurse=False)]
        own += [name for name, value in vars(module).items() if isinstance(value, Tensor)]
        children = dict(module.named_children())
        if children:
            if own:
                raise NotAlike(f"{path} has weights of its own beside those of its parts")
            twin = copy.copy(module)
            prefix = f"{path}." if path else ""
            twin._modules = {
                name: None if child is None else self._twin(child, prefix + name, head)
                for name, child in module._modules.items()
            }
            return twin
        if not own:
            return module
        leaf: MemberLayers
        if module is head:
            leaf = HeadPerMember(self)
        elif type(module) is nn.Linear and type(module.weight) is nn.Parameter:  # not quantised
            leaf = LinearPerMember(self)
        elif _is_norm(module):
            leaf = NormPerMember(self, module)
        else:
            leaf = PerMember(self)
            leaf.takes_residual = getattr(module, "takes_residual", False)
        self._leaves[path] = leaf
        return leaf

    def seat(self, module: PreTrainedModel) -> Seat:
        """What `add` needs of a member to be. Any thread may ask. Raises NotAlike if the model differs from the others
        in more than weights."""
        for mine, other in zip_longest(self._signature, _signature(module)):
            if mine is None or other is None or mine[0] != other[0]:
                raise NotAlike(f"only one has {(other or mine)[0]}")
            if mine != other:
                raise NotAlike(f"{mine[0] or 'the model'} is {mine[1]} in one and {other[1]} in the other")
        for name, buffer in module.named_buffers():
            if not torch.equal(buffer, self._buffers[name]):
                raise NotAlike(f"the buffer {name} is not the same in both")
        parts = dict(module.named_modules(remove_duplicate=False))
        return [(leaf, parts[path]) for path, leaf in self._leaves.items()]

    def add(self, seat: Seat) -> int:
        """The place of a new member."""
        place = self._taken.index(False) if False in self._taken else len(self._taken)
        self._taken[place:] = [True, *self._taken[place + 1 :]]
        for leaf, part in seat:
            leaf.put(place, part)
        return place

    def remove(self, place: int) -> None:
        """Let go of a member's weights."""
        self._taken[place] = False
        for leaf in self._leaves.values():
            leaf.put(place, None)

    def compute(self, rows: Mapping[int, PackedRow], plan: Plan) -> list[Tensor]:
        """The logits of packed rows by the places of their members; `plan` is that of all their spans. Must be called
        in inference mode."""
        turn, device = self.turn, self._device
        turn.members, turn.counts = list(rows), [len(row.ids) for row in rows.values()]
        turn.wanted = [len(row.wanted) for row in rows.values()]
        turn.heads = [row.heads for row in rows.values()]
        turn.tokens = sum(turn.counts)
        owners = [place for place, row in rows.items() for _ in row.ids]
        turn.owners = torch.tensor(owners, device=device)
        starts = accumulate(turn.counts, initial=0)
        wanted = [
            start + place for start, row in zip(starts, rows.values(), strict=False) for place in row.wanted
        ]
        try:
            with attention_plan(plan), adapter_plan(*(row.adapters for row in rows.values())):
                output = self._module(
                    input_ids=torch.tensor(
                        [[token for row in rows.values() for token in row.ids]], device=device
                    ),
                    position_ids=torch.tensor(
                        [[position for row in rows.values() for position in row.positions]], device=device
                    ),
                    use_cache=False,
                    # An empty index would make some classes compute all rows.
                    logits_to_keep=torch.tensor(wanted or [turn.tokens - 1], device=device),
                )
            if self.bare:
                return list(turn.logits)
            return list(output.logits[0].split([row.rows for row in rows.values()]))
        finally:
            turn.logits = []


class MemberLayers(nn.Module):
    """Takes the place of a layer that computes token by token, and has each member's own."""

    def __init__(self, shell: Shell) -> None:
        super().__init__()
        self._turn = shell.turn
        self._own: list[Any] = []  # no submodules: they are not this tree's
        #: As the layers say of themselves.
        self.takes_residual = False

    def put(self, place: int, module: nn.Module | None) -> None:
        """Set the member's layer; None lets go of it."""
        self._own[place:] = [module, *self._own[place + 1 :]]

    def _apart(self, axis: int, *inputs: Tensor) -> Tensor:
        turn = self._turn
        parts = zip(turn.members, *(each.split(turn.counts, axis) for each in inputs), strict=True)
        return torch.cat([self._own[place](*its) for place, *its in parts], axis)


class PerMember(MemberLayers):
    """Runs each member's own layer on its tokens."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Each [1, tokens, ...] -> [1, tokens, ...]"""
        return self._apart(1, *inputs)


class LinearPerMember(MemberLayers):
    """Plain linear layers, whose products can be written where they belong."""

    def forward(self, inputs: Tensor) -> Tensor:
        turn, flat = self._turn, inputs[0]
        outputs = flat.new_empty(turn.tokens, self._own[turn.members[0]].out_features)
        start = 0
        for place, count in zip(turn.members, turn.counts, strict=True):
            own, stop = self._own[place], start + count
            if own._forward_hooks:  # adapters
                outputs[start:stop] = own(inputs[:, start:stop])[0]
            elif own.bias is None:
                torch.mm(flat[start:stop], own.weight.t(), out=outputs[start:stop])
            else:
                torch.addmm(own.bias, flat[start:stop], own.weight.t(), out=outputs[start:stop])
            start = stop
        return outputs[None]


class NormPerMember(MemberLayers):
    """Norms of a class of transformers' own, with one weight per feature. Written in Python as they are, one call is
    worth more than a copy of the weights for each token."""

    def __init__(self, shell: Shell, like: nn.Module) -> None:
        super().__init__(shell)
        self._like = copy.copy(like)
        self._like._parameters = {}
        self._weights: Tensor | None = None
        #: Where the tokens are: [1, tokens, size], or with heads on either side of them.
        self._axis: int | None = None

    def put(self, place: int, module: nn.Module | None) -> None:
        super().put(place, module)
        self._weights = None

    def forward(self, inputs: Tensor) -> Tensor:
        turn = self._turn
        axis = self._axis
        if axis is None:
            axes = [number for number, size in enumerate(inputs.shape[:-1]) if size == turn.tokens]
            axis = axes[0]
            if len(axes) == 1:  # neither one token, which any axis does for, nor as many as heads
                self._axis = axis
        if turn.tokens > _GATHERED:
            return self._apart(axis, inputs)
        if self._weights is None:
            known = self._own[turn.members[0]]
            self._weights = torch.stack([(own or known).weight.detach() for own in self._own])
        weights = self._weights.index_select(0, turn.owners)
        if inputs.dim() == 4 and axis == 1:
            weights = weights[:, None]
        self._like.__dict__["weight"] = weights
        output: Tensor = self._like(inputs)
        return output


class HeadPerMember(MemberLayers):
    """Takes the place of the head. Its rows are those that need logits."""

    def __init__(self, shell: Shell) -> None:
        super().__init__(shell)
        self._shell = shell

    def forward(self, inputs: Tensor) -> Tensor:
        turn = self._turn
        start = 0
        for place, count, heads in zip(turn.members, turn.wanted, turn.heads, strict=True):
            own = self._own[place]
            if count:
                with head_rows(heads):
                    turn.logits.append(own(inputs[:, start : start + count])[0])
            else:
                turn.logits.append(inputs.new_empty(0, own.out_features))
            start += count
        # A copy of all logits, for what the class may do to them.
        return turn.logits[0][None, :0] if self._shell.bare else torch.cat(turn.logits)[None]


def _is_norm(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.") or [*module._parameters] != ["weight"]:
        return False
    return isinstance(module.weight, Tensor) and module.weight.dim() == 1


def _signature(module: PreTrainedModel) -> list[tuple[str, str]]:
    """Of all parts and tensors of a model: names, and what they are."""
    parts = [(name, _kind(part)) for name, part in module.named_modules()]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return parts + [(name, f"{tensor.dtype} {tuple(tensor.shape)}") for name, tensor in tensors]


def _kind(part: nn.Module) -> str:
    """Layers in a library's own form need not have parameters, but say their sizes."""
    sizes = [getattr(part, name) for name in ("in_features", "out_features") if hasattr(part, name)]
    return f"{type(part).__name__}({', '.join(map(str, sizes))})"
