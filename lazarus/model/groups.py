"""Parameter groups by name or predicate, for users' optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Groups = list[dict[str, Any]]
Chosen = str | Callable[[str, nn.Parameter], bool]
Rule = tuple[Chosen, Mapping[str, Any]]


def param_groups(groups: Groups, rules: Sequence[Rule]) -> Groups:
    """Split the groups that an optimizer factory gets, so that rules apply to parameters by name.

    Example::

        def optimizer(groups):
            rules = [("*.router.weight", {"lr": 1e-4}), ("embed.*", {"weight_decay": 0.0})]
            return torch.optim.AdamW(lazarus.param_groups(groups, rules), lr=3e-4)

    The first rule that fits a parameter gives the settings of its group. Parameters that no rule
    fits keep the settings of the group they are in. The result is the same on all ranks if
    predicates depend on nothing but the name and the shape of dense parameters: the experts of a
    layer are one parameter ``{layer}.experts.weight`` (and ``{layer}.experts.vectors``, if they
    have biases), whose first axis is as long as the rank has slots.

    Args:
        groups: What the factory was called with; each has ``params``, ``names`` and ``name``.
        rules: Pairs of a pattern of names (``fnmatch``) or a predicate of name and parameter, and
            the settings of the parameters that it fits.

    Raises:
        ValueError: A rule fits no parameter, or earlier rules leave it none.
    """
    found: Groups = []
    used: set[int] = set()
    for group in groups:
        parts: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, param in zip(group["names"], group["params"], strict=True):
            at = next((i for i, (rule, _) in enumerate(rules) if _fits(rule, name, param)), -1)
            parts.setdefault(at, []).append((name, param))
        used |= parts.keys()
        for at in sorted(parts):
            settings = rules[at][1] if at >= 0 else {}
            names, params = zip(*parts[at], strict=True)
            found.append({**group, **settings, "names": list(names), "params": list(params)})
    for at, (rule, _) in enumerate(rules):
        if at not in used:
            known = ", ".join(name for group in groups for name in group["names"])
            raise ValueError(f"rule {at} ({rule!r}) fits no parameter; the parameters are {known}")
    return found


def _fits(rule: Chosen, name: str, param: nn.Parameter) -> bool:
    return fnmatchcase(name, rule) if isinstance(rule, str) else bool(rule(name, param))
