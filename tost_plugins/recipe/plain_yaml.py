"""YAML from strangers: plain values, each key once, and no more of anything than a recipe needs."""

from __future__ import annotations

from typing import Any

import yaml

#: Characters; the longest recipe that makes sense names each layer of a deep network.
LONGEST = 200_000
_DEEPEST = 20
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class _Plain(yaml.SafeLoader):
    """PyYAML's safe loader, which lets a later key overwrite an earlier one, and reads numbers of any length."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(keys) > len(set(keys)) else None
        if twice is not None:
            raise ValueError(f"the key {_short(twice[1])!r} is there twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 40:
            raise ValueError(f"the number {_short(node.value)} has {len(node.value)} digits")
        return super().construct_yaml_int(node)


_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)


def parse(text: str) -> Any:
    """What the text stands for; raises ValueError or YAMLError, in time and memory in proportion to its length.

    Example:
        >>> parse("mask: {kind: snip, sparsity: 0.9}")
        {'mask': {'kind': 'snip', 'sparsity': 0.9}}
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters")
    depth = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        # a few nested aliases can stand for more than fits into memory, and a recipe needs none
        if isinstance(token, yaml.AliasToken):
            raise ValueError("it has aliases, which are to be written out")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    return yaml.load(text, _Plain)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
