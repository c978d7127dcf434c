"""The language model's head: from hidden states to logits as the model's own class makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.models.decoders import find_decoder
from vlm.models.families import LogitsRule, logits_rule

_WORST = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit; 16-bit formats round each step


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
def check_head(llm: Any, where: str) -> None:
    """Compare `head_logits` with the logits of the model's own forward, for two made-up hidden states.

    The decoder does not run: it is made to answer those states. So it costs two tokens of the last matrix.

    Raises:
        ConfigError: they differ, so that training would minimise something else than the model's own loss.
    """
    weight = llm.get_output_embeddings().weight
    if weight.is_meta:
        return
    width = llm.get_input_embeddings().weight.shape[1]
    states = torch.linspace(-1, 1, 2 * width).cos().mul(3).view(1, 2, width).to(weight.device, weight.dtype)
    theirs = _own_logits(llm, states)
    ours = head_logits(llm, states, logits_rule(llm.config))
    worst = _WORST.get(weight.dtype, 0.02) * float(theirs.abs().max())
    difference = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("inf")
    if not difference <= worst:
        raise ConfigError(
            f"model.llm.path {where}: model type {llm.config.model_type} changes its logits after the last matrix in a "
            f"way that is not known here (they differ by {difference:.3g} of {float(theirs.abs().max()):.3g}), so its "
            "loss would be wrong. Add what its forward does to logits_rule in vlm/models/families.py"
        )


def _own_logits(llm: Any, hidden_states: Tensor) -> Tensor:
    decoder = find_decoder(llm)
    decoder.forward = lambda *_, **__: _Output(last_hidden_state=hidden_states)
    try:
        embeddings = hidden_states.to(llm.get_input_embeddings().weight.dtype)
        logits: Tensor = llm(inputs_embeds=embeddings, use_cache=False).logits
    finally:
        del decoder.forward  # the class's own is below it
    return logits


class _Output(dict):  # type: ignore[type-arg]
    """What decoders return, by name and by number; what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)
