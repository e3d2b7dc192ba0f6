"""The objectives in Hugging Face's Trainer: an update is that of its whole batch, says an oracle.

The oracle reads each response by itself, in float64. Two processes are this file, run by torchrun.
"""

import importlib
import importlib.util
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, write

from harness.config import Config, ConfigError, resolve

WHY = "pip install transformers accelerate peft"
transformers, peft, tokenizers, safetensors, _ = (
    pytest.importorskip(name, reason=WHY)
    for name in ("transformers", "peft", "tokenizers", "safetensors.torch", "accelerate")
)
hf_trainer = importlib.import_module("experiments.hf_trainer")  # needs them all

EOS, BOS = 256, 257
ALPHABET = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
LISTS = [
    {
        "prompt": f"Is pond {i} calm" + "?" * (1 + i % 3),
        "responses": ["Yes.", "No, it is not.", "So so."][: 2 + i % 2],
        "rewards": [[0.0, 2.0, 1.0], [3.0, -1.0, 3.0], [0.5, 0.25, 0.0]][i % 3][: 2 + i % 2],
    }
    for i in range(10)
]
LISTS[4]["rewards"] = [1.0, 1.0]  # a tie, which is no pair
STRENGTH = {"lire": ["--temperature", "5"], "dro": ["--tau", "0.7"], "dpo": ["--beta", "0.3"]}
OPTIONS = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": EOS}
SIZE = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, n_positions=64, **OPTIONS),
    "llama": transformers.LlamaConfig(intermediate_size=20, **SIZE, **OPTIONS),
    "opt": transformers.OPTConfig(ffn_dim=20, word_embed_proj_dim=12, **SIZE, **OPTIONS),
    "bloom": transformers.BloomConfig(hidden_size=12, n_layer=1, n_head=2, **OPTIONS),
}


def ids_of(text):
    """A token is a byte; a space is written as Ġ."""
    return [ALPHABET[c] for c in text.replace(" ", "Ġ")]


def save_model(folder, family, bos=None):
    """A random model and its tokenizer, which puts `bos` before a text where there is one."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(ALPHABET, []))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"eos_token": "<|endoftext|>"} | ({"bos_token": bos} if bos else {})
    whole.add_special_tokens(list(special.values()))
    if bos:
        named = {"special_tokens": [(bos, BOS)]}
        whole.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A", **named)
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **special).save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), *LISTS)


# ---------------------------------------------------------------------------------------- an oracle


class Oracle:
    """The papers' formulas on a model that reads one response at a time."""

    def __init__(self, model):
        self.model = model.double().eval()
        self.head = value_head(self.model.config.hidden_size).double()

    def read(self, prompt, response):
        """log pi(y|x), its tokens, V(x)."""
        start, ids = len(prompt), [*ids_of(f"{prompt} {response}"), EOS]
        out = self.model(torch.tensor([ids]), output_hidden_states=True)
        logps = out.logits[0].log_softmax(-1)
        logp = sum(logps[t - 1, ids[t]] for t in range(start, len(ids)))
        return logp, len(ids) - start, self.head(out.hidden_states[-1][0, :start].mean(0))[0]

    def update(self, objective, prompts):
        """The mean over lists, or of DRO over responses, and its gradients."""
        self.model.zero_grad(), self.head.zero_grad()
        terms = []
        for record in (r for r in LISTS if r["prompt"] in prompts):
            read = [self.read(record["prompt"], y) for y in record["responses"]]
            terms += getattr(self, objective)(record["rewards"], *zip(*read))
        loss = sum(terms) / len(terms)
        loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        own = {"value_head.weight": self.head.weight.grad} if objective == "dro" else {}
        return loss.item(), gradients | own

    def lire(self, rewards, logps, lengths, values):
        R, best = torch.tensor(rewards).double().softmax(0), rewards.index(max(rewards))
        P = (torch.stack(logps) / 5).softmax(0)
        return [-(P * R).sum() - 0.1 * logps[best] / lengths[best]]

    def dro(self, rewards, logps, lengths, values):
        every = [reward for r in LISTS for reward in r["rewards"]]
        mean = sum(every) / len(every)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in every) / len(every))
        terms = []
        for reward, logp, V in zip(rewards, logps, values):
            r, ratio = (reward - mean) / deviation, logp - logp.detach()
            policy = -logp * (r - V.detach()) + 0.7 / 2 * ratio**2
            terms.append(policy + (r - 0.7 * ratio.detach() - V) ** 2 / 2)
        return terms

    def dpo(self, rewards, logps, lengths, values):
        margin = logps[rewards.index(max(rewards))] - logps[rewards.index(min(rewards))]
        return [(1 + torch.exp(-0.3 * (margin - margin.detach()))).log()]


def value_head(width):
    """A head that is not zero any more."""
    torch.manual_seed(1)
    head = torch.nn.Linear(width, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=0.3)
    return head


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def lists_of(objective):
    return [r for r in LISTS if objective != "dpo" or len(set(r["rewards"])) > 1]


def check(oracle, objective, updates):
    """Losses and gradients are the oracle's, and every list is read once."""
    read = sorted(prompt for update in updates for prompt in update["prompts"])
    assert read == sorted(r["prompt"] for r in lists_of(objective)) and len(updates) > 1
    for update in updates:
        loss, gradients = oracle.update(objective, update["prompts"])
        assert update["loss"] == pytest.approx(loss, rel=1e-5)
        assert update["gradients"].keys() == gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for name, gradient in gradients.items():
            own = update["gradients"][name].double()
            torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-5 * largest)


# ------------------------------------------------------------------------------------------ updates


class Recorder(hf_trainer.ListTrainer):
    """Keeps the prompts, the loss and the gradients of every update."""

    def __init__(self, *given):
        super().__init__(*given)
        self.updates, self.prompts, self.losses = [], [], []
        self.add_callback(AtUpdate(self))

    def compute_loss(self, model, inputs, *rest, **given):
        loss = super().compute_loss(model, inputs, *rest, **given)
        self.prompts += [e.prompt for e in inputs["lists"] if e.prompt]
        self.losses.append(loss.item())
        return loss


class AtUpdate(transformers.TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *given, model, **others):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        t = self.trainer
        t.updates.append({"prompts": t.prompts, "loss": sum(t.losses), "gradients": gradients})
        t.prompts, t.losses = [], []


def trained(*argv):
    """The Recorder of a command line, after its run; V begins with another head than 0."""
    trainers, new_model = [], hf_trainer.new_model

    def new_trainer(*given):
        trainers.append(Recorder(*given))
        return trainers[0]

    def with_values(*given):
        model = new_model(*given)
        if hasattr(model, "value_head"):
            model.value_head.load_state_dict(value_head(12).state_dict())
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_trainer, "ListTrainer", new_trainer)
        patch.setattr(hf_trainer, "new_model", with_values)
        hf_trainer.main([*map(str, argv), "--disable_tqdm", "True", "--logging_steps", "1"])
    return trainers[0]


def one_epoch(model, data, objective, out, size):
    """Two batches an update, and weights that stay as they are."""
    options = ["--objective", objective, *STRENGTH[objective], "--data", data, "--out", out]
    still = ["--learning_rate", 0, "--max_grad_norm", 0, "--num_train_epochs", 1]
    batches = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", 2]
    return trained(model, *options, *still, *batches)


@pytest.mark.parametrize("objective", STRENGTH)
def test_an_update_is_the_mean_over_its_batches(tmp_path, gpt2, data, objective):
    trainer = one_epoch(gpt2, data, objective, tmp_path, 4)
    check(Oracle(load(gpt2)), objective, trainer.updates)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([update["loss"] for update in trainer.updates], rel=1e-5)


# ----------------------------------------------------------------------------------------- training


def learnt(objective, model):
    """LIRE: its loss, negated. Else: how much likelier the best responses are than the worst."""
    oracle, gaps = Oracle(model), []
    if objective == "lire":
        return -oracle.update(objective, [r["prompt"] for r in LISTS])[0]
    for r in lists_of("dpo"):
        best, worst = (r["responses"][r["rewards"].index(f(r["rewards"]))] for f in (max, min))
        gaps.append(oracle.read(r["prompt"], best)[0] - oracle.read(r["prompt"], worst)[0])
    return (sum(gaps) / len(gaps)).item()


def learn(model, data, objective, out, *options):
    options = ["--objective", objective, "--data", data, "--out", out, *options]
    rate = ["--learning_rate", 1e-2, "--num_train_epochs", 8]
    return trained(model, *options, *STRENGTH[objective], *rate)


@pytest.mark.parametrize("objective", STRENGTH)
def test_a_tiny_model_learns_against_its_own_beginning(tmp_path, gpt2, data, objective):
    lists = {e.prompt: e for e in learn(gpt2, data, objective, tmp_path).train_dataset}
    oracle = Oracle(load(gpt2))
    for r in lists_of(objective) if objective != "lire" else ():
        logps = [oracle.read(r["prompt"], y)[0].item() for y in r["responses"]]
        if objective == "dpo":
            logps = [logps[r["rewards"].index(f(r["rewards"]))] for f in (max, min)]
        assert lists[r["prompt"]].ref_logps == pytest.approx(logps, rel=1e-5)
    assert learnt(objective, load(tmp_path)) > learnt(objective, load(gpt2)) + 0.1
    tensors = safetensors.load_file(tmp_path / "model.safetensors").keys()
    assert tensors == safetensors.load_file(f"{gpt2}/model.safetensors").keys()  # V is not saved


def test_adapters_alone_learn(tmp_path, gpt2, data):
    trainer = learn(gpt2, data, "dro", tmp_path, "--lora")
    names = trainer.updates[0]["gradients"]
    assert all("lora" in name or "value_head" in name for name in names) and len(names) > 2
    whole = peft.PeftModel.from_pretrained(load(gpt2), tmp_path).merge_and_unload()
    assert learnt("dro", whole) > learnt("dro", load(gpt2)) + 0.1


# ----------------------------------------------------------------------- models, texts and refusals


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_rows_score_as_each_response_alone_in_every_family(tmp_path, data, family):
    folder = save_model(tmp_path, family)
    c = resolve(Config(data=[data]))
    lists = hf_trainer.read_lists(c, transformers.AutoTokenizer.from_pretrained(folder))
    x = hf_trainer.score(c, hf_trainer.new_model(c, folder, False).train(), lists)
    oracle = Oracle(load(folder))
    for r, logps, lengths, mask in zip(LISTS, x.logps, x.lengths, x.mask, strict=True):
        expected, tokens, _ = zip(*(oracle.read(r["prompt"], y) for y in r["responses"]))
        torch.testing.assert_close(logps[mask].double(), torch.stack(expected), rtol=1e-4, atol=0)
        assert lengths[mask].tolist() == list(tokens)


def test_texts_smuggle_in_no_special_token(tmp_path):
    folder = save_model(tmp_path, "llama", bos="<s>")
    prompt, responses = "Say <s><|endoftext|>", ["<|endoftext|>Yes", "<s>"]
    lists = write(tmp_path, {"prompt": prompt, "responses": responses, "rewards": [1.0, 0.0]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (example,) = hf_trainer.read_lists(resolve(Config(data=[lists])), tokenizer)
    assert example.prompt_ids == [BOS, *ids_of(prompt)]
    assert example.response_ids == [[*ids_of(f" {y}"), EOS] for y in responses]


@pytest.mark.parametrize(
    "options, why",
    [
        (["--objective", "kto"], "kto can't learn from part of a batch; lire, dro, dpo, "),
        (["--objective", "dro-p"], "dro-p can't learn from part of a batch; lire, dro, dpo, "),
        (["--objective", "sft"], "sft can't learn from part of a batch; lire, dro, dpo, "),
        (["--beta", "1"], "--beta is an option of dpo"),
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
        (["--objective", "dpo"], "compares the best and the worst.*: no list has two unlike ones"),
    ],
)
def test_what_can_not_be_is_one_line(tmp_path, gpt2, options, why):
    tie = write(tmp_path, {"prompt": "How?", "responses": ["So.", "No."], "rewards": [1.0, 1.0]})
    with pytest.raises((ConfigError, SystemExit), match=why) as e:
        hf_trainer.main([gpt2, "--data", tie, "--out", str(tmp_path / "new"), *options])
    assert len(str(e.value).splitlines()) == 1


def test_a_list_that_is_longer_than_the_model_reads_is_refused(tmp_path, gpt2):
    def train(name, prompt):  # 64 positions; a response, a space before it and EOS are 20 tokens
        rows = {"prompt": prompt, "responses": ["No.", "It is not quite so"], "rewards": [1.0, 0.0]}
        lists = write(tmp_path, rows)
        hf_trainer.main([gpt2, "--data", lists, "--out", str(tmp_path / name), "--max_steps", "1"])

    train("fits", "?" * 44)
    with pytest.raises(SystemExit, match="reads 64 tokens, a list has 65: lower --max-prompt"):
        train("long", "?" * 45)


def test_what_is_there_is_not_written_over(tmp_path, gpt2, data):
    before = Path(gpt2, "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is there already and not empty"):
        hf_trainer.main([gpt2, "--data", data, "--out", gpt2])
    assert Path(gpt2, "model.safetensors").read_bytes() == before


def test_what_transformers_refuses_is_one_line(tmp_path, data, monkeypatch):
    (tmp_path / "config.json").write_text('{"task": "dialogue"}')  # a run of train.py
    words = ["hf_trainer", str(tmp_path), "--data", data, "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="^hf_trainer: ") as e:
        runpy.run_path(hf_trainer.__file__, run_name="__main__")
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("package", ["transformers", "accelerate", "peft"])
def test_a_package_that_is_missing_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    spec = importlib.util.spec_from_file_location("without", hf_trainer.__file__)
    with pytest.raises(SystemExit, match=f"no {package} here: pip install transformers"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ------------------------------------------------------------------------------------ two processes


def test_two_processes_make_the_updates_of_one(tmp_path, gpt2, data):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [*command, __file__, gpt2, data, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    oracle = Oracle(load(gpt2))
    for objective in STRENGTH:
        both = [torch.load(tmp_path / f"{objective}{rank}.pt") for rank in (0, 1)]
        updates = []
        for one, other in zip(*both, strict=True):
            for name, gradient in one["gradients"].items():  # the engine's mean
                assert torch.equal(gradient, other["gradients"][name])
            loss = (one["loss"] + other["loss"]) / 2  # as Trainer logs it
            updates.append({**one, "prompts": one["prompts"] + other["prompts"], "loss": loss})
        check(oracle, objective, updates)


def one_of_two_processes(model, data, folder):
    """A batch of DPO's is one list, or none at all."""
    for objective in STRENGTH:
        out, size = Path(folder) / objective, 1 if objective == "dpo" else 2
        trainer = one_epoch(model, data, objective, out, size)
        rank = trainer.args.process_index
        assert trainer.args.world_size == 2
        torch.save(trainer.updates, Path(folder) / f"{objective}{rank}.pt")


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])
