"""Heads of real architectures: what each does to its logits is covered, or refused by name."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from conftest import small_model
from heatbath.errors import RunError
from heatbath.heads import logit_transform, output_head
from heatbath.ideas.engine import dense_loss
from heatbath.ideas.gift import Gift
from heatbath.reference import AdaptersOff, FrozenBase
from heatbath.stages.fused_forward import add_objective_forward

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
FAMILIES = {
    "gemma2": ({"final_logit_softcapping": 2.0, "head_dim": 8}, {"softcap": 2.0}),
    "granite": ({"logits_scaling": 4.0}, {"scale": 0.25}),
    "cohere": ({"logit_scale": 0.5}, {"scale": 0.5}),
    "llama": ({}, {}),
    "qwen2": ({}, {}),
}


def made(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **SHAPE, **FAMILIES[family][0])
    config.initializer_range = 0.3
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_sees_the_models_own_logits(family: str) -> None:
    """Loss and gradient of gift, policy and base of the same family, against full logits."""
    policy, base = made(family).double(), made(family, seed=1).double()
    assert logit_transform(policy) == pytest.approx(FAMILIES[family][1])
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = dense_loss(
        Gift(2.0),
        policy(input_ids=ids).logits[:, :-1].flatten(0, 1),
        ids[:, 1:].flatten(),
        ref_logits=base(input_ids=ids).logits[:, :-1].flatten(0, 1).detach(),
    ).sum()
    truth = torch.autograd.grad(expected, list(policy.parameters()))
    add_objective_forward(policy)
    loss = policy(input_ids=ids, labels=ids, objective=Gift(2.0), reference=FrozenBase(base))["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, exact in zip(torch.autograd.grad(loss, list(policy.parameters())), truth, strict=True):
        assert torch.linalg.norm(found - exact) <= 1e-5 * torch.linalg.norm(exact) + 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_in_16_bits_the_same_is_found(family: str, seed: int) -> None:
    assert logit_transform(made(family, torch.bfloat16, seed)) == pytest.approx(FAMILIES[family][1])


def test_a_head_that_does_something_else_is_refused() -> None:
    torch.manual_seed(0)
    shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    config = transformers.ModernBertDecoderConfig(**shape, decoder_bias=False, initializer_range=0.3)
    model = transformers.ModernBertDecoderForCausalLM(config).eval()
    with pytest.raises(RunError, match="ModernBertDecoderForCausalLM transforms its logits"):
        logit_transform(model)
    routed = small_model()
    routed.config.output_router_logits = True
    with pytest.raises(RunError, match="adds a router loss"):
        logit_transform(routed)


def test_with_adapters_off_a_trained_head_is_not_the_bases() -> None:
    base = small_model(0, tied=False)
    head = output_head(base).detach().clone()
    policy = get_peft_model(base, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], r=2))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if p.requires_grad and "lm_head" in name:
                p.add_(1.0)
    assert torch.equal(AdaptersOff(policy).head, head)
    assert not torch.equal(output_head(policy.get_base_model()), head)
