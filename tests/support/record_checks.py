"""What every reader of a record relies on."""

from __future__ import annotations

from lazarus.control.ports import Publish
from lazarus.record.events import faults_of


def check_event(publish: Publish) -> None:
    """A reader of the record finds in each event what the event must have."""
    totals = dict.fromkeys(("goodput_tokens_per_s", "ettr", "plt"), 0.0)  # the shell adds these
    event = {**totals, **publish.fields, "t": publish.t, "event": publish.event}
    assert not faults_of(event), (publish.event, faults_of(event))
