"""A causal text encoder that encodes what prompts begin with once, and no position that nobody wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


MASKABLE = ("eager", "sdpa")


class Trees(NamedTuple):
    """
    Prompts as trees: a node is a token and all that is before it, and prompts that begin alike share nodes.

    Args:
        tokens (`Tensor`):
            `(trees, nodes)`, int64, each node's token; 0 for what fills a tree up.
        seen (`Tensor`):
            `(trees, nodes, nodes)`, bool, what each node sees: itself and what is before it.
        places (`Tensor`):
            `(prompts, positions)`, int64, the node of each position, counted through all trees; −1 where none
            is wanted.
    """

    tokens: Tensor
    seen: Tensor
    places: Tensor

    @classmethod
    def of(cls, ids: Tensor, wanted: Sequence[int]) -> Trees:
        """Of rows of tokens `(prompts, positions)`, each so far; a tree has as many nodes as a row."""
        size = ids.shape[1]
        trees: list[dict[tuple[int, int], int]] = []  # (the node before, token) -> node
        places = torch.full(ids.shape, -1)
        rows = ids.tolist()
        # In alphabetical order those which begin alike are together.
        for row in sorted(range(len(rows)), key=rows.__getitem__):
            path = rows[row][: wanted[row]]
            if not trees or len(trees[-1]) + _added(trees[-1], path) > size:
                trees.append({})
            node = -1
            for position, token in enumerate(path):
                node = trees[-1].setdefault((node, token), len(trees[-1]))
                places[row, position] = (len(trees) - 1) * size + node
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
    Stands in for a pipeline's CLIP text encoder within `encode_prompt`.

    CLIP is causal: a feature depends on the tokens up to its position and on nothing behind it. So prompts
    that begin alike share features there, and padding costs nothing where it is not wanted. What is computed
    is what the encoder itself computes, up to rounding.

    Args:
        encoder (`nn.Module`):
            A `CLIPTextModel` whose attention takes a mask.
        wanted (`Sequence[int]`):
            For each prompt, how many of its positions are wanted. The features of the others are zero.
    """

    def __init__(self, encoder: nn.Module, wanted: Sequence[int]):
        super().__init__()
        self.encoder, self.wanted = encoder, wanted

    def __getattr__(self, name: str) -> Any:
        """As the encoder: its dtype and device, its hooks, by which a pipeline knows where it runs."""
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["encoder"], name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        # A mask hides the padding from the padding; flash attention takes none of ours.
        if attention_mask is not None or self.encoder.config._attn_implementation not in MASKABLE:
            return self.encoder(input_ids, attention_mask=attention_mask)
        device, dtype = input_ids.device, self.encoder.dtype
        trees = Trees.of(input_ids, self.wanted)
        hidden = torch.zeros(trees.seen.shape, dtype=dtype).masked_fill(~trees.seen, torch.finfo(dtype).min)
        found = self.encoder(
            trees.tokens.to(device),
            attention_mask=hidden[:, None].to(device),
            position_ids=trees.seen.sum(-1).sub(1).to(device),
        )[0]
        places = trees.places.to(found.device)
        features = found.new_zeros(*places.shape, found.shape[-1])
        features[places >= 0] = found.flatten(0, 1)[places[places >= 0]]
        return (features,)
