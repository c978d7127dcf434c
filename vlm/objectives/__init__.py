"""What a batch's loss is and what it is divided by. One module and one line below per objective."""

from __future__ import annotations

from vlm.objectives.base import ObjectiveConfig
from vlm.objectives.grpo import GRPOConfig
from vlm.objectives.kto import KTOConfig
from vlm.objectives.lm import LanguageModelingConfig
from vlm.objectives.ppo import PPOConfig
from vlm.objectives.preference import DPOConfig, ORPOConfig, SimPOConfig
from vlm.objectives.reward import RewardConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "lm": LanguageModelingConfig,
    "dpo": DPOConfig,
    "orpo": ORPOConfig,
    "simpo": SimPOConfig,
    "kto": KTOConfig,
    "reward": RewardConfig,
    "grpo": GRPOConfig,
    "ppo": PPOConfig,
}
