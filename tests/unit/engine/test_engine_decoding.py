"""A row's logits have the same bits in any batch, at any place, and however many pages are looked at.

On a model whose products are large enough for MindSpore's kernels to choose between ways of adding them up:
with those of the golden models a mistake would hardly show.
"""

from functools import cache

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from numpy.typing import NDArray

from rollforward.engines.mindspore.decoding import Cache, Decode, Prefill
from rollforward.engines.mindspore.denormals import flushed
from rollforward.engines.mindspore.kernels import Kernels
from rollforward.engines.mindspore.model import MASKED, Decoder, ModelConfig, initialise
from rollforward.engines.mindspore.pages import PAGE, Pages
from rollforward.engines.mindspore.sampling import Sampler
from rollforward.grpo.types import SamplingSettings

SLOTS, PROMPT, TOKENS = 24, 40, 100
KERNELS = Kernels.here()
LENGTHS = np.random.default_rng(1).integers(2, PROMPT + 1, SLOTS + 1).astype(np.int32)
DRAWN = np.random.default_rng(2).integers(0, TOKENS, SLOTS + 1).astype(np.int32)
IDS = np.random.default_rng(3).integers(0, 700, (SLOTS, 3 * PAGE)).astype(np.int32)
PAGES = Pages(slots=SLOTS, prompt_length=PROMPT, max_tokens=TOKENS, kv_heads=2)
MOST = PAGES.of_prompt + PAGES.own


class Logits(Decode):
    """Decode without its sampler."""

    def construct(self, *given: Tensor) -> Tensor:
        return self.logits(*given)


@cache
def model() -> tuple[Decoder, Cache]:
    """Random weights; a cache that holds prompts, and any keys and values of tokens drawn."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    config = {
        "model_type": "qwen2",
        "vocab_size": 700,
        "hidden_size": 384,
        "intermediate_size": 1056,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    decoder = Decoder(ModelConfig.parse(config))
    initialise(decoder, seed=4, deviation=0.1)
    cache = Cache(decoder, PAGES.rows)
    source = np.random.default_rng(5)
    for buffer in (*cache.keys, *cache.values):
        buffer.asnumpy()[...] = source.standard_normal(buffer.shape, np.float32)
    return decoder, cache


@cache
def prefill_cell(prompts: int, width: int) -> Prefill:
    return Prefill(*model(), prompts, width)


@cache
def logits_cell(rows: int, pages: int) -> Logits:
    sampler = Sampler(SamplingSettings(max_tokens=TOKENS), 700)
    return Logits(*model(), sampler, rows, pages)


def prefill(slots: list[int], width: int = 3 * PAGE) -> NDArray[np.float32]:
    """Run the prompts of these slots together; all keys of the prompts' areas, of the last layer."""
    areas = np.array(slots, np.int32)
    positions = np.minimum(np.arange(width, dtype=np.int32), LENGTHS[areas, None] - 1)
    places = PAGES.of_prompts(areas, width)
    with flushed():
        prefill_cell(len(slots), width)(*map(Tensor, (IDS[areas, :width], positions, places)))
    return model()[1].keys[-1].asnumpy()[PAGES.of_prompts(np.arange(SLOTS, dtype=np.int32), width)].copy()


def logits(slots: list[int], pages: int = MOST) -> NDArray[np.float32]:
    """Of one decoding step of the samples in these slots, in this order."""
    chosen = np.array(slots, np.int32)
    seen = PAGES.seen(chosen, chosen, LENGTHS[chosen], DRAWN[chosen], pages)
    hidden = np.where(seen.hidden, np.float32(MASKED), np.float32(0))[:, None, None]
    given = chosen % 700, seen.positions, seen.places, seen.blocks, hidden
    with flushed():
        found: NDArray[np.float32] = logits_cell(len(slots), pages)(*map(Tensor, given)).asnumpy()
    return found


@pytest.mark.parametrize("most", [3, 8, 13, SLOTS])
def test_in_a_batch_of_any_size_that_is_used_at_any_place(most: int) -> None:
    """Rows that nobody uses are filled up with samples again."""
    samples = list(range(most))
    expected = logits((samples * 2)[: KERNELS.rows(most)[-1]])
    for rows in KERNELS.rows(most):
        order = np.random.default_rng(rows).permutation((samples * rows)[:rows]).tolist()
        assert logits(order).tobytes() == expected[order].tobytes()


def test_only_batches_of_one_size_are_taken_to_repeat_themselves_where_nothing_is_known() -> None:
    wide, narrow = Kernels(avx512=True, avx2=True), Kernels(avx512=False, avx2=True)
    unknown = Kernels(avx512=False, avx2=False)
    assert [wide.rows(most) for most in (1, 8, 24)] == [(2,), (2, 8), (2, 6, 24)]
    assert [narrow.rows(most) for most in (1, 8, 16, 24, 64, 70)] == [
        (2,),
        (8,),
        (16,),
        (16, 32),
        (16, 64),
        (80,),
    ]
    assert [unknown.rows(most) for most in (1, 8, 16, 24, 64)] == [(2,), (8,), (16,), (32,), (64,)]
    assert wide.prompts(1, 8) == (1, 8)
    assert narrow.prompts(1, 8) == unknown.prompts(1, 8) == (1, 1)


def test_however_many_pages_are_looked_at() -> None:
    slots = [int(slot) for slot in np.argsort(DRAWN[:SLOTS])[:6]]
    least = PAGES.needed(LENGTHS[slots], DRAWN[slots])
    assert least < MOST - 2
    expected = logits(slots)
    for pages in (least, least + 1, MOST - 1):
        assert logits(slots, pages).tobytes() == expected.tobytes()


def test_whatever_is_left_in_pages_that_it_does_not_see() -> None:
    _, cache = model()
    slots = [3, 9]
    expected = logits(slots)
    chosen = np.array(slots, np.int32)
    seen = PAGES.seen(chosen, chosen, LENGTHS[chosen], DRAWN[chosen], MOST)
    blocks = seen.blocks.reshape(len(slots), 2, MOST)
    kept = np.zeros(PAGES.rows, np.bool_)
    for row in range(len(slots)):
        for head in range(2):
            rows = (blocks[row, head, :, None] * PAGE + np.arange(PAGE)).reshape(-1)
            kept[rows[~seen.hidden[row]]] = True
    before = [buffer.asnumpy().copy() for buffer in (*cache.keys, *cache.values)]
    for buffer in (*cache.keys, *cache.values):
        buffer.asnumpy()[~kept] = -7.5
    found = logits(slots)
    for buffer, array in zip((*cache.keys, *cache.values), before, strict=True):
        buffer.asnumpy()[...] = array
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("together", sorted({*KERNELS.prompts(1, 8)}))
def test_a_prompt_gives_the_same_keys_beside_any_others(together: int) -> None:
    for start in range(0, SLOTS, KERNELS.prompts(1, 8)[1]):
        expected = prefill(list(range(start, start + KERNELS.prompts(1, 8)[1])))
    order = np.random.default_rng(together).permutation(SLOTS).tolist()
    for start in range(0, SLOTS, together):
        found = prefill(order[start : start + together])
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("slots", [1, 3])
def test_pages_of_samples_never_meet(slots: int) -> None:
    """Every sample writes each of its columns to rows of its own, and sees them in order."""
    pages = Pages(slots=slots, prompt_length=33, max_tokens=20, kv_heads=2)
    every = np.arange(slots, dtype=np.int32)
    prompts = pages.of_prompts(np.arange(slots + 1, dtype=np.int32), 33).reshape(slots + 1, 2, 33)
    written = set(prompts.reshape(-1).tolist())
    assert len(written) == prompts.size
    for length in (1, 2, 16, 17, 18, 33):
        lengths = np.full(slots, length, np.int32)
        own: list[NDArray[np.int32]] = []
        for token in range(20):
            drawn = np.full(slots, token, np.int32)
            needed = pages.needed(lengths, drawn)
            seen = pages.seen(every, every, lengths, drawn, needed)
            own.append(seen.places.reshape(slots, 2))
            rows = seen.blocks.reshape(slots, 2, needed, 1) * PAGE + np.arange(PAGE)
            rows = rows.reshape(slots, 2, -1)
            for sample in range(slots):
                visible = rows[sample][:, ~seen.hidden[sample]]
                expected = [*prompts[sample, :, : length - 1].T, *(each[sample] for each in own)]
                np.testing.assert_array_equal(visible, np.stack(expected, axis=1))
            assert (seen.positions == length - 1 + token).all()
        assert len({*np.concatenate(own).reshape(-1).tolist()} - written) == slots * 2 * 20
