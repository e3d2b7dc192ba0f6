"""Folders of models from elsewhere, made by transformers: small, random, with a tokenizer."""

import json

import pytest
import torch

import data

transformers = pytest.importorskip("transformers", reason="it makes them: pip install transformers")
tokenizers = pytest.importorskip("tokenizers", reason="it makes their tokenizer.json")

TEXTS = [text for r in data.make_task("dialogue").logged(0, 300) for text in r["responses"]]
EOS = "<|endoftext|>"


def byte_level(vocab_size=300):
    """A tokenizer as GPT-2's, trained on a few sentences."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet
    )
    own.train_from_iterator(TEXTS, trainer)
    return own


def sentence_pieces(vocab_size=200):
    """A tokenizer as T5's: pieces of words, <pad> 0, </s> 1, put at the end unless told not to."""
    own = tokenizers.Tokenizer(tokenizers.models.Unigram())
    words = tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(words))
    own.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    own.train_from_iterator(TEXTS, trainer)
    end = [("</s>", own.token_to_id("</s>"))]
    own.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=end)
    return own


def random_weights(model):
    """Every weight, norms and biases too, somewhere else than where it began."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


def gpt2_in(folder):
    """(folder, transformers' model): a small random GPT-2 with a tokenizer of its own."""
    own = byte_level()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=own.get_vocab_size() + 3,
        n_positions=96,
        n_embd=12,
        n_layer=2,
        n_head=3,
        bos_token_id=own.token_to_id(EOS),
        eos_token_id=own.token_to_id(EOS),
    )
    other = random_weights(transformers.GPT2LMHeadModel(config))
    other.save_pretrained(folder)
    own.save(str(folder / "tokenizer.json"))
    return folder, other


def t5_in(folder):
    """(folder, transformers' model): a small random T5 v1.1 whose head is not its embedding."""
    own = sentence_pieces()
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=own.get_vocab_size() + 5,
        d_model=12,
        d_kv=5,
        d_ff=17,
        num_layers=2,
        num_heads=3,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    other = transformers.T5ForConditionalGeneration(config)
    other.lm_head = torch.nn.Linear(12, config.vocab_size, bias=False)
    random_weights(other)
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    del saved["scale_decoder_outputs"]  # as FLAN's own file, which is older
    (folder / "config.json").write_text(json.dumps(saved | {"tie_word_embeddings": False}))
    torch.save(other.state_dict(), folder / "pytorch_model.bin")
    own.save(str(folder / "tokenizer.json"))
    return folder, other


# Of a run that starts from one.
SHORT = {"max_prompt": 40, "max_response": 24, "layers": None, "heads": None, "width": None}
SHORT |= {"task": "dialogue", "reference_steps": None, "steps": 4, "eval_samples": 4}
