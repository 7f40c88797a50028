"""Every relative link and anchor in our Markdown leads somewhere: `python -m hack.links`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def anchor(heading: str) -> str:
    """Return the anchor that a heading gets, by the rule that Git hosts share."""
    words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return words.strip().replace(" ", "-")


def broken_links(page: Path) -> list[str]:
    """Return one sentence for each relative link of a page that leads nowhere."""
    found = []
    for link in _LINK.findall(page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page.resolve()
        if not target.exists():
            found.append(f"{page}: {link}: no such file")
        elif fragment and fragment not in map(anchor, _HEADING.findall(target.read_text())):
            found.append(f"{page}: {link}: no such heading")
    return found


def main() -> int:
    """Check every Markdown page that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    problems = [line for page in listed.stdout.split() for line in broken_links(Path(page))]
    print("\n".join(problems) or "links: all lead somewhere")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
