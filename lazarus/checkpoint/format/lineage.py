"""The lineage of a run, which decides whether a copy of state belongs to its history. PURE.

The lineage is the journaled list of pairs (generation, committed step at its RESUME). It applies
to all copies of state, in host memory and on storage.
"""

from __future__ import annotations

from collections.abc import Sequence

Lineage = Sequence[tuple[int, int]]


def is_valid(*, generation: int, step: int, lineage: Lineage, resume_step: int) -> bool:
    """Whether state tagged (generation, step) lies on the history that leads to ``resume_step``.

    The state is valid if no later generation resumed from an earlier step. Without rollbacks,
    resumed steps only grow, so checking the first later generation would do; after a rollback, a
    later generation may have resumed from an earlier step, so all of them are checked.

    Args:
        generation: Generation the copy was made in.
        step: Committed step that the copy holds.
        lineage: Pairs (generation, step) of every RESUME so far, in any order.
        resume_step: The step about to be resumed from, or the newest published one.

    Source: protocol rule 29, extended to rollbacks.
    """
    if step > resume_step:
        return False
    return all(step <= resumed for later, resumed in lineage if later > generation)


def extended(lineage: Lineage, *, generation: int, step: int) -> tuple[tuple[int, int], ...]:
    """The lineage with the pair (``generation``, ``step``) added.

    Raises:
        ValueError: ``generation`` is not above all earlier generations.
    """
    newest = max((g for g, _ in lineage), default=-1)
    if generation <= newest:
        raise ValueError(f"generation {generation} resumed after {newest}; they only grow")
    return (*((g, b) for g, b in lineage), (generation, step))
