"""Files that are replaced as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazarus.basics.files import replaced


def test_a_file_is_the_new_one_or_after_an_error_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with replaced(path) as partial:
        partial.write_text("first")
        assert not path.exists()

    def fail() -> None:
        with replaced(path) as partial:
            partial.write_text("sec")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
