"""A request in the loop: its sequence, its text so far, its times. Says when a sequence ends."""

from dataclasses import dataclass, replace

from mizzen.runtime.engine.adapters import SlotUse
from mizzen.runtime.engine.api import FinishedRequest, FinishReason, TokenLogprob, TokenOutput
from mizzen.runtime.engine.detokenizer import Delta, Detokenizer
from mizzen.runtime.engine.sequence import Sequence
from mizzen.runtime.engine.streams import Stream


@dataclass(slots=True, eq=False)
class Live:
    """What the loop keeps of a request until it ends."""

    seq: Sequence
    detokenizer: Detokenizer
    stream: Stream
    arrived_at: float
    adapter_use: SlotUse | None = None
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    def take(
        self, token_id: int, logprob: TokenLogprob | None, eos_ids: frozenset[int]
    ) -> TokenOutput:
        """Append a sampled token and return what the client gets of it.

        The output's `finish_reason` says whether the sequence ends here.
        """
        seq, params = self.seq, self.seq.sampling
        seq.token_ids.append(token_id)
        may_stop = seq.output_tokens >= params.min_tokens
        if may_stop and token_id in params.stop_token_ids:
            seq.stop_reason = token_id
            return self._output(token_id, logprob, self.detokenizer.finish(), "stop")
        if may_stop and token_id in eos_ids and not params.ignore_eos:
            return self._output(token_id, logprob, self.detokenizer.finish(), "stop")
        delta = self.detokenizer.push(token_id, check_stop=may_stop)
        if delta.stop is not None:
            seq.stop_reason = delta.stop
            return self._output(token_id, logprob, delta, "stop")
        reason: FinishReason | None = None
        if seq.grammar is not None and seq.grammar.advance(token_id):
            reason = "stop"
        elif seq.output_tokens >= seq.max_tokens:
            reason = "length"
        if reason:
            rest = self.detokenizer.finish()
            return self._output(token_id, logprob, Delta(delta.text + rest.text), reason)
        return self._output(token_id, logprob, delta, None)

    def embedded(self, hidden_D: list[float]) -> TokenOutput:
        """Return the only output of a sequence that is embedded."""
        return replace(self._output(None, None, Delta(""), "stop"), embedding=tuple(hidden_D))

    def aborted(self) -> TokenOutput:
        """Return the last output of a sequence that was ended from outside."""
        return self._output(None, None, self.detokenizer.finish(), "abort")

    def finished(self, reason: FinishReason, now: float) -> FinishedRequest:
        """Return the request's life in figures; what never began took no time."""
        scheduled = self.scheduled_at or now
        first = self.first_token_at or now
        return FinishedRequest(
            finish_reason=reason,
            prompt_tokens=self.seq.prompt_tokens,
            cached_tokens=self.seq.cached,
            output_tokens=self.seq.output_tokens,
            e2e_s=now - self.arrived_at,
            queue_s=scheduled - self.arrived_at,
            prefill_s=first - scheduled,
            decode_s=(self.last_token_at or first) - first,
        )

    def _output(
        self,
        token_id: int | None,
        logprob: TokenLogprob | None,
        delta: Delta,
        reason: FinishReason | None,
    ) -> TokenOutput:
        seq = self.seq
        return TokenOutput(
            token_ids=() if token_id is None else (token_id,),
            text=delta.text,
            logprobs=() if logprob is None else (logprob,),
            finish_reason=reason,
            stop_reason=seq.stop_reason,
            prompt_tokens=seq.prompt_tokens,
            cached_tokens=seq.cached,
            output_tokens=seq.output_tokens,
        )
