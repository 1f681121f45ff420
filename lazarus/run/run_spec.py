"""Make the ``RunSpec`` of a run before its first process starts; also used by a dry run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lazarus.checkpoint.files.place import check_place
from lazarus.config import preflight
from lazarus.config.changes import decisive
from lazarus.config.hf_folder import hf_problems
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem
from lazarus.faults import fault_problems, parse_fault
from lazarus.run.control_config import Policies, ThisRun, control_config, keeps_checkpoints
from lazarus.run.run_place import RunPlace, next_journal
from lazarus.run.tokenizer_check import tokenizer_problems
from lazarus.runtime.driver.chaos import CHAOS_KINDS
from lazarus.runtime.host.memory import ranks_per_node
from lazarus.runtime.rpc.credentials import credentials_from
from lazarus.runtime.spec import RunSpec


def prepared(
    place: RunPlace, *, policies: Policies, faults: tuple[str, ...], user: bytes, scratch: Path
) -> RunSpec:
    """Make the driver's ``RunSpec``, after checking that the checkpoint URL can be written to.

    Args:
        place: The run's folder, and the checkpoint to resume from.
        policies: The result of ``policies_of``.
        faults: Scripted faults of the configuration and the caller.
        user: The pickled ``UserCode``.
        scratch: Folder for files that are deleted after the run.

    Raises:
        ConfigError: The checkpoint URL holds another run's checkpoints; or the URL, the secret or
            a certificate cannot be used.
        StorageError: The checkpoint storage is full or out of order.
    """
    config, start = place.config, place.start
    if keeps_checkpoints(config):
        name, stuck_s = f"probe-{place.run_id}", config.timeouts.storage_stuck_s
        check_place(place.url, name=name, patience_s=stuck_s)
        place.check_checkpoints()
    run = ThisRun(
        run_id=place.run_id,
        run_dir=place.folder,
        checkpoint_url=place.url,
        ranks_per_node=ranks_per_node(config.cluster.ranks_per_node),
        faults=faults,
        start=start,
    )
    return RunSpec(
        config=config,
        control=control_config(config, policies=policies, run=run),
        user=user,
        run_dir=place.folder,
        scratch=scratch,
        credentials=credentials_from(config.security),
        decisive=decisive(config),
        lives=(*(() if start is None else start.lives), place.run_id),
        journal=next_journal(place.folder),
    )


def scratch_folder(place: RunPlace) -> Path:
    """Make a folder for the run's temporary files.

    Raises:
        ConfigError: The folder cannot be made. ``place`` was given back.
    """
    try:
        return Path(tempfile.mkdtemp(prefix="lazarus-"))
    except OSError as problem:
        place.leave()
        text = f"no folder for temporary files can be made ({problem}); TMPDIR names another place"
        raise ConfigError(text) from problem


def check_run(config: TrainConfig, *, model: Any, data: Any, faults: tuple[str, ...]) -> None:
    """Check what does not depend on the run's folder or on the checkpoint to resume from.

    Args:
        config: The run's configuration.
        model: The user's model; None for ``config.model``.
        data: The user's data; None for ``config.data``.
        faults: Scripted faults as text.

    Raises:
        ConfigError: The run cannot work; all problems found.
    """
    problems: list[Problem] = preflight.security_problems(config)
    if model is None and data is None:
        problems += preflight.builtin_problems(config)
    elif data is None:
        problems += preflight.data_problems(config)
    if model is None:
        problems += hf_problems(config)
    if data is None:
        problems += tokenizer_problems(config, has_model=model is not None)
    problems += fault_problems(
        [parse_fault(text) for text in faults],
        nodes=config.cluster.nodes,
        steps=config.train.steps,
        chaos=config.faults.parsed_chaos(),
    )
    chaos = config.faults.parsed_chaos()
    if chaos is not None and (odd := set(chaos.kinds) - CHAOS_KINDS):
        text = (
            f"chaos cannot draw {', '.join(sorted(odd))}; it can: {', '.join(sorted(CHAOS_KINDS))}"
        )
        problems.append(Problem(text, key="faults.chaos"))
    if problems:
        raise ConfigError(problems)
