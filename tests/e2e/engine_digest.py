"""One start for `test_kept_graphs.py`: `engine_digest.py [FOLDER]` generates, learns, prints a digest.

And the names of the graphs that it compiled, each with whether it was taken from the folder.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

from engine_case import SETTINGS, initial_tensors, prompts, restore, training_batch, uniforms
from mindspore_case import ONE_LAYER

from rollforward.engines.mindspore.engine import create


def main(folder: str | None) -> None:
    engine = create(replace(SETTINGS, model_config=ONE_LAYER, compile_cache_folder=folder))
    restore(engine, initial_tensors(engine))
    made = engine.generate(*prompts(6), uniforms(6))
    outcome = engine.update(training_batch(engine, 6), 1e-2)
    found = hashlib.sha256(made.completion_ids.tobytes() + outcome.logprobs.tobytes())
    for tensors in engine.tensors().values():
        for array in tensors.values():
            found.update(array.tobytes())
    result = [found.hexdigest(), outcome.loss, outcome.grad_norm]
    print(json.dumps([result, engine.graphs.taken]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
