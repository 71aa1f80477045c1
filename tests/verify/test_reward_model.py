"""The reward model on real, tiny sequence classifiers: what is refused, that batching changes nothing, and TRL."""

import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from conftest import CHARACTERS, small_model, small_tokenizer
from heatbath.errors import DataError, RecipeError, RunError
from heatbath.verify.reward_model import RewardModel

SHAPE = {
    "vocab_size": len(CHARACTERS) + 5,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
# Ends in EOS, which is also the pad token: the head's choice of the last token is put to the test.
ENDS_IN_EOS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
)
PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi?", "What is 2 + 2?", "Why?", "Say something long.")]
COMPLETIONS = ["Yes.", "It is 4, as 2 + 2 = 4.", "", "Something very long, and longer still, which ends at last."]


def saved(folder: Path, model: PreTrainedModel, template: str | None = ENDS_IN_EOS) -> str:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def classifier(kind: str = "llama", *, pad: int | None = 1, labels: int = 1) -> PreTrainedModel:
    """Llama has the common head, GPT-2 its own code for it, BERT reads its first token in both directions."""
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SHAPE, pad_token_id=pad, num_labels=labels))
    ends = {"pad_token_id": pad, "bos_token_id": None, "eos_token_id": 1, "num_labels": labels}
    if kind == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(**SHAPE, **ends))
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, **ends, num_key_value_heads=2))


def rewards(name: str, **settings: object) -> RewardModel:
    return RewardModel(name, **{"precision": "fp32", "device": "cpu", **settings})


def rendered(model: RewardModel, prompt: list[dict[str, str]], completion: str) -> torch.Tensor:
    conversation = [*prompt, {"role": "assistant", "content": completion}]
    return torch.tensor([model.tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("reward") / "llama", classifier())


@pytest.mark.parametrize("pad", [1, None, 2], ids=["pad-is-eos", "no-pad", "pad-of-its-own"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_score_does_not_depend_on_the_batch_and_is_the_checkpoints_own(
    tmp_path: Path, kind: str, pad: int | None
) -> None:
    """transformers' own score of each row alone: at its very last token where the config names no pad."""
    name = saved(tmp_path, classifier(kind, pad=pad))
    model, first, own = AutoModelForSequenceClassification.from_pretrained(name).eval(), rewards(name), []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            own.append(float(model(input_ids=rendered(first, prompt, completion)).logits[0, 0]))
    assert max(own) - min(own) > 0.1
    for batch in (1, 2, 3, 8):
        loaded = rewards(name, batch=batch)
        assert loaded.scores(PROMPTS, COMPLETIONS) == pytest.approx(own, abs=1e-5)
        assert loaded.model.config.pad_token_id == pad
    backwards = rewards(name).scores(PROMPTS[::-1], COMPLETIONS[::-1])
    assert backwards == pytest.approx(own[::-1], abs=1e-5)


def test_a_bidirectional_model_scores_alike_in_any_batch(tmp_path: Path) -> None:
    name = saved(tmp_path, classifier("bert"))
    alone, together = rewards(name, batch=1), rewards(name, batch=4)
    assert together.scores(PROMPTS, COMPLETIONS) == pytest.approx(alone.scores(PROMPTS, COMPLETIONS), abs=1e-5)


def test_texts_and_messages_are_the_same_conversation(checkpoint: str) -> None:
    model = rewards(checkpoint)
    as_messages = model.scores(PROMPTS, [[{"role": "assistant", "content": text}] for text in COMPLETIONS])
    texts = [prompt[0]["content"] for prompt in PROMPTS]
    assert as_messages == model.scores(PROMPTS, COMPLETIONS) == model.scores(texts, COMPLETIONS)
    assert model.scores([], []) == []


def test_division_by_the_root_of_the_length(checkpoint: str) -> None:
    plain = rewards(checkpoint).scores(PROMPTS, COMPLETIONS)
    model = rewards(checkpoint, sqrt_length=True)
    own = [v / math.sqrt(max(1, len(text))) for v, text in zip(plain, COMPLETIONS, strict=True)]  # a token a character
    assert model.scores(PROMPTS, COMPLETIONS) == pytest.approx(own)
    policys = [v / math.sqrt(n) for v, n in zip(plain, (4, 9, 16, 25), strict=True)]
    assert model.scores(PROMPTS, COMPLETIONS, lengths=[4, 9, 16, 25]) == pytest.approx(policys)
    ids = [[0] * n for n in (4, 9, 16, 25)]
    assert model(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=ids, gold=["1"] * 4) == pytest.approx(policys)


def test_nothing_is_cut_in_silence(checkpoint: str) -> None:
    model = rewards(checkpoint)
    assert model.max_tokens == 128
    with pytest.raises(DataError, match=r"(?s)1 of 4 rows are longer than the reward model's 128.*row 3 with 2\d\d"):
        model.scores(PROMPTS, [*COMPLETIONS[:3], "long " * 40])
    cutting, logged = rewards(checkpoint, max_tokens=60, truncate=True), {}
    values = cutting(prompts=PROMPTS, completions=COMPLETIONS, log_metric=logged.__setitem__, step=3)
    assert (cutting.truncated, cutting.scored) == (1, 4) and logged == {"reward_model/truncated_share": 0.25}
    whole = model.scores(PROMPTS, COMPLETIONS)
    assert values[:3] == pytest.approx(whole[:3], abs=1e-5) and abs(values[3] - whole[3]) > 1e-4
    with torch.no_grad():
        end = rendered(model, PROMPTS[3], COMPLETIONS[3])[:, -60:]  # the completion's end is what is kept
        assert values[3] == pytest.approx(float(cutting.model(input_ids=end).logits[0, 0]), abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="with 3 outputs"):
        rewards(saved(tmp_path / "three", classifier(labels=3)))
    causal = small_model()
    with pytest.raises(RecipeError, match="LlamaForCausalLM with 2 outputs"):
        rewards(saved(tmp_path / "causal", causal))
    causal.config.num_labels = 1
    with pytest.raises(RecipeError, match=r"without score\.weight, which would be random"):
        rewards(saved(tmp_path / "headless", causal))
    with pytest.raises(RecipeError, match="no chat template"):
        rewards(saved(tmp_path / "mute", classifier(), template=None))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"config\.json"):
        rewards(str(tmp_path / "empty"))


def test_a_conversation_the_template_refuses_is_named(checkpoint: str) -> None:
    system = [{"role": "system", "content": "Be brief."}, *PROMPTS[1]]
    with pytest.raises(DataError, match=r"(?s)no system messages.*row 1, roles system, user, assistant"):
        rewards(checkpoint).scores([PROMPTS[0], system], COMPLETIONS[:2])


def test_a_score_that_is_no_number_is_an_error(checkpoint: str) -> None:
    model = rewards(checkpoint)
    model.model.score.weight.data.fill_(math.inf)
    with pytest.raises(RunError, match=r"(?s)score is .*row 0.*precision = fp32"):
        model.scores(PROMPTS, COMPLETIONS)


def test_sixteen_bits_are_near_and_gradients_absent(checkpoint: str) -> None:
    half, full = rewards(checkpoint, precision="bf16"), rewards(checkpoint)
    assert next(half.model.parameters()).dtype == torch.bfloat16 and not half.model.training
    assert not any(p.requires_grad for p in half.model.parameters())
    whole = full.scores(PROMPTS, COMPLETIONS)
    assert half.scores(PROMPTS, COMPLETIONS) == pytest.approx(whole, abs=0.1 * max(map(abs, whole)))


def test_grpo_trains_on_it(checkpoint: str, tmp_path: Path) -> None:
    """Plain TRL: it is called by its signature, logged by its name, and its scores are the rewards."""
    model, seen = rewards(checkpoint, sqrt_length=True), []
    scores = model.scores
    model.scores = lambda *a, **k: seen.append((a, k, scores(*a, **k))) or seen[-1][2]
    trainer = trl.GRPOTrainer(
        model=small_model(),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            max_steps=1,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=small_tokenizer(),
        reward_funcs=[model],
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    (prompts, completions), given, values = seen[0]
    assert len(prompts) == len(completions) == len(given["lengths"]) == 4 and 0 < max(given["lengths"]) <= 8
    assert logs["rewards/reward_model/mean"] == pytest.approx(sum(values) / 4, abs=1e-5)
    assert logs["reward_model/truncated_share"] == 0.0


def test_the_example_of_the_page_runs(
    checkpoint: str, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "GRPOTrainer" in block]
    names = {"Skywork/Skywork-Reward-V2-Qwen3-0.6B": checkpoint, "Qwen/Qwen2.5-0.5B-Instruct": str(small_base)}
    cheaper = {
        "max_completion_length=64": "max_completion_length=4, use_cpu=True, bf16=False",
        "max_steps=10": "max_steps=1",
    }
    for written, here in (names | cheaper).items():
        assert written in code
        code = code.replace(written, here)
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102 - the page's own code
    assert "reward_model/truncated_share" in capsys.readouterr().out
