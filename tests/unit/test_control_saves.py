"""Checkpoints on their way, as the controller sees them: what becomes true, what is waited for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from control_desk import EXPERTS, Desk, running
from control_journal import resumed_state

from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.checkpoint.selection.adaptive import SaveSettings
from lazarus.control.cluster.state import Phase, with_fields
from lazarus.control.messages import Pause, Paused, Prepare, Resume, SnapshotHeld, Suspicion
from lazarus.control.parts.saving import Save
from lazarus.control.ports import Journal, ManifestDone, WriteManifest
from lazarus.control.saving import saves
from lazarus.control.saving.adapting import WANTED
from lazarus.control.saving.losses import bad_source_of, place_of_checkpoint

REPLICATED = {"slots_per_node": 2, "min_replicas": 2}  # one loss leaves every expert alive


def test_the_manifest_follows_the_last_share_once() -> None:
    desk = running()
    desk.share("w0", 8)
    desk.share("w1", 8)
    assert not desk.of(WriteManifest)
    desk.share("w2", 8)
    desk.share("w2", 8)  # said again to a new controller
    (order,) = desk.of(WriteManifest)
    assert (order.step, order.generation, len(order.parts)) == (8, 1, 3)


def test_shares_of_a_step_that_is_not_published_wait_for_it() -> None:
    desk = running()
    for worker in desk.state.standing.seats:
        desk.share(worker, 9)
    assert not desk.of(WriteManifest)
    desk.commit(9)
    assert [order.step for order in desk.of(WriteManifest)] == [9]


def test_a_loss_does_not_void_what_the_survivors_still_write() -> None:
    desk = running(**REPLICATED)
    desk.share("w2", 8)
    desk.commit(9)
    desk.lose("w2")
    assert desk.state.resumed == 2 and not desk.of(WriteManifest)
    desk.share("w0", 8)
    desk.share("w1", 8)
    (order,) = desk.of(WriteManifest)
    assert (order.step, order.generation, len(order.parts)) == (8, 1, 3)
    assert [pair[0] for pair in order.meta["lineage"]] == [1, 2]


def test_a_share_that_died_with_its_node_ends_the_hope_and_is_on_record() -> None:
    desk = running(partial_checkpoints=True, **REPLICATED)
    desk.share("w0", 8)
    desk.lose("w2")
    desk.share("w1", 8)
    desk.tick()
    assert not desk.of(WriteManifest)
    (failed,) = desk.events("checkpoint_failed")
    assert failed["step"] == 8 and "1 of 3 ranks" in failed["reason"]
    assert desk.told(Resume)[-1].save_all  # partial ones would have nothing to point to


def test_after_a_failed_first_checkpoint_all_ranks_pause_to_make_a_whole_one() -> None:
    desk = running(partial_checkpoints=True)
    desk.share("w1", 8, ok=False)
    assert desk.events("checkpoint_failed")[0]["reason"] == "disk full"
    assert desk.state.pausing.wants == "checkpoint"


def test_with_a_checkpoint_that_stands_a_failed_one_needs_no_pause() -> None:
    desk = running(partial_checkpoints=True)
    for worker in desk.state.standing.seats:
        desk.share(worker, 4)
    desk.written(4)
    desk.share("w1", 8, ok=False)
    assert desk.state.pausing.wants == ""


def test_where_the_files_it_points_to_are_gone_the_next_checkpoint_is_whole() -> None:
    """Somebody removed them: nothing stands, also for a controller that reads the journal."""
    desk = running(partial_checkpoints=True)
    for worker in desk.state.standing.seats:
        desk.share(worker, 4)
    desk.written(4)
    gone = ManifestDone(
        generation=1, step=8, at_s=desk.now_s, error="lacks L0/E0", is_rootless=True
    )
    desk.feed(gone)
    assert desk.state.storage.checkpoints == () and desk.state.pausing.wants == "checkpoint"
    noted = [c.entry for c in desk.of(Journal) if c.entry["kind"] == "manifest"]
    assert noted[-1]["standing"] == []
    count = len(desk.of(Journal))
    desk.feed(replace(gone, step=12))
    assert len(desk.of(Journal)) == count  # said once


def test_while_checkpoints_fail_again_and_again_each_pause_for_a_whole_one_comes_later() -> None:
    """A4: a keeper that is stopped made the run pause at every second checkpoint."""
    desk = running(partial_checkpoints=True)
    asked: list[float] = []
    for count in range(400):
        desk.now_s += 1.0
        state, _ = saves.on_manifest(
            desk.state, ManifestDone(generation=1, step=count, at_s=desk.now_s, error="no answer")
        )
        if state.pausing.wants:
            asked.append(desk.now_s)
        desk.state = replace(state, pausing=replace(state.pausing, wants=""))  # the pause has been
    gaps = [later - before for before, later in pairwise(asked)]
    assert 3 <= len(gaps) <= 6 and gaps == sorted(gaps) and gaps[-1] >= 4 * gaps[0]
    desk.written(8)
    assert desk.state.pausing.whole_asked == 0


def test_what_stands_is_what_retention_left() -> None:
    desk = running()
    for step in (4, 8):
        for worker in desk.state.standing.seats:
            desk.share(worker, step)
        desk.written(step)
    assert [c.step for c in desk.state.storage.checkpoints] == [8]


def _rolling_back(**config: Any) -> Desk:
    """Two of three nodes die while the survivor still writes its share of step 8."""
    desk = running(on_lost_expert="rollback", **config)
    desk.commit(9)
    desk.share("w0", 8)
    desk.share("w1", 8)
    desk.lose("w0", "w1")
    return desk


def test_a_rollback_waits_for_a_checkpoint_that_the_survivors_still_write() -> None:
    desk = _rolling_back()
    assert desk.state.phase is Phase.ALIGNING
    desk.share("w2", 8)
    assert desk.state.phase is Phase.ALIGNING and desk.of(WriteManifest)
    desk.written(8)
    assert desk.state.phase is Phase.RUNNING
    assert desk.told(Prepare)[-1].reload == "/ckpt 8"
    assert desk.events("rolled_back") == [{"generation": desk.state.resumed, "step": 8}]
    assert desk.state.committed.history[1].sum() == 8.0 * 8 * EXPERTS  # counts went back too


def test_a_restore_waits_too_where_an_expert_would_start_afresh() -> None:
    desk = running()
    desk.commit(9)
    desk.share("w2", 8)
    desk.share("w0", 8)
    (lost,) = desk.held["w2"]
    desk.lose("w2")
    assert desk.state.phase is Phase.ALIGNING
    desk.share("w1", 8)
    desk.written(8)
    (restore,) = desk.told(Prepare)[-1].restores
    assert (restore.expert, restore.step, restore.source) == (lost, 8, "storage:/ckpt 8")
    (event,) = desk.events("expert_restored")
    assert (event["behind_steps"], event["lost_copies"]) == (1, 8)  # eight copies a step


def test_it_does_not_wait_for_ever() -> None:
    desk = _rolling_back()
    for _ in range(int(desk.state.config.timeouts.in_flight_s / 5) + 2):
        desk.now_s += 5.0
        for worker in desk.state.roster.workers:  # heartbeats: nobody is lost meanwhile
            desk.say(worker, Suspicion(generation=0, step=0))
        desk.tick()
    assert desk.events("rolled_back")[0]["step"] == 0
    assert desk.told(Prepare)[-1].reload == "init"


def test_it_does_not_wait_where_the_dead_had_not_written_theirs() -> None:
    desk = running(on_lost_expert="rollback")
    desk.share("w1", 8)
    desk.share("w2", 8)
    desk.lose("w0", "w1")
    assert desk.state.phase is Phase.RUNNING
    assert desk.told(Prepare)[-1].reload == "init"


def test_a_checkpoint_that_cannot_be_read_is_not_chosen_again() -> None:
    desk = running(on_lost_expert="rollback")
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    desk.written(8)
    desk.deaf.add("Prepare")
    desk.lose("w0", "w1")
    assert desk.told(Prepare)[-1].reload == "/ckpt 8"
    desk.deaf.clear()
    bad = Suspicion(generation=desk.state.generation, step=8, bad_source="/ckpt 8", error="rot")
    desk.say("w2", bad)
    desk.tick(0.3)
    assert desk.told(Prepare)[-1].reload == "init"
    assert desk.state.phase is Phase.RUNNING and desk.state.step == 0


def test_a_damaged_copy_in_memory_is_followed_by_the_next_best_source() -> None:
    desk = running()
    (lost,) = desk.held["w2"]
    for worker in desk.state.standing.seats:
        desk.share(worker, 4)
    desk.written(4)
    held = SnapshotHeld(layer=0, expert=lost, generation=1, step=6, routed=48)
    desk.snaps = {"w0": (held,), "w1": (held,)}
    desk.deaf.add("Prepare")
    desk.lose("w2")
    places = []
    for _ in range(2):
        (restore,) = desk.told(Prepare)[-1].restores
        places.append(restore.source)
        name = bad_source_of(restore)
        bad = Suspicion(generation=desk.state.generation, step=8, bad_source=name)
        desk.say("w0", bad)
    assert places == ["keeper:w0:1", "keeper:w1:1"]
    (restore,) = desk.told(Prepare)[-1].restores
    assert (restore.source, restore.step) == ("storage:/ckpt 4", 4)
    assert desk.state.standing.members == (0, 1)  # a damaged copy is nobody's fault


def test_a_rank_that_missed_the_rollback_is_taken_along_at_the_next_align() -> None:
    """A loss just after RESUME: some ranks stand at the step gone back to, one does not yet."""
    desk = running(on_lost_expert="rollback", nodes=4, slots_per_node=2, min_replicas=2)
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    desk.written(8)
    desk.commit(9)
    lonely = next(
        pair
        for pair in (("w0", "w1"), ("w0", "w2"), ("w0", "w3"), ("w1", "w2"))
        if any(
            {w for w in desk.state.standing.seats if e in desk.held[w]} <= set(pair)
            for e in range(EXPERTS)
        )
    )
    desk.deaf.add("Resume")
    desk.lose(*lonely)
    left = [w for w in desk.committed if w not in lonely]
    assert desk.state.step == 8 and {desk.committed[w] for w in left} == {9}
    desk.committed[left[0]], desk.entered[left[0]] = 8, desk.state.resumed
    desk.deaf.clear()
    desk.say(left[0], Suspicion(generation=desk.state.resumed, step=9))
    desk.tick(0.3)
    assert not desk.state.waiting.broken and desk.state.phase is Phase.RUNNING
    assert {desk.committed[w] for w in left} == {8}


FAST = {"copy_rate": 1e9, "write_rate": 1e9, "window_s": 1.0}
SLOW = {"copy_rate": 1.0, "write_rate": 1.0, "window_s": 1.0}


def _measuring(
    *, slowest: dict[str, float] = SLOW, ranks: tuple[str, ...] = ("w0", "w1", "w2"), **saves: Any
) -> Desk:
    desk = running(saves=SaveSettings(**saves))
    for worker in ranks:
        desk.share(worker, 8, measured=slowest if worker == "w1" else FAST)
    return desk


def test_measured_rates_change_the_schedule_at_one_pause_and_go_on_record() -> None:
    desk = _measuring(every=None)  # 200 steps; the slowest rank writes a byte a second
    assert desk.state.pausing.wants == WANTED
    desk.tick()
    (pause,) = {type(body): body for body in desk.told(Pause)}.values()
    for worker in desk.state.standing.seats:
        desk.say(worker, Paused(generation=pause.generation, step=8))
    resume = desk.told(Resume)[-1]
    (event,) = desk.events("checkpoint_adapted")
    assert resume.persist_every == event["persist_every"] < 100
    assert event["write_rate"] == 1.0  # the slowest rank decides
    desk.share("w0", 9, generation=2, measured=SLOW)
    assert desk.state.pausing.wants == ""  # later changes come with RESUMEs that happen anyway
    entries = [c.entry for c in desk.of(Journal)]
    again = resumed_state(entries, desk.state.config, now_s=0.0)
    assert again.saving.adapted == desk.state.saving.adapted is not None


def test_the_schedule_stays_until_all_ranks_have_measured() -> None:
    desk = _measuring(every=None, ranks=("w0", "w1"))
    assert desk.state.pausing.wants == "" and desk.state.saving.adapted is None


def test_nothing_pauses_where_the_user_fixed_the_schedule() -> None:
    desk = _measuring(every=10, k_snapshot=1)
    assert desk.state.pausing.wants == "" and desk.state.saving.measured == {}


def test_a_schedule_that_hardly_differs_is_worth_no_pause() -> None:
    desk = _measuring(
        every=10, slowest=FAST
    )  # all three experts are snapshotted by default already
    assert desk.state.pausing.wants == "" and desk.state.saving.adapted is not None


def test_the_start_of_a_run_is_where_it_started() -> None:
    fresh = running().state
    assert place_of_checkpoint(fresh, 0) == "init"
    assert place_of_checkpoint(fresh, 8) == "/ckpt 8"
    config = replace(fresh.config, resume="s3://old", start_step=40)
    resumed = replace(fresh, config=config)
    assert place_of_checkpoint(resumed, 40) == "s3://old 40"
    assert place_of_checkpoint(resumed, 50) == "/ckpt 50"
    assert saves.none_stands(resumed)  # what stands elsewhere, no partial one can point to


def test_a_partial_checkpoint_points_to_nothing_in_the_place_it_was_resumed_from() -> None:
    fresh = running().state
    standing = (StoredCheckpoint(generation=1, step=40, is_full=True),)
    for resume, is_there in ((None, True), ("/ckpt", True), ("s3://old", False)):
        config = replace(fresh.config, resume=resume, start_step=40)
        state = with_fields(fresh, {"config": config, "checkpoints": standing})
        assert saves.none_stands(state) is not is_there
        later = replace(
            state, storage=replace(state.storage, checkpoints=(replace(standing[0], step=41),))
        )
        assert not saves.none_stands(later)  # the resumed run has written that one itself


def test_a_share_of_whoever_may_be_on_the_way_back_is_waited_for() -> None:
    save = Save(generation=1, seats=("w0", "w1"), shares={"w0": "{}"})
    gone = with_fields(running().state, {"workers": {}})
    assert saves.is_hopeless(gone, save)
    assert not saves.is_hopeless(replace(gone, phase=Phase.RECONNECTING), save)
    assert not saves.is_hopeless(running().state, save)
