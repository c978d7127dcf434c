"""The language model's head: from hidden states to logits as the model's own class makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.models.decoders import find_decoder
from vlm.models.families import LogitsRule, logits_rule

_FOUND = "logits_rule"  # attribute of a language model whose rule was found
_WORST = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit; 16-bit formats round each step


_LOGITS = torch.tensor([100.0, 10.0]).view(1, 2, 1)  # largest ones to compare at: a cap shows in the larger


def head_logits(llm: Any, hidden_states: Tensor, rule: LogitsRule) -> Tensor:
    """[..., D] -> [..., V]: the last matrix, then what this family does to its output."""
    logits: Tensor = llm.get_output_embeddings()(hidden_states)
    if rule.factor != 1:
        logits = logits * rule.factor
    if rule.divisor != 1:
        logits = logits / rule.divisor
    if rule.cap is not None:
        logits = torch.tanh(logits / rule.cap) * rule.cap
    return logits if rule.num_real is None else logits[..., : rule.num_real]


@torch.no_grad()
def find_logits_rule(llm: Any, where: str = "") -> LogitsRule:
    """What this model does to the output of its last matrix: nothing, what its config says, or a factor.

    Found once, by comparing `head_logits` with the logits of the model's own forward for two made-up hidden states. The
    decoder does not run: it is made to answer those states. So it costs two tokens of the last matrix. Of a model whose
    head has no weights here (on meta, or on another stage) the config is believed.

    Args:
        where: of which folder, for the message.

    Raises:
        ConfigError: none of these, so that training would minimise something else than the model's own loss.
    """
    found = getattr(llm, _FOUND, None)
    weight = getattr(llm.get_output_embeddings(), "weight", None)
    if found is not None or weight is None or weight.is_meta:
        return found or logits_rule(llm.config)
    width = weight.shape[1]
    states = torch.linspace(-1, 1, 2 * width).cos().view(1, 2, width).to(weight.device, weight.dtype)
    sizes = head_logits(llm, states, LogitsRule()).abs().amax(-1, keepdim=True).clamp_min(1e-6)
    states = states * (_LOGITS.to(weight.device, weight.dtype) / sizes)
    theirs = _own_logits(llm, states)
    worst = _WORST.get(weight.dtype, 0.02) * float(theirs.abs().max())
    distances = {rule: _distance(head_logits(llm, states, rule), theirs) for rule in _candidates(llm, states, theirs)}
    found = min(distances, key=lambda rule: distances[rule])
    if not distances[found] <= worst:
        raise ConfigError(
            f"model.llm.path {where}: model type {llm.config.model_type} changes its logits after the last matrix in a "
            f"way that is not known here (they differ by {distances[found]:.3g} of {float(theirs.abs().max()):.3g}), "
            "so its loss would be wrong. Say what its forward does in FAMILIES of vlm/models/families.py (`head`)"
        )
    setattr(llm, _FOUND, found)
    return found


def _candidates(llm: Any, states: Tensor, theirs: Tensor) -> list[LogitsRule]:
    """For states [1, 2, D] and theirs [1, 2, V]. The config's rule is first: exact where a measured one is rounded."""
    plain = head_logits(llm, states, LogitsRule())
    rules = [logits_rule(llm.config), LogitsRule()]
    if plain.shape == theirs.shape:
        factor = (plain.double() * theirs).sum() / plain.double().square().sum().clamp_min(1e-30)
        rules.append(LogitsRule(factor=float(factor)))
    return rules


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors [..., V]; infinite between tensors of two shapes."""
    return float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("inf")


def _own_logits(llm: Any, hidden_states: Tensor) -> Tensor:
    """[B, L, D] -> [B, L, V] by the model's own forward, with its decoder left out."""
    decoder = find_decoder(llm)
    before = vars(decoder).get("forward")  # accelerate's, where layers are spread over devices
    decoder.forward = lambda *_, **__: _Output(last_hidden_state=hidden_states)
    try:
        logits: Tensor = llm(inputs_embeds=hidden_states, use_cache=False).logits
    finally:
        del decoder.forward  # the class's own is below it
        if before is not None:
            decoder.forward = before
    return logits


class _Output(dict):  # type: ignore[type-arg]
    """What decoders return, by name and by number; what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)
