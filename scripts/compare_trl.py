"""Are loss, rewards and gradients of our preference objectives those of TRL's trainers? A tiny model, the same tokens.

    python scripts/compare_trl.py

Needs trl (0.24) beside this package. Each trainer of TRL tokenizes the pairs, and its `compute_loss` is differentiated;
the ids it made are packed as a run packs them, and go through `LossModule`. The policy is the reference with noise on
every weight. TRL's loss of orpo takes cross entropy of the question too and its mean over a batch, so pairs have a
question of one token there and go one by one; kto is compared with `apo_zero_unpaired`, whose reference point is 0 too.

Of ppo a whole step of TRL's trainer runs: it writes replies, judges them, and makes several updates. Its value model
stands on the policy's own blocks, as ours does, and no reply ends early: TRL gives the reward of one that does at the
token after its last.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from demo.tiny import write_data, write_llm
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch, Example, Prompt
from vlm.compat import prepare
from vlm.data.collate import Collator
from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.objectives import OBJECTIVES
from vlm.objectives.grpo import ClippedPolicy, advantages
from vlm.objectives.ppo import PPOConfig
from vlm.objectives.replies import ReplyScores
from vlm.train.engines.base import LossModule
from vlm.train.engines.local import LocalEngine
from vlm.train.rollout_rows import Group, RowMaker
from vlm.train.rollouts import Rollouts, with_scores

NOISE = 0.02
BETA = 0.1
REWARDS = ((2.0, [1.0, 0.0, 0.0]), (0.5, [0.3, 0.9, -0.4]))  # of the replies of a group, by two rewards with weights
QUESTIONS = ("What is this?", "Which shape is it?", "Which color is it?")
REPLIES = (("A red circle.", "A blue cross."), ("A square.", "A green circle and a cross."), ("Red.", "A red square."))
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {  # name -> ours, TRL's trainer and its settings
    "dpo": ("dpo", {}, "DPO", {"loss_type": "sigmoid"}),
    "dpo, label_smoothing 0.1": ("dpo", {"label_smoothing": 0.1}, "DPO", {"label_smoothing": 0.1}),
    "dpo, ipo": ("dpo", {"loss": "ipo"}, "DPO", {"loss_type": "ipo"}),
    "dpo, hinge": ("dpo", {"loss": "hinge"}, "DPO", {"loss_type": "hinge"}),
    "orpo": ("orpo", {}, "ORPO", {}),
    "simpo": ("simpo", {"gamma": 0.05}, "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.05}),
    "reward": ("reward", {}, "Reward", {}),
    "reward, center 0.1": ("reward", {"center": 0.1}, "Reward", {"center_rewards_coefficient": 0.1}),
    "kto": ("kto", {}, "KTO", {"loss_type": "apo_zero_unpaired"}),
}

PADDING = 0  # the tiny tokenizer's
NEW_TOKENS = 6  # of a reply of ppo
RATE = 0.02  # of plain gradient descent, between the updates of ppo
PPO = {
    "temperature": 0.9, "kl": 0.05, "clip": 0.2, "value_clip": 0.2, "value_weight": 0.1, "discount": 0.95,
    "smoothing": 0.9, "updates": 4,
}  # fmt: skip
AVERAGES = {"tokens": "dapo", "replies": "grpo", "constant": "dr_grpo"}  # of grpo -> TRL's loss_type


def main() -> None:
    prepare()  # before torchvision is imported
    trl = import_trl()
    with tempfile.TemporaryDirectory() as folder:
        llm = Path(folder) / "llm"
        write_llm(llm, write_data(Path(folder) / "data"))
        print(
            f"trl {trl.__version__}, torch {torch.__version__}, fp32; differences are relative, of rewards absolute\n"
        )
        print("| objective | TRL | loss, theirs | loss | rewards | gradient |\n|---|---|---|---|---|---|")
        for name, (kind, ours, theirs, settings) in CASES.items():
            compare(trl, llm, Path(folder), name, kind, ours, theirs, settings)
        print("\n| `grpo`, average | TRL | loss, theirs | advantages | loss | gradient |\n|---|---|---|---|---|---|")
        for average, loss_type in AVERAGES.items():
            compare_grpo(trl, llm, Path(folder), average, loss_type)
        print("\n| `ppo`, update | TRL | loss, theirs | loss | gradient | clipped |\n|---|---|---|---|---|---|")
        compare_ppo(trl, with_output_layer(llm, Path(folder) / "untied"), Path(folder))


def compare(
    trl: Any, llm: Path, folder: Path, name: str, kind: str, ours: dict[str, Any], theirs: str, settings: dict[str, Any]
) -> None:
    beta = {} if kind == "reward" else {"beta": BETA}
    policy, reference = load_theirs(llm, NOISE, kind), load_theirs(llm, 0.0)
    trainer = make_trainer(trl, theirs, policy, reference, llm, folder, settings | beta)
    trainer.model.eval()
    losses, rewards = [], []
    batches = list(trainer.get_train_dataloader())
    for batch in batches:
        loss, metrics = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        (loss / len(batches)).backward()
        losses.append(float(loss))
        rewards.append(rewards_of(metrics))
    loss = sum(losses) / len(losses)
    gradient = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    examples = [example for row in trainer.train_dataset for example in examples_of(row, theirs)]
    found, found_rewards, found_gradient = run_ours(llm, kind, beta | ours, examples)
    mean = [sum(each) / len(rewards) for each in zip(*rewards, strict=True)]
    apart = max(abs(a - b) for a, b in zip(found_rewards, mean, strict=True))
    worst = relative_difference(found_gradient, gradient)
    what = ", ".join(f"{key}: {value}" for key, value in settings.items())
    trainer_name = f"{theirs}Trainer ({what})" if what else f"{theirs}Trainer"
    differences = f"{abs(found - loss) / abs(loss):.1e} | {apart:.1e} | {worst:.1e}"
    print(f"| `{name}` | {trainer_name} | {loss:.6f} | {differences} |", flush=True)


def compare_grpo(trl: Any, llm: Path, folder: Path, average: Any, loss_type: str) -> None:
    """One group of replies and their rewards: TRL is given our ids, and log-probabilities of the weights before and of
    the reference."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm)
    prompt = tokenizer(QUESTIONS[0]).input_ids
    replies = [tokenizer(text).input_ids for text in ("A red circle.", "Red, I think.", "A blue square and a cross.")]
    counts, most = [len(reply) for reply in replies], 2 + max(map(len, replies))
    generator = torch.Generator().manual_seed(0)
    said = [-2 - torch.rand(2, count, generator=generator) * 4 for count in counts]  # before, and of the reference
    is_scaled = average != "constant"
    settings = {
        "loss_type": loss_type,
        "scale_rewards": "group" if is_scaled else "none",
        "max_completion_length": most,
    }
    policy = load_theirs(llm, NOISE)
    trainer = grpo_trainer(trl, policy, tokenizer, folder / f"GRPO-{loss_type}", settings)
    trainer._generate = lambda *_: ([prompt] * 3, replies, torch.tensor(sum(counts)), None, {})
    asked = trainer._generate_and_score_completions([{"prompt": QUESTIONS[0]}] * 3)
    pad = torch.nn.utils.rnn.pad_sequence
    old_and_reference = {
        f"{name}_per_token_logps": pad([each[number] for each in said], batch_first=True)
        for number, name in enumerate(("old", "ref"))
    }
    loss = trainer._compute_loss(trainer.model, asked | old_and_reference)
    loss.backward()
    gradient = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    config = ModelConfig(vision=None, llm={"path": str(llm)}, trainable=("llm",), gradient_checkpointing=False)
    model = build_model(config, precision="fp32", device="cpu", seed=0).model.eval()
    model.llm.load_state_dict(load_theirs(llm, NOISE).state_dict())
    totals = [sum(weight * each[number] for weight, each in REWARDS) for number in range(3)]
    worth = advantages(totals, is_scaled)
    group = Group(Prompt(prompt, 0, "", "record"), replies, worth)
    maker = RowMaker(Collator(None, 0, 1), 512, shares=model.lets_records_share, packs=True)
    batch = maker([group], Batch(*[torch.zeros(1, 1)] * 3), None)
    old, reference = (torch.cat([each[number] for each in said]) for number in range(2))
    objective = ClippedPolicy(
        temperature=0.9, clip_low=0.2, clip_high=0.28, kl=0.05, average=average, max_new_tokens=most
    )
    ours, _ = LossModule(model, objective)(with_scores(batch, old=old, reference=reference))
    ours = ours / objective.normalizer(batch)
    ours.backward()
    found = {n: p.grad for n, p in model.llm.named_parameters() if p.grad is not None}
    theirs = asked["advantages"]
    differences = [
        ((torch.tensor(worth) - theirs).abs().max() / theirs.abs().max()).item(),
        abs(ours.item() - loss.item()) / abs(loss.item()),
        relative_difference(found, gradient),
    ]
    told = " | ".join(f"{each:.1e}" for each in differences)
    print(f"| {average} | GRPOTrainer (loss_type: {loss_type}) | {loss.item():.6f} | {told} |")


def grpo_trainer(trl: Any, policy: Any, tokenizer: Any, folder: Path, settings: dict[str, Any]) -> Any:
    """TRL's, with the rewards of REWARDS."""
    import datasets

    arguments = trl.GRPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, num_generations=3, beta=0.05, temperature=0.9,
        gradient_checkpointing=False, per_device_train_batch_size=3, epsilon=0.2, epsilon_high=0.28,
        reward_weights=[weight for weight, _ in REWARDS], **settings,
    )  # fmt: skip
    rewards = [lambda each=each, **_: each for _, each in REWARDS]
    for number, reward in enumerate(rewards):
        reward.__name__ = f"reward{number}"
    data = datasets.Dataset.from_list([{"prompt": question} for question in QUESTIONS])
    trainer = trl.GRPOTrainer(
        policy, reward_funcs=rewards, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of the tensors [...] that are expected, over that of all these."""
    ours, theirs = (torch.cat([tensors[name].flatten() for name in expected]) for tensors in (found, expected))
    return ((ours - theirs).norm() / theirs.norm()).item()


@dataclass
class Seen:
    """What a step of TRL's PPOTrainer did."""

    replies: Tensor  # int64 [N, Q + R]: questions with padding to their left, and their replies
    scores: list[float]  # of each
    losses: list[float]  # of each update
    gradients: list[dict[str, Tensor]]


def compare_ppo(trl: Any, llm: Path, folder: Path) -> None:
    seen = step_of_ppo(trl, llm, folder)
    objective = PPOConfig(rewards=[{"kind": "exact"}], max_new_tokens=NEW_TOKENS, **PPO)
    engine = engine_of_ppo(llm, objective)
    rollouts = Rollouts(
        objective, engine, seed=0, tokenizer=SimpleNamespace(), start=None, rewards={}, show=print,  # type: ignore[arg-type]
        make_rows=RowMaker(Collator(None, 0, 1), 512, shares=engine.model.lets_records_share, packs=True),
    )  # fmt: skip
    groups = []
    for ids, score in zip(seen.replies.tolist(), seen.scores, strict=True):
        asked = [token for token in ids[:-NEW_TOKENS] if token != PADDING]
        groups.append(Group(Prompt(asked, 0, "", "record"), [ids[-NEW_TOKENS:]], [score]))
    batch = rollouts.make_rows(groups, Batch(*[torch.zeros(1, 1)] * 3), None)
    policy = load_theirs(llm, NOISE).state_dict()
    (reference,) = rollouts._scores([batch])
    engine.model.llm.load_state_dict(policy)
    (batch,), _ = rollouts._valued([with_scores(batch, reference=reference)], objective)
    for update, (loss, gradient) in enumerate(zip(seen.losses, seen.gradients, strict=True)):
        engine.optimizer.zero_grad()
        ours, metrics = engine.loss_module(batch)
        ours = ours / engine.objective.normalizer(batch)
        ours.backward()
        found = {name: p.grad for name, p in engine.model.llm.named_parameters() if p.grad is not None}
        found["score.weight"] = engine.model.value_head.weight.grad
        assert found.keys() == gradient.keys(), found.keys() ^ gradient.keys()
        worst = relative_difference(found, gradient)
        apart = abs(ours.item() - loss) / abs(loss)
        clipped = metrics[0].item() / engine.objective.normalizer(batch)
        print(f"| {update + 1} | PPOTrainer | {loss:.6f} | {apart:.1e} | {worst:.1e} | {clipped:.2f} |")
        engine.optimizer.step()


def with_output_layer(llm: Path, folder: Path) -> Path:
    """The model with an output layer apart from its embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llm)
    head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings, model.lm_head.weight = False, head
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm).save_pretrained(folder)
    return folder


def engine_of_ppo(llm: Path, objective: PPOConfig) -> LocalEngine:
    """Of the reference model, with the value head that TRL's has."""
    config = ModelConfig(
        vision=None, llm={"path": str(llm)}, trainable=("llm", "value_head"), gradient_checkpointing=False
    )
    model = build_model(config, precision="fp32", device="cpu", seed=0).model.eval()
    model.value_head.load_state_dict(value_head(llm).state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return LocalEngine(LossModule(model, objective.build()), optimizer, device=torch.device("cpu"), max_grad_norm=None)


def value_head(llm: Path) -> torch.nn.Linear:
    """Of small values, that its loss be no larger than the policy's."""
    head = load_theirs(llm, NOISE, "reward").score
    head.weight.data *= 0.1
    return head


def step_of_ppo(trl: Any, llm: Path, folder: Path) -> Seen:
    """The policy is the reference with noise; the value model has its blocks and a head of its own."""
    import datasets
    from transformers import AutoTokenizer

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    tokenizer = AutoTokenizer.from_pretrained(llm, padding_side="left")
    policy, reference = load_theirs(llm, NOISE), load_theirs(llm, 0.0)
    values, judge = (load_theirs(llm, NOISE, "reward") for _ in range(2))
    values.model, values.score = policy.model, value_head(llm)
    arguments = trl.PPOConfig(
        output_dir=str(folder / "PPO"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=len(QUESTIONS), total_episodes=len(QUESTIONS), num_ppo_epochs=PPO["updates"],
        response_length=NEW_TOKENS, temperature=PPO["temperature"], kl_coef=PPO["kl"], cliprange=PPO["clip"],
        cliprange_value=PPO["value_clip"], vf_coef=PPO["value_weight"], gamma=PPO["discount"], lam=PPO["smoothing"],
        num_sample_generations=0, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list([tokenizer(question) for question in QUESTIONS])
    optimizer = torch.optim.SGD([*policy.parameters(), *values.score.parameters()], lr=RATE)
    trainer = trl.PPOTrainer(
        arguments, tokenizer, policy, reference, judge, data, values, eval_dataset=data,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    seen = Seen(torch.empty(0), [], [], [])
    named = dict(policy.named_parameters()) | {"score.weight": values.score.weight}

    def on_read(module: Any, given: Any, named: dict[str, Any]) -> None:
        seen.replies = named["input_ids"].clone()

    def on_judged(module: Any, given: Any, scores: Tensor) -> None:
        seen.scores = scores[:, -1, 0].tolist()

    def backward(loss: Tensor) -> None:
        loss.backward()
        seen.losses.append(loss.item())
        seen.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})

    judge.model.register_forward_pre_hook(on_read, with_kwargs=True)
    judge.score.register_forward_hook(on_judged)
    trainer.accelerator.backward = backward
    trainer.train()
    assert PADDING not in seen.replies[:, -NEW_TOKENS:], "a reply has the padding token: draw with another seed"
    return seen


def run_ours(
    llm: Path, kind: str, settings: dict[str, Any], examples: list[Example]
) -> tuple[float, tuple[float, float], dict[str, Any]]:
    """Loss, rewards of both kinds of replies, and the gradient by name. The reference is scored first, as in a run."""
    parts = ("llm", "value_head") if kind == "reward" else ("llm",)
    config = ModelConfig(vision=None, llm={"path": str(llm)}, trainable=parts, gradient_checkpointing=False)
    built = build_model(config, precision="fp32", device="cpu", seed=0, scores=kind == "reward")
    model = built.model.eval()
    collate = Collator(None, 0, 1, shares_questions=model.lets_records_share)
    scores = ReplyScores()
    with torch.no_grad():
        LossModule(model, scores)(collate([examples]))
    known, counts = scores.found[0].tolist(), [len(example.branches) for example in examples]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    with_reference = [
        replace(example, reference=tuple(known[start : start + count]))
        for example, start, count in zip(examples, starts, counts, strict=True)
    ]
    policy = load_theirs(llm, NOISE, kind).state_dict()
    if model.value_head is not None:
        model.value_head.load_state_dict({"weight": policy.pop("score.weight")})
        policy["lm_head.weight"] = policy["model.embed_tokens.weight"]  # the toy's are one
    model.llm.load_state_dict(policy)
    objective = OBJECTIVES[kind](**settings).build()
    batch: Batch = collate([with_reference])
    loss, metrics = LossModule(model, objective)(batch)
    (loss / objective.normalizer(batch)).backward()
    named = dict(zip(objective.metric_names, metrics.tolist(), strict=True))
    if kind == "kto":
        good = named["share_good"]
        rewards = named["rewards_good"] / good, named["rewards_bad"] / (objective.normalizer(batch) - good)
    else:
        pairs = objective.normalizer(batch)
        rewards = named["rewards_chosen"] / pairs, named["rewards_rejected"] / pairs
    gradient = {n: p.grad for n, p in model.llm.named_parameters() if p.grad is not None}
    if model.value_head is not None:
        gradient["score.weight"] = model.value_head.weight.grad
    return loss.item() / objective.normalizer(batch), rewards, gradient


def make_trainer(
    trl: Any, name: str, policy: Any, reference: Any, llm: Path, folder: Path, settings: dict[str, Any]
) -> Any:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    one_by_one = name == "ORPO"
    rows = [
        {"prompt": "A" if one_by_one else question, "chosen": f" {good}", "rejected": f" {bad}"}
        for question, (good, bad) in zip(QUESTIONS, REPLIES, strict=True)
    ]
    if name == "KTO":
        rows = [
            {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
            for row in rows
            for key in ("chosen", "rejected")
        ]
    settings = settings if name == "Reward" else {"max_prompt_length": 128} | settings
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder / name), per_device_train_batch_size=1 if one_by_one else len(rows), report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=256, **settings,
    )  # fmt: skip
    others = {"ref_model": reference} if name in ("DPO", "KTO") else {}
    return getattr(trl, f"{name}Trainer")(
        policy, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, **others
    )


def examples_of(row: dict[str, Any], trainer: str) -> Iterator[Example]:
    """The ids that a trainer made of a row of its data set."""
    if trainer == "KTO":
        ids, labels = row["completion_input_ids"], row["completion_labels"]
        yield Example(ids, labels, where=str(ids), is_good=row["label"])
        return
    if trainer == "DPO":
        asked = row["prompt_input_ids"]
        wholes = [(asked, row[f"{key}_input_ids"]) for key in ("chosen", "rejected")]
        chosen, rejected = (Example([*a, *r], [IGNORE_INDEX] * len(a) + [*r], where=str(row)) for a, r in wholes)
    elif trainer == "Reward":  # scores are read at the last token, the only one that need have a label
        wholes = [row[f"{key}_input_ids"] for key in ("chosen", "rejected")]
        chosen, rejected = (Example(ids, [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:], where=str(row)) for ids in wholes)
    else:
        chosen, rejected = (
            Example(row[f"{key}_input_ids"], row[f"{key}_labels"], where=str(row)) for key in ("chosen", "rejected")
        )
    yield replace(chosen, rejected=rejected)


def rewards_of(metrics: dict[str, Any]) -> tuple[float, float]:
    """Means over the good and over the bad replies, as a trainer logs them; RewardTrainer gives the scores."""
    if "logits" in metrics:
        chosen, rejected = metrics["logits"].detach().view(2, -1).mean(1).tolist()
        return chosen, rejected
    if "rewards/chosen_sum" in metrics:  # KTO's
        return tuple(
            float(metrics[f"rewards/{key}_sum"]) / float(metrics[f"count/{key}"]) for key in ("chosen", "rejected")
        )  # type: ignore[return-value]
    return tuple(float(metrics[f"rewards/{key}"]) for key in ("chosen", "rejected"))  # type: ignore[return-value]


def load_theirs(llm: Path, noise: float, kind: str = "") -> Any:
    """The model of a folder in float32, with noise on every weight, always the same."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(llm, num_labels=1).float()
        torch.nn.init.zeros_(model.score.weight)  # drawn anew at each loading
        noise_of_head = 1.0
    else:
        model = AutoModelForCausalLM.from_pretrained(llm).float()
        noise_of_head = noise
    model.warnings_issued = {}  # of transformers 4, where trl 0.24 makes notes
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = noise_of_head if name == "score.weight" else noise
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def import_trl() -> Any:
    """trl 0.24 takes packages for installed that are not, beside transformers 5."""
    import trl
    import trl.import_utils as found

    never: Callable[[], bool] = lambda: False  # noqa: E731
    for name in ("mergekit", "llm_blender", "liger_kernel", "vllm", "weave", "deepspeed"):
        setattr(found, f"_{name}_available", False)
        setattr(found, f"is_{name}_available", never)
    return trl


if __name__ == "__main__":
    main()
