"""Which start-ups are learned from what is seen of replicas."""

from __future__ import annotations

from mizzen.operator.planning.learning import absorb, usual_start_s
from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_rules import Tuning
from mizzen.operator.planning.signals import Observation, ReplicaState

TUNING = Tuning()


def look(history: History, now_s: float, *replicas: tuple[str, float, float | None]) -> History:
    """Return the history after a look at replicas: name, creation, and start where it has ended."""
    states = tuple(
        ReplicaState(
            name=name, age_s=now_s - created_s, is_ready=start_s is not None, start_s=start_s
        )
        for name, created_s, start_s in replicas
    )
    return absorb(history, Observation(now_s=now_s, replicas=states), TUNING)


def test_a_start_is_learned_once_it_has_ended_and_only_once() -> None:
    history = look(History(), 0, ("a", 0, None))
    assert history.starts == ()
    for now_s in (60, 65, 70):
        history = look(history, now_s, ("a", 0, 58.0))
    assert history.starts == (58.0,)


def test_the_next_replica_in_a_slot_is_learned_too_although_its_name_is_the_same() -> None:
    history = look(History(), 300, ("a", 0, 290.0))
    history = look(history, 400)
    history = look(history, 500, ("a", 480, None))
    history = look(history, 520, ("a", 480, 20.0))
    assert history.starts == (290.0, 20.0)
    replaced_between_two_looks = look(history, 600, ("a", 570, 25.0))
    assert replaced_between_two_looks.starts == (290.0, 20.0, 25.0)


def test_a_replica_that_was_not_ready_for_a_moment_has_not_started_again() -> None:
    history = look(History(), 100, ("a", 0, 60.0))
    history = look(history, 5000, ("a", 0, None))
    history = look(history, 5010, ("a", 0, 5005.0))
    assert history.starts == (60.0,)
    assert usual_start_s(history, TUNING) == 60.0


def test_what_serves_when_the_operator_begins_anew_is_known_from_the_status() -> None:
    told = History(starts=(60.0, 70.0))
    history = look(told, 9000, ("a", 0, 60.0), ("b", 0, 8000.0))
    assert history.starts == (60.0, 70.0)
    history = look(history, 9100, ("a", 0, 60.0), ("b", 0, 8000.0), ("c", 9010, 80.0))
    assert history.starts == (60.0, 70.0, 80.0)


def test_of_a_deployment_nobody_watched_a_container_that_began_anew_teaches_nothing() -> None:
    history = look(History(), 90_000, ("a", 0, 61.0), ("b", 0, 86_400.0))
    assert history.starts == (61.0,)


def test_a_slow_start_that_was_seen_is_learned_however_slow() -> None:
    history = look(History(), 0, ("a", 0, None))
    history = look(history, 2000, ("a", 0, 1995.0))
    assert history.starts == (1995.0,)
