"""REINFORCE learns to spell a word, and may be killed at any moment: python examples/own_loop/train.py RUN"""

import sys
from functools import partial

import numpy as np

import rollforward

WORD, LETTERS = "ROLLFORWARD", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEED, SAMPLES, RATE = 1, 64, 2.0
TARGET = np.array([LETTERS.index(letter) for letter in WORD])


def probabilities(logits):
    """Softmax over letters: [positions, letters]."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def sample(logits, step, rank):
    """Spell the word many times, with random numbers that are keyed by the step; reward right letters."""
    uniforms = np.random.default_rng([SEED, step, rank]).random((SAMPLES, len(WORD), 1))
    letters = (uniforms > probabilities(logits).cumsum(axis=1)[:, :-1]).sum(axis=2)
    return {"letters": letters.astype(np.int8), "rewards": (letters == TARGET).mean(axis=1)}


def gradient(logits, batch):
    """Of the expected reward: advantage times the gradient of the log-probability, averaged."""
    advantages = batch["rewards"] - batch["rewards"].mean()
    chosen = np.eye(len(LETTERS))[batch["letters"]] - probabilities(logits)
    return np.einsum("s,spl->pl", advantages, chosen) / SAMPLES


def train(path, steps, rank=0, world_size=1, all_gather=lambda value: [value]):
    """Train to the end, from wherever the run in `path` stands; returns the logits."""
    logits, momentum = np.zeros((2, len(WORD), len(LETTERS)))
    tensors = {"policy": {"logits": logits}, "optimizer": {"momentum": momentum}}
    facts = {"word": WORD, "seed": SEED, "samples": SAMPLES, "rate": RATE}
    processes = {"rank": rank, "world_size": world_size, "all_gather": all_gather}
    with rollforward.open_run(path, facts=facts, log=print, **processes) as run:
        start = run.restore(tensors)
        for step in range(start.step if start else 0, steps):
            batch = run.once(step, "rollouts", partial(sample, logits, step, rank))
            gradients = np.array(all_gather(gradient(logits, batch).tolist()))
            with run.updating(step):
                momentum *= 0.9
                momentum += gradients.mean(axis=0)
                logits += RATE * momentum
            run.outcome(step, reward=batch["rewards"].mean(), norm=np.linalg.norm(momentum))
            run.checkpoint(step + 1, tensors, every=20)
        run.checkpoint(steps, tensors)
    return logits


if __name__ == "__main__":
    print("".join(LETTERS[i] for i in train(sys.argv[1], steps=200).argmax(axis=1)))
