"""A causal text encoder that encodes each common beginning of prompts once, and only the wanted positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


MASKABLE = ("eager", "sdpa")


class Trees(NamedTuple):
    """Prompts as trees: a node is a token after a given beginning, so that equal beginnings share nodes."""

    tokens: Tensor  # `(trees, nodes)`, int64, each node's token; 0 for filler
    # `(trees, nodes, nodes)`, bool, which nodes each node attends to: itself and those before it
    seen: Tensor
    # `(prompts, positions)`, int64, the node of each position, numbered through all trees; −1 for
    # positions that are not wanted
    places: Tensor

    @classmethod
    def of(cls, ids: Tensor, wanted: Sequence[int]) -> Trees:
        """The trees of the first `wanted` tokens of each row of `ids` `(prompts, positions)`."""
        size = ids.shape[1]  # nodes of a tree: any row fits into one
        trees: list[dict[tuple[int, int], int]] = []  # (node before, token) -> node
        places = torch.full(ids.shape, -1)
        rows = ids.tolist()
        # 1. Insert the prompts in sorted order, which puts those that begin alike into the same tree.
        for row in sorted(range(len(rows)), key=rows.__getitem__):
            path = rows[row][: wanted[row]]
            if not trees or len(trees[-1]) + _added(trees[-1], path) > size:
                trees.append({})
            node = -1
            for position, token in enumerate(path):
                node = trees[-1].setdefault((node, token), len(trees[-1]))
                places[row, position] = (len(trees) - 1) * size + node
        # 2. A node sees itself and everything that the node before it sees.
        tokens = torch.zeros(len(trees), size, dtype=torch.int64)
        seen = torch.eye(size, dtype=torch.bool).repeat(len(trees), 1, 1)
        for tree, nodes in enumerate(trees):
            for node, (before, token) in enumerate(nodes):
                tokens[tree, node] = token
                if before >= 0:
                    seen[tree, node] |= seen[tree, before]
        return cls(tokens, seen, places)


def _added(tree: dict[tuple[int, int], int], path: Sequence[int]) -> int:
    """How many nodes a prompt's tokens would add to a tree."""
    node = -1
    for position, token in enumerate(path):
        if (node, token) not in tree:
            return len(path) - position
        node = tree[node, token]
    return 0


class PrefixEncoder(nn.Module):
    """
    Stands in for a pipeline's `CLIPTextModel`, whose attention takes a mask, within `encode_prompt`.

    CLIP is causal: a feature depends on the tokens up to its position and on nothing after it. So prompts
    that begin alike share features there, and padding that is not wanted costs nothing. The results are the
    encoder's own, up to rounding, at as many first positions of each prompt as are `wanted`, and zero at the
    others.
    """

    def __init__(self, encoder: nn.Module, wanted: Sequence[int]):
        super().__init__()
        self.encoder = encoder
        self.wanted = wanted

    def __getattr__(self, name: str) -> Any:
        """Forward to the encoder: its dtype, device and hooks tell a pipeline where it runs."""
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["encoder"], name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        # Leave padding masks to the encoder itself, and flash attention too, which takes no mask of ours.
        if attention_mask is not None or self.encoder.config._attn_implementation not in MASKABLE:
            return self.encoder(input_ids, attention_mask=attention_mask)
        device, dtype = input_ids.device, self.encoder.dtype
        trees = Trees.of(input_ids, self.wanted)
        mask = torch.zeros(trees.seen.shape, dtype=dtype).masked_fill(~trees.seen, torch.finfo(dtype).min)
        nodes = self.encoder(
            trees.tokens.to(device),
            attention_mask=mask[:, None].to(device),
            position_ids=trees.seen.sum(-1).sub(1).to(device),
        )[0]
        # Copy each node's feature to every prompt that goes through it.
        places = trees.places.to(nodes.device)
        features = nodes.new_zeros(*places.shape, nodes.shape[-1])
        features[places >= 0] = nodes.flatten(0, 1)[places[places >= 0]]
        return (features,)
