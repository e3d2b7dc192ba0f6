"""Models that are there already: transformers' own GPT-2 and T5 give the same logits here."""

import json
import math
import shutil
import sys

import pytest
import torch
from helpers import failing, small, write
from hub import EOS, SHORT, byte_level, gpt2_in, t5_in, tokenizers

import data
import train
from harness import pretrained
from harness.command_line import command_line
from harness.config import Config, ConfigError, resolve
from harness.pool import make_world
from harness.pretrained import HubEncoding, hub_name, read_folder
from harness.reference import new_model
from model import response_logps, sample


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return gpt2_in(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return t5_in(tmp_path_factory.mktemp("t5"))


def model_of(folder):
    found = read_folder(folder)
    model = found.new_model()
    model.load_state_dict(found.weights())
    return model.eval(), found.encoding()


PROMPT, RESPONSES = [5, 7, 11, 13, 17, 19, 23], [[3, 29, 31, 37, 41], [43, 47, 2, 53, 59]]


def ours(model):
    """Logits [2, 5, V] of two responses."""
    prompt = torch.tensor([PROMPT])
    return model(prompt, torch.ones_like(prompt, dtype=torch.bool), torch.tensor([RESPONSES]))[0]


# ---------------------------------------------------------------------------------- the same logits


@torch.no_grad()
def test_a_gpt2_gives_the_logits_that_transformers_gives(gpt2):
    folder, other = gpt2
    model, _ = model_of(folder)
    whole = torch.tensor([PROMPT + y for y in RESPONSES])
    theirs = other(whole).logits[:, len(PROMPT) - 1 : -1]
    torch.testing.assert_close(ours(model), theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 0.1  # they say something


@torch.no_grad()
def test_a_t5_gives_the_logits_that_transformers_gives(t5):
    folder, other = t5
    model, _ = model_of(folder)
    prompt, start = torch.tensor([PROMPT] * 2), torch.zeros(2, 1, dtype=torch.long)
    read = torch.cat([start, torch.tensor(RESPONSES)[:, :-1]], 1)
    mask = torch.ones_like(prompt)
    theirs = other(input_ids=prompt, attention_mask=mask, decoder_input_ids=read).logits
    torch.testing.assert_close(ours(model), theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 0.1


def test_weights_may_lie_in_pieces_without_a_prefix_and_in_half_precision(gpt2, tmp_path):
    folder, other = gpt2
    there = {name.removeprefix("transformer."): w.half() for name, w in other.state_dict().items()}
    there["h.0.attn.bias"] = torch.ones(96, 96).tril()  # a mask that old files hold
    pieces = {"one.bin": {}, "two.bin": {}}
    for k, (name, weight) in enumerate(there.items()):
        pieces[f"{('one', 'two')[k % 2]}.bin"][name] = weight
    for piece, weights in pieces.items():
        torch.save(weights, tmp_path / piece)
    index = {name: piece for piece, weights in pieces.items() for name in weights}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(folder / "config.json", tmp_path)
    found, whole = read_folder(tmp_path).weights(), read_folder(folder).weights()
    assert found.keys() == whole.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, whole[name].half().float(), atol=0, rtol=0)


def test_a_t5_without_a_head_of_its_own_reads_the_embedding_as_one(t5, tmp_path):
    folder, other = t5
    state = {k: w for k, w in other.state_dict().items() if k != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    saved = json.loads((folder / "config.json").read_text())
    saved |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # as transformers 5
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = read_folder(tmp_path).weights()
    assert torch.equal(found["lm_head.weight"], found["shared.weight"])


# ------------------------------------------------------------------------------------ the tokenizer


@pytest.mark.parametrize("which", ["gpt2", "t5"])
def test_a_tokenizer_does_the_four_things_that_are_asked_of_tiktokens(which, request):
    folder, other = request.getfixturevalue(which)
    enc = read_folder(folder).encoding()
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert enc.eot_token == other.config.eos_token_id
    assert enc.n_vocab == theirs.get_vocab_size() < other.config.vocab_size
    text = "The Chedden pie was very heavy. It was not fresh."
    assert enc.decode(enc.encode_ordinary(text)) == text
    assert enc.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids
    assert enc.encode_ordinary("") == []


@pytest.mark.parametrize(("which", "special"), [("gpt2", EOS), ("t5", "</s>")])
def test_text_that_looks_like_a_special_token_stays_text(which, special, request):
    folder, _ = request.getfixturevalue(which)
    enc = read_folder(folder).encoding()
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert enc.eot_token in theirs.encode(f"a {special}", add_special_tokens=False).ids
    ids = enc.encode_ordinary(f"a {special}")
    assert enc.eot_token not in ids and len(ids) > 3
    assert enc.decode([enc.eot_token]) == special


def test_a_t5s_prompts_end_as_those_that_it_has_learned_from(t5, gpt2, tmp_path):
    folder, _ = t5
    enc, text = read_folder(folder).encoding(), "How was the pie?"
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert data.encode_prompt(enc, text) == theirs and theirs[-1] == enc.eot_token
    (one,) = data.tokenize([{"prompt": text, "responses": ["No."], "rewards": [1.0]}], enc, 3)
    assert one.prompt_ids == theirs[-3:]
    assert one.response_ids[0].count(enc.eot_token) == 1
    assert data.encode_prompt(enc, "\u2003") == [enc.eot_token]  # white space is no token here
    other = read_folder(gpt2[0]).encoding()
    assert data.encode_prompt(other, text) == other.encode_ordinary(text)
    # A tokenizer.json that puts nothing there, and one of a GPT-2 that does.
    saved = json.loads((folder / "tokenizer.json").read_text())
    plain = json.dumps(saved | {"post_processor": None})
    (tmp_path / "plain.json").write_text(plain)
    assert HubEncoding(tmp_path / "plain.json", read_folder(folder).config).prompt_end == []
    ending = gpt2[0] / "tokenizer.json"
    ending = json.loads(ending.read_text()) | {"post_processor": saved["post_processor"]}
    ending = json.dumps(ending).replace("</s>", EOS).replace('"ids": [1]', '"ids": [0]')
    (tmp_path / "ending.json").write_text(ending)
    made = HubEncoding(tmp_path / "ending.json", read_folder(gpt2[0]).config)
    assert made.decoder.encode("").ids == [made.eot_token] and made.prompt_end == []


def test_a_prompt_without_a_token_is_one_line(t5, tmp_path):
    folder, _ = t5
    copy = edited(folder, tmp_path)
    saved = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(saved | {"post_processor": None}))
    with pytest.raises(data.DataError, match=r"the prompt '\\t' has no token"):
        data.encode_prompt(read_folder(copy).encoding(), "\t")
    saved["model"]["unk_id"] = None
    (copy / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(data.DataError, match="can't encode '\u4f60'"):
        read_folder(copy).encoding().encode_ordinary("\u4f60")


def test_gpt2s_own_vocabulary_is_tiktokens(tmp_path, monkeypatch):
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 64, "n_embd": 8}
    config |= {"n_layer": 1, "n_head": 1, "eos_token_id": 50256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stand_in = data.encoding({bytes([b]): b for b in range(256)})
    monkeypatch.setattr(data, "gpt2_encoding", lambda: stand_in)
    assert read_folder(tmp_path).encoding() is stand_in
    own = byte_level()
    own.save(str(tmp_path / "tokenizer.json"))  # the same size by chance, and other words
    assert isinstance(read_folder(tmp_path).encoding(), HubEncoding)
    vocabulary = {"\u0120the": 262, "a": 0}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    assert read_folder(tmp_path).encoding() is stand_in

    def no_network():
        raise data.DataError("no network")

    monkeypatch.setattr(data, "gpt2_encoding", no_network)
    assert isinstance(read_folder(tmp_path).encoding(), HubEncoding)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(data.DataError, match="no network"):
        read_folder(tmp_path).encoding()


@pytest.mark.parametrize("which", ["gpt2", "t5"])
def test_ids_beyond_the_tokenizers_are_never_sampled_and_have_no_share(which, request):
    folder, _ = request.getfixturevalue(which)
    model, enc = model_of(folder)
    V = model.config.vocab_size
    allowed = data.allowed_tokens(None, enc, 6, V)
    assert allowed.shape == (6, V) and allowed.sum(-1).tolist() == [enc.n_vocab] * 6
    assert data.allowed_tokens(None, enc, 6, enc.n_vocab) is None
    with torch.no_grad():  # all but one of the last ids is what it would say
        last = model.lm_head.weight if which == "t5" else model.wte.weight
        last[enc.n_vocab :] *= 100.0
    prompt = torch.tensor([PROMPT])
    where = prompt, torch.ones_like(prompt, dtype=torch.bool), 200, 6
    assert sample(model, *where, torch.Generator().manual_seed(0))[0].max() >= enc.n_vocab
    ids, mask = sample(model, *where, torch.Generator().manual_seed(0), allowed=allowed)
    assert ids.max() < enc.n_vocab
    # One token more: over the ids that are left, log pi is normalised.
    responses = [[[i] for i in range(enc.n_vocab)]]
    batch = data.make_batch([data.Example("", PROMPT, responses[0], [0.0] * enc.n_vocab)], 0)
    total = response_logps(model, batch, allowed).double().logsumexp(-1)
    assert math.isclose(total.item(), 0.0, abs_tol=1e-5)


# -------------------------------------------------------------------------------------------- a run

ROWS = [
    {"prompt": f"How was {i}?", "responses": ["It was fine.", "No."], "rewards": [1.0, i % 2]}
    for i in range(60)
]
REWARD = """
def variety(prompt, response):
    return len(set(response)) / 10
"""


@pytest.mark.parametrize("which", ["gpt2", "t5"])
@pytest.mark.parametrize("objective", ["lire", "dro"])
def test_a_run_starts_from_it_and_ends_well(which, objective, request, tmp_path, capsys):
    folder, _ = request.getfixturevalue(which)
    (tmp_path / "mine.py").write_text(REWARD)
    settings = {**SHORT, "init": str(folder), "objective": objective, "lr": 1e-2}
    settings |= {"data": [str(write(tmp_path, *ROWS))], "reward": f"{tmp_path}/mine.py:variety"}
    settings |= {"vocab_size": None, "evolve": 2, "task": "dialogue"}
    metrics = train.main(small(tmp_path / "run", **settings))
    assert f"reference: {folder}" in capsys.readouterr().out
    assert metrics["kl"] > 0 and math.isfinite(metrics["policy_reward"])
    # The reference is that model, and nothing of it is trained.
    reference = torch.load(tmp_path / "run" / "reference.pt", weights_only=True)
    weights = read_folder(folder).weights()
    assert all(torch.equal(reference[name], weights[name]) for name in weights)
    assert not (tmp_path / "reference").exists()
    policy = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["policy"]
    assert any(not torch.equal(policy[name], weights[name]) for name in weights)


@pytest.mark.parametrize("which", ["gpt2", "t5"])
def test_no_weights_are_drawn_for_those_that_are_loaded(which, request, monkeypatch):
    """There is nothing in a model but its weights, which a state dict holds all."""
    folder, _ = request.getfixturevalue(which)
    found, devices, normal = read_folder(folder), [], torch.nn.init.normal_
    noted = lambda tensor, **more: devices.append(tensor.device.type) or normal(tensor, **more)
    monkeypatch.setattr(torch.nn.init, "normal_", noted)
    settings = {"init": str(folder), "max_prompt": 40, "max_response": 24, "device": "cpu"}
    c = resolve(Config(**settings, out="unused"))
    before = torch.get_rng_state()
    model = new_model(c, make_world(c))
    assert set(devices) == {"meta"} and torch.equal(before, torch.get_rng_state())
    weights = dict(model.named_parameters())
    assert model.state_dict().keys() == weights.keys() == found.weights().keys()
    assert all(p.device.type == "cpu" and p.requires_grad for p in weights.values())
    assert not list(model.buffers())


def test_a_file_and_steps_of_sft(gpt2, tmp_path):
    folder, _ = gpt2
    settings = {**SHORT, "task": "dialogue", "init": str(folder), "vocab_size": None}
    settings |= {"data": [str(write(tmp_path, *ROWS))], "reference_steps": 3}
    metrics = train.main(small(tmp_path / "run", **settings))
    assert math.isfinite(metrics["top1_reward_policy_sum"])
    reference = torch.load(tmp_path / "run" / "reference.pt", weights_only=True)
    weights = read_folder(folder).weights()
    assert not torch.equal(reference["wte.weight"], weights["wte.weight"])
    cached = [json.loads(path.read_text()) for path in (tmp_path / "reference").glob("*.json")]
    assert [key["weights of --init"] for key in cached] == [read_folder(folder).digest()[:16]]
    # The same weights with another tokenizer are another reference.
    copy = edited(folder, tmp_path)
    byte_level(280).save(str(copy / "tokenizer.json"))
    train.main(small(tmp_path / "again", **settings | {"init": str(copy)}))
    assert len(list((tmp_path / "reference").glob("*.json"))) == 2


def test_a_run_of_ours_is_a_model_to_start_from(tmp_path):
    first, second, third = (tmp_path / name for name in ("one", "two", "three"))
    train.main(small(first, steps=3, model="t5"))
    settings = {"layers": None, "heads": None, "width": None, "reference_steps": None}
    train.main(small(second, steps=3, init=str(first), **settings))
    policy = torch.load(first / "checkpoint.pt", weights_only=True)["policy"]
    reference = torch.load(second / "reference.pt", weights_only=True)
    assert policy.keys() == reference.keys()
    assert all(torch.equal(policy[name], reference[name]) for name in policy)
    assert (first / "tokenizer.txt").read_text() == (second / "tokenizer.txt").read_text()
    train.main(small(third, steps=3, init=str(second), **settings))  # and that one is too
    again = resolve(Config(init=str(third), task="tiny"))
    assert again.lr == resolve(Config(model="t5", task="tiny")).lr


def test_a_run_from_a_folder_hands_its_tokenizer_on(gpt2, tmp_path):
    folder, other = gpt2
    train.main(small(tmp_path / "one", **SHORT | {"init": str(folder), "steps": 2}))
    model, enc = model_of(tmp_path / "one")
    assert isinstance(enc, HubEncoding) and enc.eot_token == other.config.eos_token_id
    text = "It was heavy."
    assert enc.encode_ordinary(text) == read_folder(folder).encoding().encode_ordinary(text)


def test_a_resumed_run_goes_on_to_the_same_bits_and_the_folder_may_move(gpt2, tmp_path):
    folder, _ = gpt2
    whole = train.main(small(tmp_path / "a", **SHORT | {"init": str(folder), "eval_every": 2}))
    began, moved = shutil.copytree(folder, tmp_path / "began"), tmp_path / "moved"
    with failing(4), pytest.raises(OSError):
        train.main(small(tmp_path / "b", **SHORT | {"init": str(began), "eval_every": 2}))
    began.rename(moved)
    (moved / "model.safetensors").unlink()  # the run has its own
    with pytest.raises(ConfigError, match="give --init beside --resume"):
        train.main(command_line(["--resume", str(tmp_path / "b")]))
    other = edited(moved, tmp_path)  # other tokens of the same texts
    byte_level(280).save(str(other / "tokenizer.json"))
    with pytest.raises(ConfigError, match="its data have changed"):
        train.main(command_line(["--resume", str(tmp_path / "b"), "--init", str(other)]))
    again = train.main(command_line(["--resume", str(tmp_path / "b"), "--init", str(moved)]))
    assert again["policy_reward"] == whole["policy_reward"] and again["kl"] == whole["kl"]


# ------------------------------------------------------------------------------------ what it says


def test_defaults_with_a_folder_and_with_a_run(gpt2, tmp_path):
    folder, other = gpt2
    hub = resolve(Config(init=str(folder), max_prompt=64, max_response=32))
    assert (hub.model, hub.layers, hub.heads, hub.width) == ("gpt", 2, 3, 12)
    assert (hub.reference_steps, hub.tokenizer, hub.vocab_size) == (0, None, None)
    fresh = resolve(Config())
    assert math.isclose(hub.lr, fresh.lr / 100)
    assert math.isclose(hub.reference_lr, fresh.reference_lr / 100)
    train.main(small(tmp_path / "one", steps=2, model="t5"))
    run = resolve(Config(init=str(tmp_path / "one"), task="tiny"))
    assert run.model == "t5" and run.lr == resolve(Config(model="t5", task="tiny")).lr
    # A run that began elsewhere, and a run that began with that one, have the same model.
    settings, last = {**SHORT, "steps": 2}, folder
    for name in ("two", "three"):
        train.main(small(tmp_path / name, **settings | {"init": str(last)}))
        last = tmp_path / name
        run = resolve(Config(init=str(last), max_prompt=64, max_response=32))
        assert (run.lr, run.reference_lr) == (hub.lr, hub.reference_lr)


def refusal(*options):
    with pytest.raises((ConfigError, data.DataError)) as e:
        make_world(resolve(command_line(list(map(str, options)))))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_does_not_fit_the_folder_is_refused(gpt2, tmp_path):
    folder, _ = gpt2
    init = ["--init", folder, "--max-prompt", 40, "--max-response", 24]
    there = f"with --init {folder}:"
    assert refusal(*init, "--layers", 3) == f"--layers 3 {there} there it is 2"
    assert refusal(*init, "--model", "t5") == f"--model t5 {there} there it is gpt"
    for own in (["--vocab-size", 300], ["--tokenizer", "gpt2"]):
        assert refusal(*init, *own) == f"{own[0]} {own[1]} {there} a folder has its own"
    resolve(command_line(list(map(str, [*init, "--layers", 2]))))  # nothing else than it has
    said = refusal("--init", folder, "--max-prompt", 64, "--max-response", 33)
    assert "reads 96 tokens" in said and "are 97" in said
    assert "--init takes a run on it" in refusal(*init, "--task", "tiny")


def edited(folder, tmp_path, **changes):
    """A copy of a folder with another config.json."""
    copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("which", "changes", "said"),
    [
        ("gpt2", {"model_type": "llama"}, "model_type is 'llama', expected gpt2 or t5"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"n_inner": 7}, "n_inner is 7, expected None or 48"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"eos_token_id": None}, "eos_token_id is None"),
        ("gpt2", {"eos_token_id": 9999}, "eos_token_id is 9999"),
        ("gpt2", {"n_embd": "wide"}, "is damaged"),
        ("gpt2", {"n_embd": True}, "width True, expected 1 to"),
        ("gpt2", {"n_embd": 0}, "width 0, expected 1 to"),
        ("gpt2", {"n_layer": 0}, "layers 0, expected 1 to"),
        ("gpt2", {"n_layer": 10**6}, "layers 1000000, expected 1 to 1000"),  # no memory holds them
        ("gpt2", {"n_embd": 2**70}, "width 1180591620717411303424, expected"),
        ("gpt2", {"n_head": 5}, "width 12 is not a multiple of 5 heads"),
        ("t5", {"feed_forward_proj": "relu"}, "'gated-gelu' (as T5 v1.1 and FLAN-T5)"),
        ("t5", {"tie_word_embeddings": True}, "scale_decoder_outputs is True"),
        ("t5", {"num_decoder_layers": 1}, "num_decoder_layers is 1, expected 2"),
        ("t5", {"relative_attention_max_distance": 64}, "relative_attention_max_distance is 64"),
    ],
)
def test_another_architecture_is_named_and_refused(which, changes, said, request, tmp_path):
    folder, _ = request.getfixturevalue(which)
    size = ["--max-prompt", 40, "--max-response", 24]
    assert said in refusal("--init", edited(folder, tmp_path, **changes), *size)


def test_a_damaged_folder_is_one_line(gpt2, tmp_path):
    folder, _ = gpt2
    size = ["--max-prompt", 40, "--max-response", 24]
    assert "is no folder" in refusal("--init", tmp_path / "nothing", *size)
    assert "config.json is not there" in refusal("--init", tmp_path, *size)
    copy = edited(folder, tmp_path)
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json is damaged" in refusal("--init", copy, *size)
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer.json; transformers writes one" in refusal("--init", copy, *size)
    for content in ("{", "[]", "null"):
        (copy / "config.json").write_text(content)
        assert "config.json is damaged: no 'model_type' in it" in refusal("--init", copy, *size)
    (copy / "config.json").write_text('{"task": "dialogue"}')  # a run that ended before its model
    assert "config.json has no 'model_type', expected" in refusal("--init", copy, *size)
    byte_level(500).save(str((copy := edited(folder, tmp_path)) / "tokenizer.json"))
    assert "its tokenizer has 500 tokens, its model 303" in refusal("--init", copy, *size)


def weights_refused(folder):
    with pytest.raises(data.DataError) as e:
        read_folder(folder).weights()
    return str(e.value)


def test_weights_that_do_not_fit_are_one_line(gpt2, tmp_path):
    folder, other = gpt2
    copy = edited(folder, tmp_path, n_layer=3)
    assert "h.2.ln_1.weight is missing" in weights_refused(copy)
    copy = edited(folder, tmp_path, n_positions=97)
    assert "wpe.weight is [96, 12], its config says [97, 12]" in weights_refused(copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    assert "can't be read" in weights_refused(copy)
    (copy / "model.safetensors").unlink()
    for content in ([1], None, 5):
        torch.save(content, copy / "pytorch_model.bin")
        assert "can't be read" in weights_refused(copy)
    weights = {name: w.to(torch.int8) for name, w in other.state_dict().items()}
    torch.save(weights, copy / "pytorch_model.bin")
    assert "wte.weight is torch.int8, expected floats" in weights_refused(edited(copy, tmp_path))
    torch.save({"transformer.wte.weight": 1}, copy / "pytorch_model.bin")
    assert "wte.weight is missing" in weights_refused(copy)
    (copy / "pytorch_model.bin").unlink()
    index = copy / "model.safetensors.index.json"
    for pieces in ([], {"a": 1}, {"a": ["b"]}):
        index.write_text(json.dumps({"weight_map": pieces}))
        assert "index.json is damaged" in weights_refused(copy)
    index.unlink()
    assert "no model.safetensors and no pytorch_model.bin" in weights_refused(copy)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert weights_refused(copy) == f"{copy}/model-00001-of-00002.safetensors is not there"


def test_bad_weights_leave_nothing_behind(gpt2, tmp_path):
    copy = edited(gpt2[0], tmp_path, n_layer=3)
    with pytest.raises(data.DataError, match="h.2.ln_1.weight is missing"):
        train.main(small(tmp_path / "run", **SHORT | {"init": str(copy)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("package", "what"), [("safetensors", "weights"), ("tokenizers", "encoding")]
)
def test_an_optional_package_that_is_absent_is_named(package, what, gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    with pytest.raises(data.DataError, match=f"needs {package}: pip install {package}"):
        getattr(read_folder(gpt2[0]), what)()


def test_every_weight_has_a_name_elsewhere_and_no_two_the_same():
    with pytest.raises(KeyError):
        hub_name("decoder.blocks.0.other.weight")
    for kind in (pretrained.GPT(pretrained.GPTConfig()), pretrained.T5(pretrained.T5Config())):
        names = [hub_name(name) for name in kind.state_dict()]
        assert len(names) == len(set(names))
