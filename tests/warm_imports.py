"""What the server of `warm` imports: all that a training run does."""

from vlm.compat import prepare

prepare()

import deepspeed.ops.op_builder.all_ops  # noqa: E402
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402, F401
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import peft.tuners.lora.bnb  # noqa: E402, F401
import transformers.models.clip.modeling_clip  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from torch.distributed import fsdp  # noqa: E402, F401

import vlm.cli.main  # noqa: E402
import vlm.run  # noqa: E402
import vlm.train.engines.pipeline  # noqa: E402
import vlm.train.engines.zero  # noqa: E402, F401
