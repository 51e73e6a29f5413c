"""Samples are laid out in rows, and what is computed comes back; no token is lost or weighed wrongly."""

from dataclasses import replace

import numpy as np
import pytest
from engine_case import SETTINGS, token_batch
from mindspore_case import MODEL

from rollforward.engines.mindspore.batches import chunk_of, ladder_of, laid_out, packed
from rollforward.errors import EngineError
from rollforward.grpo.group import OneProcess
from rollforward.grpo.types import TokenBatch

LADDER = ladder_of(replace(SETTINGS, model_config=MODEL))


def with_groups(tokens: TokenBatch) -> TokenBatch:
    """Two samples to a prompt."""
    pairs = np.arange(len(tokens.prompt_ids)) // 2 * 2
    return replace(tokens, prompt_ids=tokens.prompt_ids[pairs], prompt_mask=tokens.prompt_mask[pairs])


@pytest.mark.parametrize("rows", [1, 4, 5, 16])
def test_every_column_is_a_token_of_its_sample_and_predicts_the_next(rows: int) -> None:
    tokens = with_groups(token_batch(rows))
    chunk = chunk_of(tokens)
    weights = tokens.completion_mask.astype(np.float32)
    back = np.zeros_like(weights)
    for batch in packed(chunk, LADDER):
        columns, places = laid_out(chunk, batch)
        weighed = places.take(weights, batch.shape)
        assert ((columns.targets >= 0) == (weighed == 1)).all(), "where nothing is predicted, nothing weighs"
        flat = {name: array.reshape(-1) for name, array in vars(columns).items()}
        for sample, token, row, column in zip(
            places.samples, places.tokens, places.rows, places.columns, strict=True
        ):
            own = [*chunk.prompts[sample], *chunk.completions[sample]]
            at = len(chunk.prompts[sample]) + token
            assert columns.targets[row, column] == own[at]
            by = columns.predictors[row, column]
            assert by // batch.width == row
            assert flat["positions"][by] == at - 1
            # What the predicting column sees, in order, is the sample up to it.
            within = slice(row * batch.width, by + 1)
            sees = (flat["groups"][within] == flat["groups"][by]) & (
                (flat["samples"][within] == 0) | (flat["samples"][within] == flat["samples"][by])
            )
            assert flat["ids"][within][sees].tolist() == own[:at]
            assert flat["positions"][within][sees].tolist() == list(range(at))
        places.put_back(back, weighed)
    np.testing.assert_array_equal(back, weights)


def test_samples_of_one_prompt_are_a_group_wherever_its_padding_is() -> None:
    tokens = token_batch(2)
    mask = np.zeros_like(tokens.prompt_mask)
    mask[0, -3:] = mask[1, :3] = True
    ids = np.zeros_like(tokens.prompt_ids)
    ids[mask] = [5, 6, 7, 5, 6, 7]
    chunk = chunk_of(replace(tokens, prompt_ids=ids, prompt_mask=mask))
    assert chunk.groups == [0, 0]
    assert chunk.prompts[1].tolist() == [5, 6, 7]
    ids[1, 0] = 8
    assert chunk_of(replace(tokens, prompt_ids=ids, prompt_mask=mask)).groups == [0, 1]


def test_under_dynamic_rope_beyond_the_limit_a_sample_is_alone() -> None:
    """All of its angles, the prompt's too, follow from its own length."""
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    for limit, alone in ((8, True), (64, False)):
        model = {**MODEL, **scaling, "max_position_embeddings": limit}
        assert ladder_of(replace(SETTINGS, model_config=model)).alone is alone


def test_one_process_sees_values_as_many_would() -> None:
    group = OneProcess()
    assert group.all_gather({"a": (1, 2.5), "b": "é"}) == [{"a": [1, 2.5], "b": "é"}]
    with pytest.raises(EngineError, match="JSON"):
        group.all_gather({"array": np.zeros(2)})
