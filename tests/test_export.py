"""A run that is handed on: transformers loads it, with the same ids and the same logits."""

import json
import sys

import pytest
import torch
from helpers import DATA_DIR, ROOT, small
from hub import EOS, SHORT, gpt2_in, t5_in, tokenizers, transformers

import data
import train
from experiments.export import all_merges, byte_letters, export, hub_tokenizer
from harness.config import ConfigError
from harness.pretrained import read_folder
from model import sample

TEXTS = [
    "The Chedden pie was very heavy. It was very fresh.",
    " with a space before",
    "two  spaces,\ttabs\nand\n\nlines ",
    "   ",
    "\n",
    "é",
    "naïve café, Ångström, garçon",
    "e\u0301 is an e and an accent",
    "Straße, ŁÓDŹ, Ñandú",
    "Καλημέρα κόσμε",
    "Привет, мир!",
    "你好，世界。",
    "こんにちは 世界",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "😀 👩\u200d💻 🇫🇷 👍🏽",
    "def f(x):\n    return x ** 2  # 3.14 != 0x1F",
    'for (int i=0; i<n; ++i) { a[i] |= b["key"]; }',
    "it's we've I'll they're don't I'M",
    "snake_case camelCase 1234567890 1,000.50 <|endoftext|>",
    "zero\u200bwidth no\u00a0break \ufeff",
]
TASK = {"task": "dialogue", "reference_steps": 2, "steps": 2, "evolve": 1, "vocab_size": 400}

FEW = {"width": 8, "steps": 1, "batch_size": 1, "candidates": 2, "eval_samples": 2}
FEW |= {"eval_prompts": 1, "max_response": 4, "reference_steps": 1}


def exported(folder, **settings):
    """(our model, our tokenizer, transformers' model, its tokenizer, the folder)"""
    train.main(small(folder / "run", **{**TASK, **settings}))
    export(str(folder / "run"), str(folder / "out"))
    found = read_folder(folder / "run")
    model = found.new_model()
    model.load_state_dict(found.weights())
    auto = transformers.AutoModelForCausalLM
    if found.model == "t5":
        auto = transformers.AutoModelForSeq2SeqLM
    other = auto.from_pretrained(folder / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    return model.eval(), found.encoding(), other, tokenizer


def same_ids(enc, tokenizer):
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == enc.encode_ordinary(text), text
    assert tokenizer.eos_token_id == enc.eot_token


def same_logits(model, other, enc):
    prompt = torch.tensor([enc.encode_ordinary("How was the Ashford soup?")])
    response = torch.tensor([[enc.encode_ordinary(" It was very fresh, and café")]])
    mask, R = torch.ones_like(prompt, dtype=torch.bool), response.shape[-1]
    with torch.no_grad():
        ours = model(prompt, mask, response)[0, 0]
        if hasattr(model, "encoder"):
            start = torch.tensor([[model.config.start]])
            read = torch.cat([start, response[0, :, :-1]], 1)
            theirs = other(input_ids=prompt, decoder_input_ids=read).logits[0]
        else:
            theirs = other(torch.cat([prompt, response[0]], 1)).logits[0, -R - 1 : -1]
    theirs = theirs[:, : ours.shape[-1]]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert ours.std() > 0.05


def same_answer(model, other, enc):
    """The likeliest answer, token by token, by both."""
    prompt = torch.tensor([enc.encode_ordinary("How was the Ashford soup?")])
    allowed = data.allowed_tokens(None, enc, 9, model.config.vocab_size)
    mask, none = torch.ones_like(prompt, dtype=torch.bool), torch.Generator()
    ids, real = sample(model, prompt, mask, 1, 9, none, temperature=1e-30, allowed=allowed)
    theirs = other.generate(prompt, max_new_tokens=9, do_sample=False)[0]
    theirs = theirs[1:] if hasattr(model, "encoder") else theirs[prompt.shape[1] :]
    assert theirs.tolist() == ids[0, 0][real[0, 0]].tolist()


def same_answers_in_a_batch(other, tokenizer):
    """A prompt's answer does not change where a longer prompt is beside it."""

    def answers(*texts):
        torch.manual_seed(0)
        prompts = tokenizer(texts, return_tensors="pt", padding=True)
        said = other.generate(**prompts, max_new_tokens=6, do_sample=False)
        return tokenizer.batch_decode(said, skip_special_tokens=True)

    short, long = "How?", "How was the Ashford soup, and how was the Thornport pie?"
    assert answers(short, long) == answers(short) + answers(long)


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_a_run_with_its_own_bpe(kind, tmp_path):
    model, enc, other, tokenizer = exported(tmp_path, model=kind)
    same_ids(enc, tokenizer)
    same_logits(model, other, enc)
    same_answer(model, other, enc)
    same_answers_in_a_batch(other, tokenizer)
    assert [tokenizer.decode(enc.encode_ordinary(text)) for text in TEXTS] == TEXTS
    assert tokenizer.clean_up_tokenization_spaces is False  # older versions take "a ." to "a."
    if kind == "gpt":
        assert tokenizer.model_max_length == model.config.context
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["do_sample"] and saved["top_k"] == 0  # older versions cut to 50 tokens


def test_a_t5_never_says_its_start_token(tmp_path):
    model, enc, other, _ = exported(tmp_path, model="t5")
    assert other.generation_config.suppress_tokens == [model.config.start] == [enc.n_vocab]
    with torch.no_grad():
        other.lm_head.weight[model.config.start] += 100 * other.lm_head.weight[3]
    prompt = torch.tensor([enc.encode_ordinary("How was the Ashford soup?")])
    torch.manual_seed(0)
    said = other.generate(prompt, max_new_tokens=8, num_return_sequences=50)[:, 1:]
    assert ((said == model.config.start) <= (said == other.config.pad_token_id)).all()
    assert (said[:, 0] != model.config.start).all()


@pytest.mark.parametrize("which", ["gpt2", "t5"])
def test_a_run_that_began_elsewhere_goes_back(which, tmp_path, tmp_path_factory):
    folder, began = {"gpt2": gpt2_in, "t5": t5_in}[which](tmp_path_factory.mktemp(which))
    settings = {**SHORT, "init": str(folder), "steps": 2, "vocab_size": None}
    model, enc, other, tokenizer = exported(tmp_path, **settings)
    same_ids(enc, tokenizer)
    same_logits(model, other, enc)
    same_answer(model, other, enc)
    same_answers_in_a_batch(other, tokenizer)
    assert tokenizer.pad_token == {"gpt2": EOS, "t5": "<pad>"}[which]
    assert tokenizer(TEXTS[0]).input_ids == data.encode_prompt(enc, TEXTS[0])
    ours, theirs = other.state_dict(), began.state_dict()
    assert ours.keys() == theirs.keys()
    assert {k: w.shape for k, w in ours.items()} == {k: w.shape for k, w in theirs.items()}


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_what_is_written_is_what_init_reads(kind, tmp_path):
    exported(tmp_path, model=kind)
    settings = {"init": str(tmp_path / "out"), "reference_steps": None, "vocab_size": None}
    settings |= {"layers": None, "heads": None, "width": None}
    train.main(small(tmp_path / "again", **{**TASK, **settings}))
    export(str(tmp_path / "again"), str(tmp_path / "third"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "third")
    assert tokenizer.pad_token == EOS  # the id that our T5 starts from is no token
    policy = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["policy"]
    reference = torch.load(tmp_path / "again" / "reference.pt", weights_only=True)
    for name, weight in policy.items():  # the head of a T5 has got a row for its start
        assert torch.equal(weight, reference[name][: len(weight)])


def page(block):
    """A python block of docs/models.md."""
    return (ROOT / "docs/models.md").read_text().split("```python\n")[1 + block].split("```")[0]


@pytest.mark.parametrize("which", ["gpt2", "t5"])
def test_the_page_says_how_a_folder_is_made_and_read(which, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    folder, _ = {"gpt2": gpt2_in, "t5": t5_in}[which](tmp_path / "there")
    plain = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})  # T5's has 100 tokens more
    (folder / "tokenizer_config.json").write_text(plain)
    kind = {"gpt2": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}[which]
    into, back = (page(block).replace("AutoModelForCausalLM", kind) for block in (0, 1))
    monkeypatch.chdir(tmp_path)
    exec(into.replace('from_pretrained("gpt2")', 'from_pretrained("there")'), {})
    one, other = read_folder(folder), read_folder("gpt2")
    assert all(torch.equal(other.weights()[name], w) for name, w in one.weights().items())
    ids = [found.encoding().encode_ordinary(TEXTS[0]) for found in (one, other)]
    assert ids[0] == ids[1] and other.config == one.config
    train.main(small("run", **{**SHORT, "init": "gpt2", "steps": 2, "vocab_size": None}))
    export("run", "my-model")
    capsys.readouterr()
    exec(back, {})
    assert len(capsys.readouterr().out) > 10


def gpt2s_pattern():
    """An encoding of GPT-2's size and with its words, but with few of its joins."""
    ranks = data.train_bpe(TEXTS * 2, 600)
    ranks |= {f"#{i}#".encode(): i for i in range(len(ranks), 50256)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return data.tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={data.EOS: 50256}
    )


def test_a_word_is_a_token_however_it_is_put_together():
    enc = data.encoding(data.word_ranks([" calm", " deep"]))  # no token of two letters
    own = tokenizers.Tokenizer.from_str(hub_tokenizer(enc)[0])
    text = " calm deep calmer"
    assert own.encode(text).ids == enc.encode_ordinary(text)


def test_a_run_with_gpt2s_tokenizer(tmp_path, monkeypatch):
    enc = gpt2s_pattern()
    monkeypatch.setattr(data, "gpt2_encoding", lambda: enc)
    model, enc, other, tokenizer = exported(tmp_path, tokenizer="gpt2", **FEW)
    assert not (tmp_path / "run" / "tokenizer.txt").exists()
    same_ids(enc, tokenizer)
    same_logits(model, other, enc)


def test_gpt2s_own_tokenizer_where_it_is_at_hand(tmp_path, monkeypatch):
    cache = DATA_DIR / "tiktoken_cache"
    if not cache.exists():
        pytest.skip(f"{cache} is not there: it holds a copy of tiktoken's gpt2")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    model, enc, other, tokenizer = exported(tmp_path, tokenizer="gpt2", **FEW)
    same_ids(enc, tokenizer)
    same_logits(model, other, enc)


def test_without_safetensors_the_weights_are_pytorchs(tmp_path, monkeypatch):
    train.main(small(tmp_path / "run", **TASK))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "pytorch_model.bin").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.undo()
    found = read_folder(tmp_path / "out").weights()
    policy = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["policy"]
    assert all(torch.equal(policy[name], found[name]) for name in policy)


def test_what_can_not_be_handed_on_is_refused(tmp_path, monkeypatch):
    train.main(small(tmp_path / "tiny"))
    run, out = str(tmp_path / "tiny"), str(tmp_path / "out")
    with pytest.raises(ConfigError, match="on --task tiny a response may hold"):
        export(run, out)
    with pytest.raises(ConfigError, match="no model.json in it"):
        export(str(tmp_path), out)
    train.main(small(tmp_path / "run", **TASK))
    for there in (run, f"{run}/config.json"):
        with pytest.raises(ConfigError, match="is there already and not empty"):
            export(str(tmp_path / "run"), there)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="needs tokenizers: pip install tokenizers"):
        export(str(tmp_path / "run"), out)
    assert not (tmp_path / "out").exists()


def test_every_byte_has_a_letter_of_its_own():
    letters = byte_letters()
    assert set(letters.values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert letters[ord(" ")] == "\u0120" and letters[ord("\n")] == "\u010a" and letters[0x41] == "A"


def test_a_token_is_put_together_in_every_way():
    ranks = data.train_bpe(TEXTS, 500)
    merges = all_merges(ranks)
    made = {left + right for left, right in merges}
    assert made == {token for token in ranks if len(token) > 1}
    rank = [ranks[left + right] for left, right in merges]
    assert rank == sorted(rank)
    assert len(merges) > len(made)  # some in two ways
