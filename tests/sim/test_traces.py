"""Traces are read from four formats; what cannot be read is named with its line."""

from pathlib import Path

import pytest

from mizzen.operator.simulator.traces import (
    Request,
    TraceError,
    TraceFormat,
    load_trace,
    parse_format,
)
from mizzen.operator.simulator.workloads import multiply, ramp

FILES = {
    TraceFormat.AZURE: (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.5000000,30,8\n"
        "2023-11-16 18:17:03.2500000,48,10\n"
        "2023-11-16 18:17:09.0000000,48,0\n"
    ),
    TraceFormat.MOONCAKE: (
        '{"timestamp": 1250, "input_length": 30, "output_length": 8, "hash_ids": [4]}\n\n'
        '{"timestamp": 0, "input_length": 48, "output_length": 10, "hash_ids": [4, 5]}\n'
    ),
    TraceFormat.CSV: "prompt_tokens,output_tokens,arrival_s\n48,10,100\n30,8,101.25\n",
    TraceFormat.JSONL: (
        '{"arrival_s": 7, "prompt_tokens": 48, "output_tokens": 10}\n'
        '{"arrival_s": 8.25, "prompt_tokens": 30, "output_tokens": 8}\n'
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_same_requests(tmp_path: Path, kind: TraceFormat) -> None:
    path = tmp_path / "trace"
    path.write_text(FILES[kind])
    first, second = load_trace(path, kind)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0, 48, 10)
    assert (second.arrival_s, second.prompt_tokens, second.output_tokens) == (1.25, 30, 8)
    assert first.prefix_ids == ((4, 5) if kind is TraceFormat.MOONCAKE else ())


BROKEN = {
    "no such column": (TraceFormat.AZURE, "a,b\n1,2\n", "line 2: no field 'TIMESTAMP'"),
    "no date": (TraceFormat.AZURE, FILES[TraceFormat.AZURE] + "noon,1,1\n", "line 5: .*noon"),
    "no number": (TraceFormat.CSV, FILES[TraceFormat.CSV] + "x,1,1\n", "line 4: .*'x', not a num"),
    "negative": (TraceFormat.CSV, FILES[TraceFormat.CSV] + "-1,1,1\n", "not a count of tokens"),
    "endless": (TraceFormat.CSV, FILES[TraceFormat.CSV] + "inf,1,1\n", "line 4"),
    "no JSON": (TraceFormat.JSONL, "{\n", "line 1 is not JSON"),
    "no object": (TraceFormat.JSONL, "[1]\n", "line 1 is not a JSON object"),
    "empty": (TraceFormat.CSV, "arrival_s,prompt_tokens,output_tokens\n", "holds no request"),
}


@pytest.mark.parametrize(("kind", "content", "said"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, kind: TraceFormat, content: str, said: str
) -> None:
    path = tmp_path / "trace.x"
    path.write_text(content)
    with pytest.raises(TraceError, match=said):
        load_trace(path, kind)


def test_a_missing_file_and_an_unknown_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="There is no trace"):
        load_trace(tmp_path / "absent", TraceFormat.CSV)
    with pytest.raises(TraceError, match="azure, mooncake, csv, jsonl"):
        parse_format("parquet")


def test_multiplied_traffic_keeps_its_bursts() -> None:
    requests = [Request(float(at), 10, 10) for at in (0, 0, 0, 100, 100, 100)]
    tripled = multiply(requests, 3)
    assert len(tripled) == 18
    assert all(r.arrival_s <= 1 or 100 <= r.arrival_s <= 101 for r in tripled)
    assert tripled == sorted(tripled, key=lambda r: r.arrival_s)


def test_a_ramp_climbs_to_its_height_and_falls_again() -> None:
    requests = [Request(at * 0.5, 10 + at, 10) for at in range(100)]
    warped = ramp(requests, low_per_s=2, high_per_s=10, duration_s=600)
    assert len(warped) == 3600
    assert warped[-1].arrival_s == pytest.approx(600)

    def rate(start: float) -> float:
        return sum(start <= r.arrival_s < start + 20 for r in warped) / 20

    assert rate(0) == pytest.approx(2, abs=0.4)
    assert rate(290) == pytest.approx(10, abs=0.5)
    assert rate(580) == pytest.approx(2, abs=0.4)
    assert [r.prompt_tokens for r in warped[:100]] == [r.prompt_tokens for r in requests]
