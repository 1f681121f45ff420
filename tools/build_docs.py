"""Build the documentation site into build/site; broken links and other warnings fail.

    python tools/build_docs.py

All pages are copied into one tree with the repository's own layout, so that a link that works in a
checkout works on the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
COPIED = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", "benchmarks/README.md",
    "benchmarks/log", "tests/README.md", "examples", "configs", "deploy",
)  # fmt: skip
# What a browser would fetch by itself; links that a reader may follow are none of it.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
)


def stage() -> None:
    """Copy what the site consists of."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in COPIED:
        source, target = ROOT / name, PAGES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, target)


def loaded_from_elsewhere() -> list[str]:
    """Everything on the built pages that a browser would fetch from another host."""
    found = []
    for page in sorted(SITE.rglob("*.html")):
        found += [f"{page.relative_to(SITE)}: {tag}" for tag in LOADED.findall(page.read_text())]
    return found


def main() -> int:
    stage()
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement, not of our pages
    # Not --quiet: it would silence the warnings that --strict counts.
    done = subprocess.run(build, cwd=ROOT, env=quiet, check=False)
    if done.returncode != 0:
        return done.returncode
    elsewhere = loaded_from_elsewhere()
    for line in elsewhere:
        print(f"error: loaded from another host: {line}", file=sys.stderr)
    print(f"wrote {SITE / 'index.html'}")
    return int(bool(elsewhere))


if __name__ == "__main__":
    sys.exit(main())
