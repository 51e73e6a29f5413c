"""Write train.jsonl and heldout.jsonl, the practice and the held-out problems of `problems.deal`.

Run again it writes the same bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from problems import Problem, deal

HERE = Path(__file__).resolve().parent


def write(path: Path, problems: Sequence[Problem]) -> None:
    """One problem a line; the answer is text, as verifiers compare it."""
    lines = [json.dumps({"prompt": problem.prompt, "answer": str(problem.answer)}) for problem in problems]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(lines)} problems")


if __name__ == "__main__":
    split = deal()
    write(HERE / "train.jsonl", split.practice)
    write(HERE / "heldout.jsonl", split.held_out)
