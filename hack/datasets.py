"""Real conversations from a package, as the trainer reads them.

python -m hack.datasets chatterbot --out chat.jsonl --limit 200 --topics ai computers
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

Sample = dict[str, list[dict[str, str]]]


def chatterbot_samples(topics: Sequence[str] = ()) -> Iterator[Sample]:
    """Yield the English dialogues of chatterbot-corpus, in file order; no topic means all."""
    folder = Path(str(files("chatterbot_corpus"))) / "data" / "english"
    known = {path.stem: path for path in sorted(folder.glob("*.yml"))}
    if unknown := sorted(set(topics) - known.keys()):
        raise SystemExit(f"no topic {', '.join(unknown)}; there are {', '.join(known)}")
    for topic in topics or known:
        for turns in yaml.safe_load(known[topic].read_text())["conversations"]:
            if sample := _to_sample(turns):
                yield sample


def _to_sample(turns: list[object]) -> Sample | None:
    """Return alternating turns that end with an answer; None if that leaves no dialogue."""
    # Some lines are numbers or yes and no, which YAML does not read as text.
    texts = [str(turn).strip() for turn in turns]
    texts = texts[: len(texts) // 2 * 2]
    if not texts or not all(texts):
        return None
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def write_chatterbot(out: Path, *, limit: int | None = None, topics: Sequence[str] = ()) -> int:
    """Write messages JSON lines and return their number.

    A limit takes samples at even distances, so that it does not mean the first topic alone.
    """
    samples = list(chatterbot_samples(topics))
    if limit is not None and limit < len(samples):
        samples = [samples[i * len(samples) // limit] for i in range(limit)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    return len(samples)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hack.datasets", description=__doc__)
    corpora = parser.add_subparsers(required=True)
    chatterbot = corpora.add_parser("chatterbot", help="2,000 short English dialogues (BSD)")
    chatterbot.add_argument("--out", type=Path, required=True)
    chatterbot.add_argument("--limit", type=int)
    chatterbot.add_argument("--topics", nargs="*", default=[])
    options = parser.parse_args()
    count = write_chatterbot(options.out, limit=options.limit, topics=options.topics)
    print(f"{count} conversations written to {options.out}")


if __name__ == "__main__":
    main()
