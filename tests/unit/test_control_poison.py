"""When deaths of processes are the user's code, and when they are no more than losses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.control.cluster.poison import HUNG, common_samples, poisoned, signature_of, still_open
from lazarus.control.parts.blame import Death


def death(node: int, signature: str, **more: Any) -> Death:
    fields = {"generation": 1, "step": 5, "phase": "forward", **more}
    return Death(worker=f"node-{node}.0", node=f"node-{node}", signature=signature, **fields)


def test_one_death_is_a_loss() -> None:
    assert poisoned(()) == ()
    assert poisoned((death(0, "SIGSEGV"),)) == ()


def test_the_second_node_that_ends_itself_in_the_same_way_shows_a_bug() -> None:
    first, second = death(0, "SIGSEGV"), death(1, "SIGSEGV", generation=2)
    assert poisoned((first, second)) == (first, second)
    left = death(0, "exit code 3"), death(1, "exit code 3")
    assert poisoned(left) == left


def test_another_step_phase_or_way_to_die_shows_nothing() -> None:
    first = death(0, "SIGSEGV")
    for other in (
        death(1, "SIGSEGV", step=6),
        death(1, "SIGSEGV", phase="data"),
        death(1, "exit code 1"),
        death(0, "SIGSEGV"),  # another rank of the same machine
    ):
        assert poisoned((first, other)) == ()


def test_a_thread_that_reads_ahead_dies_in_any_phase_but_at_the_same_line() -> None:
    where = {"crash": "Fatal Python error", "place": "data.py:3 in __getitem__"}
    deaths = death(0, "SIGSEGV", phase="", **where), death(1, "SIGSEGV", phase="backward", **where)
    assert poisoned(deaths) == deaths


def test_a_zone_that_fails_at_once_is_no_bug_but_the_third_attempt_is() -> None:
    zone = tuple(death(n, "SIGKILL") for n in range(8))
    assert poisoned(zone) == ()
    attempts = tuple(death(n, "SIGKILL", generation=n) for n in range(3))
    assert poisoned(attempts[:2]) == ()
    assert poisoned(attempts) == attempts


def test_threads_that_stand_still_in_two_attempts_show_a_bug_and_in_one_do_not() -> None:
    storage_is_away = tuple(death(n, HUNG) for n in range(8))
    assert poisoned(storage_is_away) == ()
    attempts = death(0, HUNG), death(1, HUNG, generation=2)
    assert poisoned(attempts) == attempts
    assert poisoned((death(0, "SIGKILL"), death(1, HUNG, generation=2))) == ()
    assert poisoned((death(0, HUNG), death(1, HUNG, generation=2, phase="data"))) == ()
    assert poisoned((death(0, HUNG), death(0, HUNG, generation=2))) == ()


@given(st.lists(st.sampled_from(["SIGKILL", "SIGTERM", ""]), max_size=12), st.integers(1, 2))
def test_deaths_from_outside_in_two_attempts_never_blame_the_user(
    signatures: list[str], attempts: int
) -> None:
    deaths = tuple(
        death(n, signature, generation=n % attempts) for n, signature in enumerate(signatures)
    )
    assert poisoned(deaths) == ()


def test_a_commit_forgets_the_deaths_of_its_step() -> None:
    before, at, after = death(0, "", step=4), death(1, "", step=5), death(2, "", step=6)
    held = death(3, "", step=5, phase="evaluate")  # step 5 stood when it was evaluated
    assert still_open((before, at, after, held), step=5) == (after, held)
    assert still_open((held,), step=6) == ()


def test_samples_that_all_of_the_dead_had_are_named() -> None:
    first, second = death(0, "", sample_ids=(1, 2, 7)), death(1, "", sample_ids=(7, 9))
    assert common_samples((first, second)) == (7,)
    assert common_samples((first, death(1, "", sample_ids=(9,)))) == (1, 2, 7, 9)
    assert common_samples((first, death(1, ""))) == (1, 2, 7)


def test_how_a_process_ended_is_read_from_its_launcher_and_its_last_words() -> None:
    assert signature_of("SIGSEGV", "") == "SIGSEGV"
    assert signature_of("process exit code 3", "") == "exit code 3"
    assert signature_of("ray: ActorDiedError", "Fatal Python error: Bus error") == "SIGBUS"
    assert signature_of("ray: ActorDiedError", "") == "" == signature_of("stream closed", "")
    assert signature_of("SIGKILL", "") == "SIGKILL"
    assert not death(0, "SIGKILL").is_own and death(0, "SIGABRT").is_own


@pytest.mark.parametrize(
    ("cause", "crash", "signature"),
    [
        ("SIGBUS", "", "SIGBUS"),
        ("SIGABRT", "Fatal Python error: Segmentation fault", "SIGABRT"),
        ("SIGKILL", "Fatal Python error: Segmentation fault", "SIGSEGV"),
        ("SIGKILL", "", "SIGKILL"),
        ("process exit code 3", "", "exit code 3"),
        ("process exit code 3", "Fatal Python error: Aborted", "exit code 3"),
        ("ray: ActorDiedError", "", ""),
        ("ray: ActorDiedError", "Fatal Python error: Bus error", "SIGBUS"),
    ],
)
def test_how_a_process_ended_is_the_launchers_word_before_its_own(
    cause: str, crash: str, signature: str
) -> None:
    """Except for signals from outside: whoever crashes may be ended by them before it is done."""
    assert signature_of(cause, crash) == signature
