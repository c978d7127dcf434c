"""Answers to configured questions while training, so that one can read what the model has learned so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm.batch import ImageSpec
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.images import load_image, to_tiles
from vlm.data.tokenize import ConversationTokenizer
from vlm.generation.generate import GenerationSettings, generate
from vlm.models.vlm import VisionLanguageModel
from vlm.precision import autocast
from vlm.train.config import SampleConfig


@dataclass(frozen=True)
class SampleQuestions:
    """Asks a model; leaves its mode and the random state of training as they were."""

    tokenizer: ConversationTokenizer
    image_spec: ImageSpec | None
    device: torch.device
    autocast_dtype: torch.dtype | None
    max_new_tokens: int

    def answer(self, model: VisionLanguageModel, sample: SampleConfig, pixel_values: torch.Tensor | None) -> str:
        """Greedy answer to one question. Every rank that holds a piece of the model makes the same call.

        Args:
            pixel_values: [tiles, 3, S, S], what `pixels` gave.
        """
        input_ids = self.tokenizer.prompt(sample_conversation(sample))
        settings = GenerationSettings(max_new_tokens=self.max_new_tokens)
        with autocast(self.device.type, self.autocast_dtype):
            new_ids = generate(model, input_ids, pixel_values, self.tokenizer.stop_ids, settings)
        return self.tokenizer.decode(new_ids)

    def pixels(self, sample: SampleConfig) -> torch.Tensor | None:
        """[tiles, 3, S, S] of a question's image; None without one. Raises RecordError: it is missing or unreadable."""
        if sample.image is None or self.image_spec is None:
            return None
        image = load_image(sample.image, background=self.image_spec.background)
        return to_tiles(image, self.image_spec).to(self.device)


def sample_conversation(sample: SampleConfig) -> Conversation:
    """The question as a conversation: image first, then the prompt."""
    parts = (sample.prompt,) if sample.image is None else (IMAGE, f"\n{sample.prompt}" if sample.prompt else "")
    images = () if sample.image is None else (sample.image,)
    return Conversation(turns=(Turn("user", parts),), images=images, where="train.samples")
