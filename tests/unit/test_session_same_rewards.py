from toy_session import Place

from rollforward.verifiers import sameness


def flat(completions):
    return [0.0] * len(completions)


def test_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sameness, "STEPS", 4)
    import sys

    sys.modules["test_wire"] = sys.modules[__name__]
    place = Place(tmp_path)
    place.train("run", reward_config__verifier_function=["test_wire:flat"])
    out = capsys.readouterr().out
    print(out)
    assert out.count("gave every sample") == 1
    print([p for p in tmp_path.rglob("*.log")])


def test_two(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sameness, "STEPS", 4)
    from toy_session import ToyPackage

    place = Place(tmp_path)
    e = place.train_by_two(
        "run", ToyPackage(), ToyPackage(), reward_config__verifier_function=["test_wire:flat"]
    )
    out = capsys.readouterr().out
    print(out)
    assert out.count("gave every sample") == 1, out
