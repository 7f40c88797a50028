"""`python -m hack.generate TARGET [--check]`: write the generated files, or fail on drift."""

import argparse
import sys
from pathlib import Path

from hack.generate import crds, docs, openapi

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"crds": crds.files, "docs": docs.files, "openapi": openapi.files}


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 where --check found files that differ."""
    parser = argparse.ArgumentParser(prog="python -m hack.generate", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on drift")
    options = parser.parse_args(arguments)
    chosen = TARGETS if options.target == "all" else {options.target: TARGETS[options.target]}
    stale = 0
    for files in chosen.values():
        for path, text in files().items():
            target = ROOT / path
            if target.exists() and target.read_text() == text:
                continue
            if options.check:
                print(f"{path} is out of date: run `make crds docs openapi` and commit the result")
                stale = 1
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
                print(f"wrote {path}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
