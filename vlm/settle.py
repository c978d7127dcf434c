"""What a run settles at its start where the config leaves it open, and keeps when it goes on: keys of its identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlm import precision
from vlm.config import RunConfig
from vlm.distributed import is_main, on_main
from vlm.logs import log, warn

FIRST_WITH_SHARING = "data.share_images"  # in the identity of runs whose records may share an image
FIRST_WITH_BALANCE = "data.balance"  # in the identity of runs whose ranks may share rows out by work
FIRST_WITH_CHOICE = "model.projector.pool"  # in the identity of runs whose encoder chooses how it computes
VISION_COMPUTE = "model.vision.compute"  # key of a run's identity: what its encoder computed in
CACHE_FEATURES = "data.cache_features"  # and whether it read them from the cache


def settle_precision(config: RunConfig, device: torch.device, began_with: Mapping[str, Any] | None = None) -> RunConfig:
    """The config with `train.precision`, `model.vision.compute` and, of a run that resumes, `data.cache_features` as
    this run has them, told in the log.

    Rank 0 decides, so that machines of different kinds compute alike. A run goes on as it began, on any machine.

    Args:
        began_with: the identity in the checkpoint that the run resumes from.
    """
    began, wanted = began_with or {}, config.train.precision
    if wanted == "auto" and "train.precision" in began:
        chosen = began["train.precision"]
        log(f"precision: {chosen}, as the run began")
    else:
        chosen = wanted if wanted != "auto" else on_main(lambda: precision.resolve(wanted, device))
        log(precision.describe(wanted, chosen, device))
    if is_main() and (problem := precision.complaint(chosen, device)):
        warn(problem)
    changes: dict[str, Any] = {"train": config.train.model_copy(update={"precision": chosen})}
    # an older run computed and cached all as its precision says
    is_older = bool(began) and FIRST_WITH_CHOICE not in began
    dtype = "fp32" if chosen == "fp32" else "bf16"
    compute = began.get(VISION_COMPUTE, dtype if is_older and chosen != "fp16" else "auto")
    if config.model.vision is not None and config.model.vision.compute == "auto":
        vision = config.model.vision.model_copy(update={"compute": compute})
        changes["model"] = config.model.model_copy(update={"vision": vision})
    data: dict[str, Any] = {"cache_dtype": dtype} if is_older else {}
    if config.data.cache_features == "auto" and CACHE_FEATURES in began:  # features from the cache are rounded
        data["cache_features"] = began[CACHE_FEATURES]
        log(f"data.cache_features: {str(began[CACHE_FEATURES]).lower()}, as the run began")
    if began and FIRST_WITH_SHARING not in began:  # nor did attention go record by record
        data["share_images"] = False
        if config.model.llm.attention == "auto":
            model = changes.get("model", config.model)
            llm = model.llm.model_copy(update={"attention": "sdpa"})
            changes["model"] = model.model_copy(update={"llm": llm})
    if began and FIRST_WITH_BALANCE not in began:
        data["balance"] = False
    if data:
        changes["data"] = config.data.model_copy(update=data)
    return config.model_copy(update=changes)
