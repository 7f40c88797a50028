"""What the engine promises its callers: values in, values out. Imports no torch."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

from mizzen.runtime.errors import MizzenError

FinishReason = Literal["stop", "length", "abort"]
Message = Mapping[str, Any]
# After every priority that a request can name: such work is nobody's demand and not counted as it.
BACKGROUND_PRIORITY = 2**31


class JsonLayout(TypedDict):
    """Where a grammar's JSON has blanks, as llguidance's "x-guidance" says it."""

    whitespace_flexible: bool
    item_separator: str
    key_separator: str


# Left free, small models fill the gaps with blanks until their tokens are used up.
JSON_ON_ONE_LINE: JsonLayout = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer's text must follow. Lark rules are llguidance's dialect."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends. `temperature=0` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None  # None: as many as the context still holds
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many top alternatives; 0 gives the chosen token's only
    logprobs_as_drawn: bool = False  # of the distribution at this temperature, not at 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    embed: bool = False  # the last hidden state is the answer, and no text


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt to continue. A lower `priority` runs first."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    priority: int = 0
    cache_salt: str = ""
    continues_text: bool = False  # the answer's text is one with the prompt's: no turn is between


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A chosen token's log probability, and the most likely alternatives at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log probability), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Tokens whose probabilities are wanted, computed while no request wants the model."""

    token_ids: tuple[int, ...]
    adapter: str | None = None
    temperature: float = 1.0
    alternatives: int = 0  # likeliest tokens at each place
    samples: int = 0  # token ids drawn at each place from the whole distribution
    seed: int = 0  # of what is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """One entry for each token but the first, which nothing comes before."""

    logprobs: tuple[TokenLogprob, ...]
    drawn: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """A request's life in figures, for metrics and traces."""

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    e2e_s: float
    queue_s: float  # arrival to first scheduled
    prefill_s: float  # first scheduled to first token
    decode_s: float  # first token to last token


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What one step added. The last output of a request carries its `finish_reason`.

    `text` is the new text only: it never holds half a character, and text that may still turn
    into a stop string is withheld until that is known. `output_tokens` counts from the start.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    embedding: tuple[float, ...] | None = None  # the prompt's last hidden state, where asked for
    finished: FinishedRequest | None = None  # with the last output of an answer that was not cut


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """A LoRA adapter that can be asked for now."""

    name: str
    path: str
    digest: str  # of its content, "sha256:..."
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges of this moment and counters since start."""

    running: int  # as `waiting`: without work in the background
    waiting: int
    blocks_total: int
    blocks_free: int
    kv_usage_ratio: float
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    prefix_queries: int  # prompt tokens that were looked up
    prefix_hits: int  # prompt tokens that were found
    steps: int
    heartbeat_age_s: float
    draft_tokens: int = 0  # guessed
    accepted_tokens: int = 0  # of those, how many were right
    block_size: int = 0
    max_loras: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    start_seconds: Mapping[str, float] = field(default_factory=dict)  # start-up phase -> seconds
    loan_step: int | None = None  # of the job that trains in idle moments now; None: none does


@dataclass(frozen=True, slots=True, kw_only=True)
class LoanState:
    """A job on lent weights. `exit_code` is what a trainer's process would have ended with."""

    job: str
    generation: int
    directory: str  # of its checkpoints, by which jobs of one name differ
    progress: str  # the trainer's progress document, as JSON
    exit_code: int | None = None  # None: it is at it
    ended_at: str = ""  # RFC 3339, UTC
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a served model is made of, whole: for those who plan where else it would fit."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int  # what the model was made for
    parameters: int
    layer_parameters: int  # of one layer
    table_parameters: int  # of a vector for every token
    dtype: str  # of the weights in memory
    device_bytes: int  # memory of a GPU; 0 on the CPU


class Recorder(Protocol):
    """Takes the engine's timings. Called from the loop's thread, so it must be quick."""

    def on_first_token(self, ttft_s: float) -> None:
        """A request's first token came `ttft_s` after its arrival."""

    def on_token(self, itl_s: float) -> None:
        """A later token came `itl_s` after the one before it."""

    def on_step(self, step_s: float, tokens: int) -> None:
        """A step took `step_s` and computed `tokens` prompt and output tokens."""

    def on_finish(self, finished: FinishedRequest) -> None:
        """A request ended."""


class TokenizerApi(Protocol):
    """Text to token ids and back, and the model's chat template."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def vocabulary_digest(self) -> str:
        """The sha256 of what each token id means."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""

    @property
    def calls_in_tags(self) -> bool:
        """Whether the model writes tool calls between <tool_call> tags, not as bare JSON."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the text's token ids."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the tokens' text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text, its name where it is a special one."""

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the conversation as the model was trained to read it.

        Raises:
            InvalidRequestError: the template refuses the messages, or there is no template.
        """


class EngineApi(Protocol):
    """The engine as the server sees it.

    `engine.Engine` is the real one, `remote.RemoteEngine` the same in a process of its own.
    """

    model_len: int
    sizes: ModelSizes

    @property
    def tokenizer(self) -> TokenizerApi:
        """The model's tokenizer."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Yield the answer as it grows. Closing or cancelling the iterator aborts the sequence.

        Raises:
            EngineBusyError: the queue is full; `DrainingError` and `AsleepError` when no more
                work is taken.
            PromptTooLongError: the prompt leaves no room for an answer.
            InvalidRequestError: a parameter is out of its range.
            UnknownAdapterError: the adapter is not loaded.
            EngineDeadError: the loop has stopped.
        """

    async def score(self, request: ScoreRequest) -> PromptScores:
        """Return what the model thinks of tokens, once no request wants it.

        Raises:
            EngineBusyError: no such moment came in time, or too much waits for one;
                `DrainingError` and `AsleepError` when no more work is taken.
            PromptTooLongError: the tokens fill the context.
            InvalidRequestError: a parameter is out of its range.
            UnknownAdapterError: the adapter is not loaded.
            GenerationFailedError: the model's numbers are not finite here.
            EngineDeadError: the loop has stopped.
        """

    async def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort"; unknown or ended ones are left alone."""

    async def load_adapter(self, name: str, path: Path, digest: str | None = None) -> None:
        """Make an adapter servable under `name`; an equal content is loaded once only.

        Raises:
            AdapterLoadError: it does not exist, does not fit the model, or no slot is free.
        """

    async def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter once its running requests have ended.

        Raises:
            UnknownAdapterError: it is not loaded.
        """

    def adapters(self) -> list[AdapterState]:
        """Return the adapters that can be asked for, by name."""

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the running ones, abort those left after `timeout_s`."""

    async def sleep(self, timeout_s: float) -> None:
        """End what runs, as `drain` does, and give back the memory of weights and KV cache."""

    async def wake(self) -> None:
        """Read the weights again and take requests; adapters are still there."""

    async def load_weights(self, path: Path) -> None:
        """Serve other weights of the same model; what runs goes on with them.

        Raises:
            BadModelError: they cannot be used; what is served stays as it was.
            InvalidRequestError: the engine is asleep.
        """

    async def start_loan(self, job: str) -> LoanState:
        """Train beside the served weights while no request wants them; `job` is a job.json.

        A generation of a job that is at it already, or is over, is left as it is. One that
        nobody asks about for a minute commits and ends: whoever lent the weights is gone.

        Raises:
            EngineBusyError: another job has them, or its base is another; `DrainingError` and
                `AsleepError` when no more work is taken.
            InvalidRequestError: the job cannot run beside such weights.
        """

    async def stop_loan(self) -> None:
        """Have the job commit its last whole step and end; nothing happens where none is at it."""

    async def loan(self) -> LoanState | None:
        """Return the job that is at it, or the last one; None where there was none."""

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""

    def in_flight(self) -> int:
        """Return how many requests have not ended."""

    def stats(self) -> EngineStats:
        """Return the engine's figures of now."""

    def is_alive(self) -> bool:
        """Whether the loop's heartbeat is fresh or the loop has nothing to do."""

    def death(self) -> MizzenError | None:
        """Why it will never be alive again, None while it may."""

    def is_ready(self) -> bool:
        """Whether it is warm, alive and takes new requests."""

    async def stop(self) -> None:
        """End every request, the loop and the worker ranks."""
