"""A PyTorch model learns to spell a word, and may be killed at any moment: python train.py RUN

In one process, or in several: torchrun --nproc-per-node 2 train.py RUN
"""

import sys

import torch
from torch import distributed, nn

import rollforward
from rollforward.torch import (
    HostCopies,
    load_optimizer,
    optimizer_groups,
    optimizer_tensors,
    process_group,
    put_back,
)

WORD, LETTERS = "ROLLFORWARD", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEED, SAMPLES, RATE = 1, 64, 0.02
TARGET = torch.tensor([LETTERS.index(letter) for letter in WORD])


def sample(model, step, rank):
    """Spell the word many times, with random numbers that are keyed by the step; reward right letters."""
    torch.manual_seed(SEED + 1000 * step + rank)
    with torch.no_grad():
        letters = torch.multinomial(model(torch.arange(len(WORD))).softmax(-1), SAMPLES, replacement=True).T
    return {"letters": letters.numpy(), "rewards": (letters == TARGET).float().mean(1).numpy()}


def loss_of(model, batch):
    """REINFORCE: minus advantage times log-probability, averaged."""
    letters, rewards = torch.from_numpy(batch["letters"]), torch.from_numpy(batch["rewards"])
    chosen = model(torch.arange(len(WORD))).log_softmax(-1)[torch.arange(len(WORD)), letters]
    return -((rewards - rewards.mean())[:, None] * chosen).sum(1).mean()


def average_gradients(model, world_size):
    """Data-parallel training: every process takes the step of all."""
    if world_size > 1:
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size


def train(path, steps):
    """Train to the end, from wherever the run in `path` stands; returns the model."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Embedding(len(WORD), 32), nn.Tanh(), nn.Linear(32, len(LETTERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    facts = {"word": WORD, "seed": SEED, "samples": SAMPLES, "rate": RATE}
    versions, processes, copies = {"torch": torch.__version__}, process_group(), HostCopies()
    with rollforward.open_run(path, facts=facts, versions=versions, log=print, **processes) as run:
        policy = copies.arrays(model.state_dict())
        start = run.restore({"policy": policy}, free=["optimizer"])
        if start:
            put_back(model.state_dict(), policy)
            load_optimizer(optimizer, names, start.free.get("optimizer", {}), start.state["groups"])

        def save(step, every=None):
            tensors = {"policy": copies.arrays(model.state_dict())}
            if moments := copies.arrays(optimizer_tensors(optimizer, names), "optimizer"):
                tensors["optimizer"] = moments
            state = {"groups": optimizer_groups(optimizer, names)}
            run.checkpoint(step, tensors, every=every, state=state)

        if not start:
            save(0)
        for step in range(start.step if start else 0, steps):
            batch = run.once(step, "rollouts", lambda step=step: sample(model, step, processes["rank"]))
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            average_gradients(model, processes["world_size"])
            with run.updating(step):
                optimizer.step()
            run.outcome(step, loss=loss.item())
            run.metrics(step, reward=batch["rewards"].mean())
            save(step + 1, every=20)
        save(steps)
    return model


if __name__ == "__main__":
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    trained = train(sys.argv[1], steps=200)
    print("".join(LETTERS[i] for i in trained(torch.arange(len(WORD))).argmax(-1)))
