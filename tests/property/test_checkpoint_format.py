"""Laws of the format: what is written is what is read, and no damage passes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from lazarus.checkpoint.errors import CheckpointError, DamagedError
from lazarus.checkpoint.format.image import ITEM_BYTES, TensorSpec, layout_image, parse_image
from lazarus.checkpoint.format.manifest import (
    PARTS,
    ExpertVersion,
    FileEntry,
    LayerEntry,
    Manifest,
    TensorEntry,
    WrittenFile,
)
from lazarus.checkpoint.format.manifest_text import from_text, to_text

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
specs = st.builds(
    TensorSpec,
    name=names.filter(lambda n: n != "__metadata__"),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
)
spec_lists = st.lists(specs, max_size=6, unique_by=lambda s: s.name)


def image_of(tensors: list[TensorSpec], fill: bytes) -> bytes:
    layout = layout_image(tensors, metadata={"step": "7"})
    data = bytearray(layout.num_bytes)
    data[: len(layout.header)] = layout.header
    for spec, offset in zip(layout.specs, layout.offsets, strict=True):
        data[offset : offset + spec.num_bytes] = (fill * spec.num_bytes)[: spec.num_bytes]
    return bytes(data)


@given(tensors=spec_lists, fill=st.binary(min_size=1, max_size=4))
def test_the_public_library_reads_every_image(tensors: list[TensorSpec], fill: bytes) -> None:
    image = image_of(tensors, fill)
    assert dict(parse_image(image).metadata) == {"step": "7"}
    read = dict(deserialize(image))
    assert read.keys() == {s.name for s in tensors}
    for spec in tensors:
        assert tuple(read[spec.name]["shape"]) == spec.shape
        want = (fill * spec.num_bytes)[: spec.num_bytes]
        assert bytes(read[spec.name]["data"]) == want


@given(tensors=spec_lists)
def test_tensors_lie_aligned_to_their_items(tensors: list[TensorSpec]) -> None:
    layout = layout_image(tensors, metadata={})
    for spec, offset in zip(layout.specs, layout.offsets, strict=True):
        assert offset % ITEM_BYTES[spec.dtype] == 0
    assert len(layout.header) % 64 == 0


@given(tensors=spec_lists, cut=st.integers(1, 500))
def test_a_truncated_image_is_refused(tensors: list[TensorSpec], cut: int) -> None:
    image = image_of(tensors, b"\x01")
    with pytest.raises(DamagedError):
        parse_image(image[: max(0, len(image) - cut)])


@given(data=st.binary(max_size=200))
def test_foreign_bytes_raise_nothing_but_damage(data: bytes) -> None:
    try:
        parse_image(data)
    except DamagedError:
        return
    try:
        deserialize(data)
    except SafetensorError:
        # Ours looks at layout only; the library may refuse more.
        return


SHA = st.text("0123456789abcdef", min_size=64, max_size=64)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(
        st.dictionaries(
            st.integers(0, 99).map(lambda i: f"step-00000001/f{i}"),
            st.builds(FileEntry, num_bytes=st.integers(0, 2**50), sha256=SHA),
            min_size=1,
            max_size=4,
        )
    )
    paths = st.sampled_from(sorted(files))
    versions = st.dictionaries(
        st.sampled_from(PARTS),
        st.builds(
            ExpertVersion,
            file=paths,
            step=st.integers(0, 10**6),
            generation=st.integers(0, 99),
            routed=st.integers(0, 10**12),
        ),
    )
    counts = draw(st.lists(st.integers(1, 3), max_size=3))
    return Manifest(
        job=draw(names),
        term=draw(st.integers(0, 9)),
        generation=draw(st.integers(0, 99)),
        step=draw(st.integers(0, 10**8)),
        kind=draw(st.sampled_from(["full", "partial"])),
        created_at_s=draw(st.floats(0, 1e10)),
        lineage=tuple(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=3))),
        layers=tuple(
            LayerEntry(
                path=draw(names),
                num_experts=n,
                tensors={"weights": tuple(draw(spec_lists)), "optimizer": ()},
            )
            for n in counts
        ),
        dense=draw(
            st.dictionaries(
                names,
                st.builds(TensorEntry, file=paths, dtype=st.just("F32"), shape=st.just((2, 3))),
                max_size=3,
            )
        ),
        experts=tuple(tuple(draw(versions) for _ in range(n)) for n in counts),
        files=files,
        meta=draw(
            st.dictionaries(
                names, st.integers(-(2**63), 2**63 - 1) | st.lists(st.floats(-1, 1)), max_size=3
            )
        ),
    )


@settings(max_examples=40)
@given(manifest=manifests())
def test_a_manifest_is_read_as_it_was_written(manifest: Manifest) -> None:
    assert from_text(to_text(manifest), path="m") == manifest
    assert to_text(from_text(to_text(manifest), path="m")) == to_text(manifest)


@settings(max_examples=40)
@given(manifest=manifests(), data=st.data())
def test_no_flipped_bit_of_a_manifest_passes(manifest: Manifest, data: st.DataObject) -> None:
    text = bytearray(to_text(manifest).encode())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] ^= 1 << data.draw(st.integers(0, 6))
    try:
        read = from_text(bytes(text), path="m")
    except CheckpointError:
        return
    assert read == manifest, "a flip may only be harmless (an equal spelling of the same number)"


@settings(max_examples=40)
@given(
    body=st.recursive(
        st.none() | st.integers() | names, lambda x: st.lists(x) | st.dictionaries(names, x)
    )
)
def test_any_json_is_either_a_manifest_or_refused(body: object) -> None:
    for content in (body, {"format": 1, "checksum": "x", "files": body}):
        with pytest.raises(CheckpointError):
            from_text(json.dumps(content), path="m")


@given(
    written=st.builds(
        WrittenFile,
        path=names,
        num_bytes=st.integers(0, 2**40),
        sha256=SHA,
        kind=st.sampled_from(["dense", "expert"]),
        step=st.integers(0, 10**6),
        generation=st.integers(0, 99),
        layer=st.integers(-1, 99),
        expert=st.integers(0, 999),
        routed=st.integers(0, 10**12),
        parts=st.sampled_from([PARTS, ("weights",), ()]),
        specs=spec_lists.map(tuple),
    )
)
def test_a_writers_report_crosses_the_wire(written: WrittenFile) -> None:
    assert WrittenFile.from_json(json.loads(json.dumps(written.to_json()))) == written
