"""The reference: trained once, found in the cache, verified, and told apart from every other."""

import json

import pytest
import torch
from helpers import same, small, untrained, weights

import train
from harness import reference
from harness.command_line import command_line
from harness.config import ConfigError
from harness.pool import score_lists


def test_new_models_depend_on_the_seed_alone():
    c, world, model = untrained()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = reference.new_model(c, world)
    assert same(model.state_dict(), again.state_dict())
    assert torch.equal(before, torch.get_rng_state())  # nobody else's random numbers are spent
    assert not same(model.state_dict(), untrained(seed=1)[2].state_dict())


def test_a_digest_tells_apart_all_that_a_checkpoint_may_hold():
    """Numbers, their kinds and shapes, names, and who holds what: no two of these are the same."""
    zeros = torch.zeros(2, 3)
    contents = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.T},
        {"a": zeros.view(-1)},
        {"a": zeros.double()},
        {"a": zeros.int()},
        {"a": -zeros},  # another bit
        {"a": [zeros]},
        {"a": [zeros, zeros]},
        {"a": [zeros], "b": [zeros]},
        {"a": {"b": zeros}},
        {"a": {"b": zeros, "c": 0}},
        {"a": {"b": zeros}, "c": 0},
        {"a": 0},
        {"a": False},
        {"a": 0.0},
        {"a": "0"},
        {"a": None},
        {0: None},
        {"a": [[1, 2], [3]]},
        {"a": [[1], [2, 3]]},
        {"a": [[[1, 2]], [[3]]]},
        {"a": [[[1, 2], [3]]]},
        {"a": [1, 2, 3]},
        {"a": []},
        {"a": [[]]},
        {"a": {}},
        {},
    ]
    digests = [reference.digest_of(content) for content in contents]
    assert len(set(digests)) == len(contents)
    assert digests == [reference.digest_of(content) for content in contents]
    assert reference.digest_of({"a": zeros.T.contiguous()}) == digests[2]


def test_a_digest_tells_one_number_and_one_name_apart():
    one = {"weight": torch.zeros(2, 3)}
    digests = {
        reference.digest_of(weights)
        for weights in (
            one,
            {"weight": torch.tensor([[0, 0, 0], [0, 0, 1e-30]])},
            {"bias": one["weight"]},
        )
    }
    assert len(digests) == 3 and reference.digest_of({"weight": torch.zeros(2, 3)}) in digests


def test_training_makes_the_logged_responses_likelier():
    c, world, model = untrained(reference_steps=60)
    trained = reference.train_reference(c, world)
    logged = world.logged[:20]
    mean = lambda model: torch.tensor(score_lists(c, world, model, logged)).mean().item()
    assert mean(trained) > mean(model) + 0.5
    assert same(trained.state_dict(), reference.train_reference(c, world).state_dict())


@pytest.mark.parametrize("task", ["dialogue", "tiny"])
def test_each_logged_list_is_read_exactly_once(monkeypatch, task):
    c, world, _ = untrained(task=task, reference_steps=20, reference_batch=4)
    seen, make = [], reference.make_batch

    def noted(examples, *rest):
        seen.extend(examples)
        return make(examples, *rest)

    monkeypatch.setattr(reference, "make_batch", noted)
    reference.train_reference(c, world)
    assert len(world.logged) == c.reference_steps * c.reference_batch == 80
    assert sorted(map(id, seen)) == sorted(map(id, world.logged))


def test_the_cached_reference_is_used_verified_and_told_apart(tmp_path, capsys):
    train.main(small(tmp_path / "a", steps=2))
    train.main(small(tmp_path / "b", steps=2))
    assert "(cached)" in capsys.readouterr().out
    path = next((tmp_path / "reference").glob("*.pt"))
    whole = path.read_bytes()
    kept = torch.load(path, weights_only=True)
    kept["weights"]["wte.weight"][0, 0] += 1  # a readable file with other weights
    torch.save(kept, path)
    train.main(small(tmp_path / "c", steps=2))
    assert "do not match their digest" in capsys.readouterr().out
    path.write_bytes(whole[: len(whole) // 2])  # half a file
    train.main(small(tmp_path / "d", steps=2))
    assert "is damaged" in capsys.readouterr().out
    assert same(weights(tmp_path / "a"), weights(tmp_path / "d"))
    train.main(small(tmp_path / "e", steps=2, seed=7, reference_steps=41))
    assert "the nearest one differs in seed, texts, --reference-steps" in capsys.readouterr().out
    next((tmp_path / "reference").glob("*.json")).write_text("{")  # it only serves a message
    train.main(small(tmp_path / "f", steps=2, reference_steps=2))


def test_a_damaged_file_in_the_cache_is_trained_again(tmp_path, capsys):
    settings = {"reference_steps": 1, "out": str(tmp_path / "run")}
    c, world, _ = untrained(**settings)
    key = reference.cache_key(c, world)
    wanted = reference.get_reference(c, world, key).state_dict()
    (path,) = (tmp_path / "reference").glob("*.pt")
    whole = path.read_bytes()
    kept = torch.load(path, weights_only=True)
    _, _, other = untrained(width=16)

    def saved(content):
        torch.save(content, path)
        return path.read_bytes()

    damages = [b"", b"x", whole[:1], whole[: len(whole) // 2], whole[:-1], 3 * b"garbage"]
    damages += [saved(content) for content in ([], None, {}, kept["weights"])]
    narrow = other.state_dict()
    damages += [saved({"weights": narrow, "digest": reference.digest_of(narrow)})]
    damages += [saved({"weights": kept["weights"], "digest": None}), saved({"digest": "x"})]
    for damage in damages:
        path.write_bytes(damage)
        again = reference.get_reference(c, world, key).state_dict()
        assert same(wanted, again) and path.read_bytes() != damage
        said = capsys.readouterr().out
        assert "is damaged" in said and "training it again" in said and "Traceback" not in said
    reference.get_reference(c, world, key)
    assert "(cached)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [{"width": 64}, {"layers": 2}, {"reference_lr": 1e-3}, {"seed": 1}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_what_changes_the_reference_changes_its_key_and_nothing_else_does(settings):
    c, world, _ = untrained()
    key = reference.cache_key(c, world)
    other, other_world, _ = untrained(**settings)
    assert reference.cache_key(other, other_world) != key
    same_c, same_world, _ = untrained(objective="dro", lr=0.1, steps=3, eval_prompts=2, clip=3.0)
    assert reference.cache_key(same_c, same_world) == key
    assert all(isinstance(value, str) for value in key.values()) and json.dumps(key)


def test_a_resumed_run_has_its_own_reference_or_none(tmp_path, capsys):
    folder = tmp_path / "run"
    train.main(small(folder, steps=2, reference_steps=2))
    for path in (tmp_path / "reference").iterdir():
        path.unlink()
    train.main(command_line(["--resume", str(folder)]))  # the cache is not needed
    assert "reference: " not in capsys.readouterr().out.split("going on from step")[1]
    path = folder / "reference.pt"
    other = torch.load(path, weights_only=True)
    other["wte.weight"][0, 0] += 1
    for damage in (lambda: torch.save(other, path), lambda: path.write_bytes(b"")):
        damage()
        with pytest.raises(ConfigError, match="reference.pt is damaged or not the reference"):
            train.main(command_line(["--resume", str(folder)]))
