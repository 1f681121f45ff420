"""Write a manifest as JSON text, and parse and check such a text. PURE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lazarus.basics.careful import parse_object, text_of
from lazarus.checkpoint.errors import DamagedError, UnknownFormatError
from lazarus.checkpoint.format.manifest import (
    SUPPORTED_FORMATS,
    ExpertVersion,
    FileEntry,
    LayerEntry,
    Manifest,
    TensorEntry,
)

_SHA256_LENGTH = 64


def to_text(manifest: Manifest) -> str:
    """Canonical JSON text of a manifest, with a checksum over all other fields."""
    body: dict[str, Any] = {
        "format": manifest.format,
        "job": manifest.job,
        "term": manifest.term,
        "generation": manifest.generation,
        "step": manifest.step,
        "kind": manifest.kind,
        "created_at": manifest.created_at_s,
        "lineage": [list(pair) for pair in manifest.lineage],
        "layers": [
            {
                "path": entry.path,
                "num_experts": entry.num_experts,
                "tensors": {p: [s.to_json() for s in v] for p, v in entry.tensors.items()},
            }
            for entry in manifest.layers
        ],
        "dense": {
            name: {"file": t.file, "dtype": t.dtype, "shape": list(t.shape)}
            for name, t in sorted(manifest.dense.items())
        },
        "experts": [
            [{p: _version_to_json(v) for p, v in sorted(versions.items())} for versions in layer]
            for layer in manifest.experts
        ],
        "files": {
            path: {"bytes": f.num_bytes, "sha256": f.sha256}
            for path, f in sorted(manifest.files.items())
        },
        "meta": dict(manifest.meta),
    }
    body["checksum"] = _checksum(body)
    return json.dumps(body, indent=None, separators=(",", ":"), sort_keys=True, allow_nan=False)


def from_text(text: str | bytes, *, path: str) -> Manifest:
    """Parse a manifest.

    Args:
        text: Content of the manifest file.
        path: Name of the file, for messages.

    Raises:
        UnknownFormatError: This release cannot read the manifest's format number.
        DamagedError: The text is not JSON or not a manifest, or its checksum differs.
    """
    try:
        body = parse_object(text if isinstance(text, str) else text_of(text))
        found = body["format"]
        if found not in SUPPORTED_FORMATS or isinstance(found, bool):
            raise UnknownFormatError(path=path, found=found, supported=SUPPORTED_FORMATS)
        stated = body.pop("checksum")
        if stated != _checksum(body):
            raise DamagedError(f"{path} does not match its own checksum (flipped or edited)")
        return _from_body(body)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise DamagedError(f"{path} is not a Lazarus manifest: {what}") from error


def _from_body(body: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(
        job=str(body["job"]),
        term=int(body["term"]),
        generation=int(body["generation"]),
        step=int(body["step"]),
        kind=str(body["kind"]),
        created_at_s=float(body["created_at"]),
        lineage=tuple((int(g), int(b)) for g, b in body["lineage"]),
        layers=tuple(LayerEntry.from_json(entry) for entry in body["layers"]),
        dense={
            str(name): TensorEntry(
                file=str(t["file"]), dtype=str(t["dtype"]), shape=tuple(map(int, t["shape"]))
            )
            for name, t in body["dense"].items()
        },
        experts=tuple(
            tuple({p: _version_from_json(v) for p, v in row.items()} for row in layer)
            for layer in body["experts"]
        ),
        files={
            str(path): FileEntry(num_bytes=int(f["bytes"]), sha256=str(f["sha256"]))
            for path, f in body["files"].items()
        },
        meta=dict(body["meta"]),
    )
    _check_references(manifest)
    return manifest


def _check_references(manifest: Manifest) -> None:
    used = {t.file for t in manifest.dense.values()}
    used |= {v.file for layer in manifest.experts for row in layer for v in row.values()}
    if unknown := sorted(used - manifest.files.keys()):
        raise ValueError(f"{unknown[0]} has no checksum")
    if [len(layer) for layer in manifest.experts] != [e.num_experts for e in manifest.layers]:
        raise ValueError("experts and layers differ in number")
    if bad := [p for p, f in manifest.files.items() if len(f.sha256) != _SHA256_LENGTH]:
        raise ValueError(f"{bad[0]} has no sha256")


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _version_to_json(version: ExpertVersion) -> dict[str, Any]:
    return {
        "file": version.file,
        "step": version.step,
        "generation": version.generation,
        "routed": version.routed,
    }


def _version_from_json(data: Mapping[str, Any]) -> ExpertVersion:
    return ExpertVersion(
        file=str(data["file"]),
        step=int(data["step"]),
        generation=int(data["generation"]),
        routed=int(data["routed"]),
    )
