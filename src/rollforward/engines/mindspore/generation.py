"""Sampling completions: samples take slots, draw a token each step, and leave when they are done.

    waiting samples -> free slots; their prompts, each once -> prefill -> pages of the cache
                                                                              |
    every step: the samples that are there -> decode (rows x pages) -> a token each; who is done, leaves

There are `samples_per_generation` slots. A slot that becomes free is taken by the next sample that waits.
When none waits, steps go on with the rows that are left, and every step looks at no more pages than the
longest sample there has filled: so the cost follows the tokens. Both numbers are rounded up to a ladder,
since each shape is a graph of its own.

Samples with the same prompt share its keys and values, computed once for those that come one after the other.

Promises: no randomness except the uniforms; a sample's tokens depend on its own prompt and uniforms only,
whichever others there are, and in whichever order: `decoding` says why the shape does not matter.
Left out: beams and repetition penalties. And a number that is not finite may reach others, through columns of
weight 0: a model that has got there is stopped by the loss, which is not finite either.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
from mindspore import Tensor

from rollforward.engines.mindspore.compiling import Graphs
from rollforward.engines.mindspore.decoding import Cache, Decode, Prefill, decode_example, prefill_example
from rollforward.engines.mindspore.kernels import Kernels, ladder, rung
from rollforward.engines.mindspore.model import MASKED, Decoder
from rollforward.engines.mindspore.pages import PAGE, Pages
from rollforward.engines.mindspore.sampling import Sampler
from rollforward.errors import EngineError
from rollforward.grpo.ports import Meeting
from rollforward.grpo.types import Bools, EngineSettings, Floats, Generation, Ints

TOGETHER = 8
"""Prompts of one prefill where there are that many: few tokens each would not fill the kernels."""


class Generator:
    """Samples completions from a decoder, whose parameters it shares and never changes."""

    def __init__(
        self, decoder: Decoder, settings: EngineSettings, graphs: Graphs, sharing: Meeting = nullcontext
    ) -> None:
        """`sharing` is entered around each graph: workers that hold the model together meet in them."""
        self._sharing = sharing
        self._prompt_length = settings.prompt_length
        self._sampling = settings.sampling
        kv_heads = decoder.config.kv_heads
        slots, tokens = settings.samples_per_generation, settings.sampling.max_tokens
        self._pages = Pages(
            slots=slots, prompt_length=settings.prompt_length, max_tokens=tokens, kv_heads=kv_heads
        )
        cache = Cache(decoder, self._pages.rows)
        sampler = Sampler(settings.sampling, decoder.vocabulary)
        self._slots = slots
        kernels = Kernels.here()
        self._rows = kernels.rows(slots)
        # Two matrices at least go through BatchMatMul: see `decoding`.
        alone = 2 if kv_heads == 1 else 1
        self._together = kernels.prompts(alone, min(TOGETHER, slots))
        self._widths = ladder(self._pages.of_prompt, 2)
        self._depths = ladder(self._pages.most, 2, least=4)

        def prefill(prompts: int, pages: int) -> tuple[Prefill, tuple[Tensor, ...]]:
            width = pages * PAGE
            return Prefill(decoder, cache, prompts, width), prefill_example(prompts, width, kv_heads)

        def decode(rows: int, pages: int) -> tuple[Decode, tuple[Tensor, ...]]:
            return Decode(decoder, cache, sampler, rows, pages), decode_example(rows, pages, kv_heads)

        self._prefill, self._decode = graphs.by_shape("prefill", prefill), graphs.by_shape("decode", decode)

    def generate(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> Generation:
        """See `grpo.ports.Engine.generate`. EngineError for other shapes, and for a prompt without tokens."""
        self._check(prompt_ids, prompt_mask, uniforms)
        prompts = [tuple(ids[mask].tolist()) for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        samples, tokens = uniforms.shape
        completions = np.full((samples, tokens), self._sampling.pad_token_id, np.int32)
        lengths = np.full(samples, tokens, np.int32)
        stopped = np.zeros(samples, np.bool_)
        stops = np.array(self._sampling.stop_token_ids, np.int32)
        waiting = deque(range(samples))
        seats = Seats(self._slots, self._sampling.pad_token_id)
        while waiting or len(seats.taken()):
            self._fill(seats, waiting, prompts)
            slots = seats.taken()
            sample, token = seats.sample[slots], seats.drawn[slots]
            drawn = self._step(seats, slots, uniforms[sample, token])
            completions[sample, token] = drawn
            ends = np.isin(drawn, stops)
            lengths[sample[ends]], stopped[sample[ends]] = token[ends] + 1, True
            seats.go_on(slots, drawn, leaving=ends | (token == tokens - 1))
        return Generation(completion_ids=completions, lengths=lengths, stopped=stopped)

    def _check(self, prompt_ids: Ints, prompt_mask: Bools, uniforms: Floats) -> None:
        expected = (len(uniforms), self._prompt_length)
        if prompt_ids.shape != expected or prompt_mask.shape != expected:
            raise EngineError(
                f"prompts of shape {prompt_ids.shape} with a mask of {prompt_mask.shape}; "
                f"this engine was built for {expected}"
            )
        if uniforms.shape[1:] != (self._sampling.max_tokens,):
            raise EngineError(
                f"uniforms of shape {uniforms.shape}; "
                f"this engine was built for {self._sampling.max_tokens} tokens"
            )
        empty = np.flatnonzero(~prompt_mask.any(axis=1))
        if empty.size:
            raise EngineError(
                f"the prompt of sample {empty[0]} has no token", hint="begin it with a BOS token"
            )

    def _fill(self, seats: "Seats", waiting: deque[int], prompts: Sequence[tuple[int, ...]]) -> None:
        """Seat who waits, and run the prompts that are new: of one token, all is in the first step."""
        new: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for slot in seats.free():
            if not waiting:
                break
            sample = waiting.popleft()
            prompt = prompts[sample]
            if seats.take(slot, sample, prompt) and len(prompt) > 1:
                width = rung(-(-len(prompt) // PAGE), self._widths)
                new.setdefault(width, []).append((int(seats.area[slot]), prompt))
        for width, areas in new.items():
            alone, together = self._together
            while areas:
                count = together if 2 * len(areas) > together else alone
                self._run_prompts(areas[:count], count, width)
                del areas[:count]

    def _run_prompts(self, areas: Sequence[tuple[int, tuple[int, ...]]], count: int, pages: int) -> None:
        """Prefill: prompts with their areas, filled up to `count` with prompts of one pad token."""
        filled = [*areas, *[(self._slots, (self._sampling.pad_token_id,))] * (count - len(areas))]
        width = pages * PAGE
        ids = np.full((count, width), self._sampling.pad_token_id, np.int32)
        for row, (_, prompt) in enumerate(filled):
            ids[row, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for _, prompt in filled], np.int32)
        positions = np.minimum(np.arange(width, dtype=np.int32), lengths[:, None] - 1)
        places = self._pages.of_prompts(np.array([area for area, _ in filled], np.int32), width)
        cell = self._prefill.at(count, pages)
        with self._sharing():
            cell(Tensor(ids), Tensor(positions), Tensor(places)).asnumpy()

    def _step(self, seats: "Seats", slots: Ints, uniforms: Floats) -> Ints:
        """The next token of the samples in these slots."""
        rows = rung(len(slots), self._rows)
        nobody = np.full(rows - len(slots), self._slots, np.int32)
        slots, uniforms = np.concatenate([slots, nobody]), np.pad(uniforms, (0, len(nobody)))
        lengths, drawn = seats.length[slots], seats.drawn[slots]
        pages = rung(self._pages.needed(lengths, drawn), self._depths)
        seen = self._pages.seen(slots, seats.area[slots], lengths, drawn, pages)
        hidden = np.where(seen.hidden, np.float32(MASKED), np.float32(0))[:, None, None]
        arrays = seats.token[slots], seen.positions, seen.places, seen.blocks, hidden, uniforms
        cell = self._decode.at(rows, pages)
        with self._sharing():
            found: Ints = cell(*map(Tensor, arrays)).asnumpy()
        return found[: rows - len(nobody)]


class Seats:
    """Who is in which slot, and which prompt in which area. Arrays over slots; the last is nobody's.

    There are as many areas as slots, so one is always free for a sample that has found a slot.
    """

    def __init__(self, slots: int, pad: int) -> None:
        self.sample = np.full(slots + 1, -1, np.int32)
        """Which sample it is; -1: the slot is free."""
        self.area = np.full(slots + 1, slots, np.int32)
        """Where the keys and values of its prompt are."""
        self.length = np.ones(slots + 1, np.int32)
        """Tokens of its prompt."""
        self.drawn = np.zeros(slots + 1, np.int32)
        """Tokens drawn so far."""
        self.token = np.full(slots + 1, pad, np.int32)
        """What the next step runs: the token drawn last, at first the last of the prompt."""
        self._prompts: dict[tuple[int, ...], int] = {}
        """Prompt -> area."""
        self._unused = list(range(slots))
        """Areas that never had a prompt."""

    def taken(self) -> Ints:
        """The slots that are."""
        return np.flatnonzero(self.sample >= 0).astype(np.int32)

    def free(self) -> Ints:
        """The slots that are, but for the last, which always is."""
        return np.flatnonzero(self.sample[:-1] < 0).astype(np.int32)

    def take(self, slot: int, sample: int, prompt: tuple[int, ...]) -> bool:
        """Seat a sample; whether its prompt is in no area yet."""
        new = prompt not in self._prompts
        if new:
            self._prompts[prompt] = self._free_area()
        self.sample[slot], self.area[slot] = sample, self._prompts[prompt]
        self.length[slot], self.drawn[slot], self.token[slot] = len(prompt), 0, prompt[-1]
        return new

    def go_on(self, slots: Ints, drawn: Ints, leaving: Bools) -> None:
        """A token was drawn for each of these; those who leave do."""
        self.token[slots] = drawn
        self.drawn[slots] += 1
        self.sample[slots[leaving]] = -1

    def _free_area(self) -> int:
        """One that nobody looks at, if need be that of the prompt that came first."""
        if self._unused:
            return self._unused.pop(0)
        used = set(self.area[self.taken()].tolist())
        prompt = next(prompt for prompt, area in self._prompts.items() if area not in used)
        return self._prompts.pop(prompt)
