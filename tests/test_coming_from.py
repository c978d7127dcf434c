"""docs/coming-from.md has a word for every documented capability of the four systems, in the section of that system.

The numbers are those of the inventory that the project began with. Where several stand before a phrase, it is of all.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs/coming-from.md").read_text(encoding="utf-8")

PHRASES = {
    "XTuner": """
1 incremental pre-training
2 raw data, standard JSON
3 full, LoRA, QLoRA
4 `template_map_fn`
5,50 flash attention, `use_varlen_attn`
6,88 ZeRO, as their document has it
7 -chat-1.8B-SFT
7 answers in 4 GB
8,9 a language model alone; or with an image projector
10,11 `pip install -e '.[all]'`
12 30 % of an A100
13 symbolic link
14 `MKL_THREADING_LAYER=GNU`
15,16 `xtuner list-cfg -p internlm2`
17 `xtuner copy-cfg CFG DIR`
18 `internlm_20b_qlora_oasst1_512_e3`
19 `llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain`
20 a shipped name or a file
21,22 `xtuner train CFG --work-dir DIR`
22 `./work_dirs/NAME`
23 `deepspeed_zero3`
24 `xtuner train CFG --resume iter_600.pth`
25 `NPROC_PER_NODE=8 xtuner train CFG`
26 with DeepSpeed a folder of that name
28 `xtuner convert pth_to_hf CFG PTH OUT`
29,30 `--max-shard-size 2GB`, `--fp32`
31 `xtuner convert merge LLM ADAPTER OUT
32 `--is-clip`
33 a folder that loads as `LLM` does
34 of projector and both LoRAs
36,37 `xtuner chat LLM --adapter DIR`
38,41,46 `--bits 4`, `--system`, `--bot-name`
39 `--prompt-template`
40 `--system-template`
42,44 `--with-plugins`, `--lagent`
43 `--no-streamer`
45 `--command-stop-word`
47 `--temperature 0.1 --top-k 40 --top-p 0.75`
48 `xtuner chat LLM --llava DIR --visual-encoder PATH --image FILE`
51 `pack_to_max_length`
52 `sequence_parallel_size`, `SequenceParallelSampler`
53 `batch_size`, `accumulative_counts`
54 `optim_type`, `lr`, `betas`
55 `save_total_limit = -1`
56 `evaluation_inputs`
57 `torch_dtype`, tokenizer with `padding_side`
58 `llm_int8_threshold`
58 `bnb_4bit_compute_dtype`
59 `LoraConfig(bias='none')`
60 `pretrained_pth`
61 `shuffle_before_pack`
62 `collate_fn`
63 `image_folder`
64 `loss_scale='dynamic'`
64 error_if_nonfinite
65 `LinearLR(start_factor)`
65 `convert_to_iter_based`
66 type=TrainLoop
67 `DatasetInfoHook`
67 `EvaluateChatHook`
67 `VarlenAttnArgsToMessageHubHook`
68 `IterTimerHook`, `ParamSchedulerHook`
68 `CheckpointHook(
68 `DistSamplerSeedHook`
69 `opencv_num_threads=0`
69 backend='nccl'
69 `cudnn_benchmark`
70 `randomness(seed, deterministic)`
71 OpenAI's `messages`
72 `generate_data.py`
73,75 `conversation` and `conversations`
74 first human turn only
76 `repeat.py -i unique.json
77 asking GPT for records
78,79 `vlm train my_vlm/pretrain.yaml`
80 `vlm train xtuner_llava/finetune --nproc 8`
81,87 stage 1 against stage 2
82 cursor `▌`
83 Clear Chat History
84 `st.cache_resource`
85 `additional_eos_token_id`
85 with a warning which of them is taken
86 `--server.address 127.0.0.1 --server.port 6006`
89 parallel.md#which-engine
90 `tree.py FOLDER`
""",
    "LLM-Genie": """
91,92,93,94,95,96,97,98,99,100 BLOOM(Z), Falcon, Baichuan
101 chat models their own template
104,105 `pt` and `sft` by full, freeze, LoRA, QLoRA
106 `--stage rm`
107,135 `--stage ppo --reward_model RM`
108 `dpo` by full, LoRA, QLoRA
109 `--quantization_bit 4`
113 RefinedWeb, StarCoder
114 Alpaca, BELLE, Firefly
115 HH-RLHF, OpenAssistant
116 `huggingface-cli login`
117 or a loading script
120 Python 3.8, PyTorch 1.13
121 QLoRA on Windows
122 `git lfs`, conda
124 `train_bash.py --stage sft
125 `--model_name_or_path`, `--template`, `--output_dir`
126 --do_train`
126,141 `--do_eval`
127 `--finetuning_type none`
128 --lora_target q_proj,v_proj`
129 `--overwrite_cache`
130 `--per_device_train_batch_size`, `--gradient_accumulation_steps`
131 `--lr_scheduler_type`, `--learning_rate`, `--num_train_epochs`
132 `--plot_loss`
133 `--fp16`
134 `--checkpoint_dir SFT --resume_lora_training False`
137 `accelerate config`
138 its YAML of ZeRO-2
139 `deepspeed --num_gpus 8
139 `--master_port=9901`
140 `zero_allow_untested_optimizer`
141 BLEU-4, ROUGE-1/2/L
142 `--max_target_length 128`
143 `--do_predict
145 `train_web.py`
147 `api_demo.py`
149 `cli_demo.py`
150 `web_demo.py`
151 `export_model.py --output_dir OUT`
152 flash attention
152 multi-query inference
152 full-parameter RLHF
153 BibTeX
""",
    "YuRen": """
155 ViT-L-14 DataComp.XL
156 ChatML everywhere
157 role play
158 `data/sft.dev.json`
160 COCO 2017, ScienceQA, LAION
161 GPT-4 augmentation
162 `rye sync`
162 `rye run webui MODEL --load_8bit True
164 Docker "coming soon"
165 `rye run prepare-base-model`
167,179 its three stages
168 -m yuren_trainer.text_sft
169 `--model_max_length 4096`
169 `--num_train_epochs`
170 `--per_device_eval_batch_size`
170 `--evaluation_strategy steps --eval_steps 340`
171 `--save_total_limit 8`
171 `--learning_rate`, `--weight_decay`
172 `--group_by_length`
172 `--tf32`, `--bf16`
173 `--optim paged_adamw_8bit`
173 `--use_lora --lora_config qlora.json`
174 LoRA is less than full
175 `wandb login`
176 stage 2: projector alone
177 mixed with text
178 8 x A100-80G
182 weights under the licence
""",
    "MiniGPT4Qwen": """
183 EVA-CLIP-g, Q-Former, linear layer
184 one stage on 18.8k bilingual pairs
185,216 7B on one 24 GB card, 14B on two
186 `lavis_trainer_cleaned`
186 AMP and gradient checkpointing
187 released `ckpt.zip`
188 conda with Python 3.8
189 `cache/ckpt/{blip2/
189,191 bert-base-uncased
190 `cache/dataset/{llava,minigpt4}/`
191 `instruction_data.zip`
191 `pp_14b_ckpt-logs.zip`
192 `test_model_chat.py`
193 `cli_demo.py -c PTH`
194,195,196,197,198 `:help`, `:clear`, `:clh`, `:his`, `:img`
200 `--model-type qwen14b_chat`
201 `--cpu-only`
202 `do_sample` and beam search
204 `*_minigpt4qwen_format.json`
206 `python train.py --cfg-path YAML`
207 `python -m torch.distributed.run
209 not divided by the accumulation
212 `projects/deepspeed/train_zero0_3090x4.yaml`
213 zero1, zero2, zero3
214,215,220 `deepspeed2pth.py`, `pipe_proj2pth.py`
217,218 any number of stages
219 DP2 x PP2
222 screenshots of conversations
223 thanks to LAVIS
224 BSD-3 of LAVIS
""",
}

SECTIONS = {text.partition("\n")[0]: text for text in re.split(r"^## ", TEXT, flags=re.MULTILINE)}
LINES = [(system, line) for system, lines in PHRASES.items() for line in lines.splitlines() if line]


@pytest.mark.parametrize(("system", "line"), LINES, ids=[line for _, line in LINES])
def test_what_they_document_has_a_word_here(system: str, line: str):
    _numbers, _, phrase = line.partition(" ")
    assert phrase in SECTIONS[system]
