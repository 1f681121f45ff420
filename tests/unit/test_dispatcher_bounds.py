"""Tables, splits, traces and errors of the dispatcher just within their bounds and just beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher import (
    Exchange,
    ExpertLayout,
    RoutingTable,
    RoutingTableError,
    SplitRule,
    run_ranks,
    slots_for_exchange,
    sum_replica_gradients,
)
from dispatcher.errors import ExchangeClosedError, RankMismatchError, RanksPartedError
from dispatcher.exchange import Done, SoloExchange, TorchExchange
from dispatcher.gating import choose_experts, gate_scores, top_experts
from dispatcher.gradients import flat_all_reduce, home_served
from dispatcher.layer.agreement import input_problem
from dispatcher.layer.dispatch import meet
from dispatcher.layer.permute import expert_order, segment_index, transposed_index
from dispatcher.layer.places import Meeting, place_code, place_text
from dispatcher.splits.balance import balanced_quotas, levelled_quotas, pace
from dispatcher.splits.routing import expert_slots
from dispatcher.splits.split import flows, rounded_shares, split_counts

CPU = torch.device("cpu")
RING = [[0, 1], [1, 2], [2, 0]]  # three experts, each on two of three ranks


# ---- tables ------------------------------------------------------------------------------------


def table(slots: Any, *more: Any, **options: Any) -> RoutingTable:
    return RoutingTable.from_plan_arrays(slots, *more, **({"rank": 0} | options))


def test_a_table_spreads_homes_the_rarest_expert_first() -> None:
    assert table(RING).home_E.tolist() == [0, 1, 2]
    assert table([[0, 1], [0, -1], [0, -1]]).home_E.tolist() == [1, 0]
    given = table(RING, home_E=[2, 0, 1])
    assert given.home_E.tolist() == [2, 0, 1]
    assert given.at_home_RE.tolist() == [
        [False, True, False], [False, False, True], [True, False, False],
    ]  # fmt: skip
    assert given.ranks_of(1) == (0, 1) and given.slots_of(2) == (2, 0)
    assert table(RING).shares_ER[0].tolist() == [0.5, 0.0, 0.5]
    assert RoutingTable.solo(3).slots_of(0) == (0, 1, 2)
    assert expert_slots([4, -1, 0]) == {4: 0, 0: 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: table([[0], [1]], home_E=[0, 2]), "home of expert 1 is rank 2, not a holder"),
        (lambda: table([[0], [1]], home_E=[-1, 1]), "home of expert 0 is rank -1, not a holder"),
        (lambda: table([[0], [1]], home_E=[0]), "home has shape"),
        (lambda: table([[0], [1]], rank=2), "rank 2 is not one of the table's 2 ranks"),
        (lambda: table([[0], [1]], rank=-1), "rank -1 is not one"),
        (lambda: table([[0, 1], [2, 2]]), "expert 2 sits in two slots of rank 1; keep one"),
        (lambda: table([[0, 3], [1, -1]]), r"no rank holds expert 2 \(1 of 4 experts have no"),
        (lambda: table([[0], [1]], [[1.0, 0.0]]), "slots name experts 0..1 of 1"),
        (lambda: table([[0], [1]], [[1.0], [1.0]]), r"shares are \(2, 1\), the table is \(2, 2\)"),
        (lambda: table([[0], [0]], [[1.5, -0.5]]), "a share is negative"),
        (lambda: table([[0], [0]], [[0.5, 0.500002]]), "sum to 1.000002, not 1"),
    ],
)
def test_a_table_that_is_wrong_by_one_is_refused(
    make: Callable[[], RoutingTable], message: str
) -> None:
    with pytest.raises(RoutingTableError, match=message):
        make()


def test_shares_that_round_to_one_are_scaled_to_it() -> None:
    found = table([[0], [0]], [[0.5, 0.5000005]])
    assert abs(found.shares_ER.sum() - 1.0) < 1e-15 and found.shares_ER[0, 0] < 0.5


# ---- splits ------------------------------------------------------------------------------------


def test_a_rule_at_its_bounds() -> None:
    SplitRule(mode="balanced", rows_per_replica=0.0, ranks_per_device=1.0)
    for wrong in ({"rows_per_replica": -0.1}, {"ranks_per_device": 0.9}, {"mode": "Home"}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "mode" not in wrong else "known"):
            SplitRule(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be >= 1"):
        SplitRule(ranks_per_device=float("nan"))


def test_splits_of_a_ring_by_hand() -> None:
    counts = np.array([[6, 0, 0], [0, 4, 0], [0, 0, 0]])
    home = split_counts(counts, table(RING, rank=1), SplitRule())
    assert home.rows_ER.tolist() == [[6, 0, 0], [0, 4, 0], [0, 0, 0]]
    assert home.send_JE.tolist() == [[0, 0, 0], [0, 4, 0], [0, 0, 0]]
    assert home.served_ER.tolist() == (home.rows_ER > 0).tolist()
    shares = split_counts(counts, table(RING, rank=0), SplitRule(mode="shares"))
    assert shares.rows_ER.tolist() == [[3, 0, 3], [2, 2, 0], [0, 0, 0]]
    assert shares.send_JE.tolist() == [[3, 0, 0], [0, 0, 0], [3, 0, 0]]
    assert shares.recv_IE.tolist() == [[3, 0, 0], [0, 2, 0], [0, 0, 0]]
    free = split_counts(counts, table(RING, rank=2), SplitRule(mode="balanced"))
    assert free.rows_ER.sum(0).max() == 4 and free.rows_ER.sum(1).tolist() == [6, 4, 0]


def test_shares_are_rounded_by_the_largest_remainder_the_lower_rank_first() -> None:
    shares = np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0]])
    quota = rounded_shares(np.array([3, 3, 2]), shares)
    assert quota.tolist() == [[2, 1, 0], [1, 1, 1], [0, 0, 2]]


def test_overflow_follows_the_room_that_is_left() -> None:
    counts, quota = np.array([[9], [0], [1]]), np.array([[3, 6, 1]])
    flow = flows(counts, quota)
    assert flow[0, 0].tolist() == [3, 6, 0] and flow[2, 0].tolist() == [0, 0, 1]
    uneven = flows(np.array([[5], [5], [0]]), np.array([[4, 3, 3]]))
    assert uneven[:, 0].tolist() == [[4, 0, 1], [0, 3, 2], [0, 0, 0]]


def test_without_a_price_every_replica_may_serve() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        holds = random.random((9, 4)) < 0.6
        holds[np.arange(9), random.integers(4, size=9)] = True
        slots = [[e if holds[e, r] else -1 for e in range(9)] for r in range(4)]
        made = table(slots)
        total = random.integers(0, 60, size=9)
        assert (
            balanced_quotas(total, made) == levelled_quotas(total, made, open_ER=made.holds_ER)
        ).all()


def test_closed_replicas_serve_nothing_and_ties_go_to_lower_ranks() -> None:
    made = table([[0, 1], [0, 1], [0, 1]])
    closed = np.array([[True, True, False], [True, True, True]])
    quota = levelled_quotas(np.array([4, 5]), made, open_ER=closed)
    assert quota[0, 2] == 0 and quota.sum(0).tolist() == [3, 3, 3]
    assert levelled_quotas(np.array([5, 0]), made, open_ER=made.holds_ER).tolist() == [
        [2, 2, 1], [0, 0, 0],
    ]  # fmt: skip
    idle = levelled_quotas(np.array([0, 0]), made, open_ER=made.holds_ER)
    assert not idle.any()


def test_rows_move_along_a_chain_of_experts() -> None:
    # Expert 0 fills ranks 0 and 1, so that expert 1 goes to rank 2 alone.
    made = table([[0, 3], [0, 1], [1, 2]])
    quota = levelled_quotas(np.array([8, 4, 0, 0]), made, open_ER=made.holds_ER)
    assert quota.sum(0).tolist() == [4, 4, 4]
    # Rank 2 has nobody to shed to but rank 1, which passes on to rank 0.
    chain = table([[0, -1], [0, 1], [1, -1]])
    level = levelled_quotas(np.array([10, 10]), chain, open_ER=chain.holds_ER)
    assert sorted(level.sum(0).tolist()) == [6, 7, 7] and level.sum(1).tolist() == [10, 10]
    assert pace([3, 1], 1.0) == 3 and pace([]) == 0.0 and pace([3, 1], 2.0) == 4.0


# ---- permutations, places, gates ---------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 254, 255, 256, 257])
def test_copies_are_sorted_by_expert_whatever_their_number(experts: int) -> None:
    chosen = torch.tensor([experts - 1, -1, 0, experts - 1, -1, experts // 2])
    order = expert_order(chosen, num_experts=experts)
    slow = sorted(range(6), key=lambda i: (experts if chosen[i] < 0 else int(chosen[i]), i))
    assert order.tolist() == slow


def test_an_order_that_is_the_same_needs_no_index() -> None:
    for same in ([[1, 2, 3]], [[1], [2]], [[0, 0], [4, 2]], [[0, 3], [0, 1]], [[0, 0], [0, 0]]):
        assert transposed_index(np.array(same), device=CPU) is None
    index = transposed_index(np.array([[1, 1], [1, 0]]), device=CPU)
    assert index is not None and index.tolist() == [0, 2, 1]
    starts, lengths = np.array([7, 0, 3]), np.array([2, 0, 3])
    assert segment_index(starts, lengths, device=CPU).tolist() == [7, 8, 3, 4, 5]


def test_places_are_told_as_they_were_encoded() -> None:
    texts = {
        Meeting.FORWARD: "layer 511 forward of round 3",
        Meeting.WITHOUT_GRAD: "layer 511 forward without a backward of round 3",
        Meeting.REPEATED: "layer 511 forward, repeated in the backward of round 3",
        Meeting.BACKWARD_OVER: "the end of the last backward, of round 3",
    }
    for kind, text in texts.items():
        code = place_code(kind, layer=511, round=3, step=1023)
        assert 0 < code < 2**31 and place_text(code) == text
        assert code == place_code(kind, layer=511 + 512, round=3 + 512, step=2047)
        assert code != place_code(kind, layer=511, round=3, step=1022)
        assert code != place_code(kind, layer=510, round=3, step=1023)
    assert place_text(0) == "an unknown place"


def test_ranks_at_one_place_meet_and_others_are_told_apart() -> None:
    def body(exchange: Exchange, odd: int) -> str:
        step = 1 if exchange.rank == odd else 0
        place = place_code(Meeting.FORWARD, layer=step)
        try:
            meet(table(RING, rank=exchange.rank), exchange, place=place)
        except RanksPartedError as problem:
            return str(problem)
        return "met"

    assert run_ranks(lambda e: body(e, 5), size=3) == ["met"] * 3
    for said in run_ranks(lambda e: body(e, 2), size=3):
        assert "ranks 0, 1 are at layer 0 forward" in said
        assert "rank 2 is at layer 1 forward" in said


def test_gates_of_forced_and_absent_experts() -> None:
    scores = gate_scores(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), score="softmax")
    assert scores.sum(1).tolist() == pytest.approx([1.0, 1.0])
    forced = torch.tensor([[2, -1], [3, 1]])
    chosen, weight = choose_experts(scores, top_k=2, forced_TK=forced)
    assert torch.equal(chosen, forced)
    assert weight[0].tolist() == [scores[0, 2].item(), 0.0]
    assert weight[1].tolist() == [0.0, scores[1, 1].item()]
    free, plain = choose_experts(scores, top_k=1)
    assert free.tolist() == [[2], [0]] and torch.equal(plain, scores.gather(1, free))
    _, scaled = choose_experts(scores, top_k=1, scale=2.0)
    assert torch.equal(scaled, plain * 2)
    nothing = torch.full((2, 2), -1)
    _, none = choose_experts(scores, top_k=2, forced_TK=nothing, renormalize=True)
    assert not none.any() and none.isfinite().all()
    many = torch.arange(12.0).flip(0)[None]
    for top_k in (1, 2, 4, 5, 12):
        assert top_experts(many, top_k=top_k).tolist() == [list(range(top_k))]


def test_input_is_sound_or_named_by_its_first_problem() -> None:
    x, ids = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    named = (0, 1, 2)

    def problem(x: Tensor = x, ids: Tensor = ids, slots: tuple[int, ...] = named) -> int:
        return input_problem(x, ids, num_experts=3, slots=slots, named=named)

    assert problem() == problem(slots=(2, -1, 0, 1)) == problem(ids=ids[:, :0].new_zeros(3, 3)) == 0
    assert problem(ids=ids.int()) == problem(x=x.long()) == 1
    assert problem(ids=ids[:2]) == problem(ids=ids[:, 0]) == problem(x=x[0]) == 2
    assert problem(ids=ids.new_zeros(3, 4)) == 3
    assert problem(x=torch.ones(4, 3).t()) == problem(ids=ids.new_zeros(2, 3).t()) == 0
    assert problem(ids=ids[:, :0]) == 6
    assert problem(ids=ids.to("meta")) == 7
    assert problem(slots=(0, 1)) == problem(slots=(1, 2)) == problem(slots=(0, 1, 2, 2)) == 8


# ---- gradients and exchanges -------------------------------------------------------------------


class Counting:
    """An exchange that notes how many elements each all-to-all sends to each rank."""

    def __init__(self, inner: Exchange) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.sent: list[list[int]] = []

    def all_to_all(self, output: Tensor, input: Tensor, **more: Any) -> None:
        self.sent.append(list(more["input_splits"]))
        self.inner.all_to_all(output, input, **more)


def sent_by(served: list[list[int]], slots: list[list[int]]) -> list[list[list[int]]]:
    """By rank: what it sends to each rank in each all-to-all of a sum of rows of six."""

    def body(exchange: Exchange) -> list[list[int]]:
        counting = Counting(exchange)
        grad = torch.zeros(len(slots[0]), 6)
        sum_replica_gradients(
            grad, table(slots, rank=exchange.rank), counting,  # type: ignore[arg-type]
            served_ER=np.array(served, dtype=np.bool_),
        )  # fmt: skip
        return counting.sent

    return run_ranks(body, size=len(slots))


def test_gradients_travel_no_more_than_they_have_to() -> None:
    # One served: it sends its row to the others; no first all-to-all.
    assert sent_by([[0, 1, 0]], [[0], [0], [0]]) == [[[0, 0, 0]], [[6, 0, 6]], [[0, 0, 0]]]
    # Two of two: the home (rank 0) gets the whole row, and sends the sum back.
    assert sent_by([[1, 1]], [[0], [0]]) == [[[0, 0], [0, 6]], [[6, 0], [0, 0]]]
    # Two of three: a half each, then everybody gets what it lacks.
    assert sent_by([[1, 1, 0]], [[0], [0], [0]]) == [
        [[0, 3, 0], [0, 3, 3]],
        [[3, 0, 0], [3, 0, 3]],
        [[0, 0, 0], [0, 0, 0]],
    ]
    # None served, or nobody else holds the expert: nothing to send.
    assert sent_by([[0, 0]], [[0], [0]]) == [[], []]
    assert sent_by([[1, 0], [0, 1]], [[0], [1]]) == [[], []]
    assert home_served(table(RING)).tolist() == np.eye(3, dtype=bool).tolist()
    assert slots_for_exchange(table([[2, 0, -1, 1], [0, 1, 2, -1]], home_E=[1, 0, 1])) == (
        1, 0, 2, -1,
    )  # fmt: skip


def test_one_rank_sums_nothing_and_exchanges_with_itself() -> None:
    solo = SoloExchange()
    flat_all_reduce(torch.ones(2), object.__new__(Silent))
    ones, other = torch.ones(2, 3), torch.zeros(2, 3)
    solo.all_to_all(other, ones, output_splits=[2], input_splits=[2], label="dispatch")
    assert torch.equal(ones, other)
    solo.all_reduce(ones, label="commit")
    solo.start_all_reduce(ones, label="commit").wait()
    assert torch.equal(ones, torch.ones(2, 3))
    flat = torch.zeros(6)
    solo.all_gather(flat, ones, label="digest")
    assert flat.tolist() == [1.0] * 6
    assert isinstance(solo.start_all_reduce(ones, label="commit"), Done)


class Silent:
    """An exchange of one rank that must not be used."""

    rank, size = 0, 1


def test_a_given_group_is_used_and_no_other() -> None:
    class Group:
        def rank(self) -> int:
            return 3

        def size(self) -> int:
            return 5

    found = TorchExchange(Group())  # type: ignore[arg-type]
    assert (found.rank, found.size) == (3, 5)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        TorchExchange()


def test_ranks_that_send_what_nobody_expects_are_told() -> None:
    def body(exchange: Exchange) -> str:
        splits = [1, 1] if exchange.rank == 0 else [2, 0]
        with pytest.raises(ExchangeClosedError) as caught:
            exchange.all_to_all(
                torch.empty(2, 1), torch.ones(2, 1), output_splits=[1, 1], input_splits=splits,
                label="dispatch",
            )  # fmt: skip
        return str(caught.value)

    assert run_ranks(body, size=2, timeout_s=10) == [
        "rank 0 expects 1 rows from rank 1, which sends 2 (dispatch)",
        "rank 1 expects 1 rows from rank 1, which sends 0 (dispatch)",
    ]


def test_the_lowest_rank_that_failed_by_itself_is_told() -> None:
    def body(exchange: Exchange) -> int:
        if exchange.rank > 0:
            raise KeyError(exchange.rank)
        exchange.all_reduce(torch.ones(1), label="commit")
        return 0

    with pytest.raises(KeyError, match="1|2"):
        run_ranks(body, size=3, timeout_s=10)


def test_errors_name_up_to_eight_ranks_and_count_the_others() -> None:
    eight = str(RankMismatchError(what="width", values=["8"] * 8 + ["9"]))
    assert "8 on ranks 0, 1, 2, 3, 4, 5, 6, 7; 9 on rank 8;" in eight
    nine = str(RankMismatchError(what="width", values=["8"] * 9 + ["9"]))
    assert "8 on ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (9 in all); 9 on rank 9;" in nine
    parted = RanksPartedError(["layer 1", None, "layer 1", "layer 2"])
    assert str(parted).endswith("ranks 0, 2 are at layer 1; rank 3 is at layer 2")
    assert parted.places == ("layer 1", None, "layer 1", "layer 2")


def test_an_expert_s_layout_at_its_bounds() -> None:
    least = ExpertLayout(activation="gelu", dim=1, hidden=1, bias=True)
    assert least.offsets == {"w_in": 0, "b_in": 1, "w_out": 2, "b_out": 3}
    assert (least.num_parameters, least.row_numel) == (4, 16)
    assert ExpertLayout(activation="gelu", dim=4, hidden=2).row_numel == 16
    for wrong in ({"dim": 0}, {"hidden": 0}, {"activation": "relu"}):
        with pytest.raises(ValueError, match="must be >= 1|unknown activation"):
            ExpertLayout(**({"activation": "gelu", "dim": 1, "hidden": 1} | wrong))  # type: ignore[arg-type]
