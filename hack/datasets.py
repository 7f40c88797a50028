"""Real examples from packages, as the trainer reads them.

python -m hack.datasets chatterbot --out chat.jsonl --limit 200 --topics ai computers
python -m hack.datasets sentiment --out reviews.jsonl --limit 800
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from hack.models import download_package

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


SENTIMENT_PACKAGE = "vaderSentiment==3.3.2"
_RATINGS = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
_CLEAR_RATING = 1.0  # of -4 to 4: people agree on the sign


def write_sentiment(out: Path, *, limit: int | None = None) -> int:
    """Write clearly rated snippets of product reviews, and return their number.

    Source: Hutto and Gilbert, "VADER", ICWSM 2014; the mean of 20 people's ratings (MIT). The
    ratings are in the source package alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("--no-build-isolation", "--no-binary", ":all:")
        package = download_package(SENTIMENT_PACKAGE, Path(folder), *options)
        lines = _read_ratings(package).splitlines()
    rows = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= _CLEAR_RATING:
            question = f"Is this review positive or negative?\n\n{text.strip()}"
            answer = "positive" if float(rating) > 0 else "negative"
            rows.append(json.dumps({"prompt": question, "completion": answer}))
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(rows) + "\n")
    return len(rows)


def _read_ratings(package: Path) -> str:
    """Return the file of ratings, out of the archive inside the source package."""
    with tarfile.open(package) as outer:
        inner_name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(inner_name)
        assert inner is not None, "it is a file"
        with tarfile.open(fileobj=inner) as archive:
            ratings = archive.extractfile(_RATINGS)
            assert ratings is not None, "it is a file"
            return ratings.read().decode("utf-8", errors="replace")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hack.datasets", description=__doc__)
    corpora = parser.add_subparsers(required=True)
    chatterbot = corpora.add_parser("chatterbot", help="2,000 short English dialogues (BSD)")
    chatterbot.add_argument("--out", type=Path, required=True)
    chatterbot.add_argument("--limit", type=int)
    chatterbot.add_argument("--topics", nargs="*", default=[])
    chatterbot.set_defaults(
        write=lambda asked: write_chatterbot(asked.out, limit=asked.limit, topics=asked.topics)
    )
    sentiment = corpora.add_parser("sentiment", help="rated snippets of product reviews (MIT)")
    sentiment.add_argument("--out", type=Path, required=True)
    sentiment.add_argument("--limit", type=int)
    sentiment.set_defaults(write=lambda asked: write_sentiment(asked.out, limit=asked.limit))
    options = parser.parse_args()
    print(f"{options.write(options)} examples written to {options.out}")


if __name__ == "__main__":
    main()
