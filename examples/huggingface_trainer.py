"""Single-stage deferral in the transformers Trainer: the expert's costs travel in the batch, the loss goes in `compute_loss`.

Run `python examples/huggingface_trainer.py`; it needs `pip install -e '.[examples]'` and downloads nothing: the script writes
its own messages, some clear and some vague about their topic.  A tiny BERT learns which to answer and which to hand to an expert
who is right on 95% of all.  It prints what deferring costs on 1,000 held-out messages: less than never asking, and less than
always asking.  Leave out `use_cpu` to train on a GPU.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from deferral import decide, error_costs, pick, single_stage_costs, single_stage_deferral
from deferral.experts import draw_answers, even_skill

K, ROWS, LENGTH, WORDS = 4, 6000, 16, 200
PRICE = 0.10  # of asking; a wrong answer costs 1

set_seed(0)
torch.set_num_threads(1)
topics, any_word = torch.randint(K, (ROWS,)), torch.randint(WORDS, (ROWS, LENGTH))
topic_word = topics.unsqueeze(-1) * (WORDS // K) + any_word % (WORDS // K)  # each topic has 50 words of the 200
clarity = torch.rand(ROWS, 1)  # how many of a message's words are on its topic
messages = torch.where(torch.rand(ROWS, LENGTH) < clarity, topic_word, any_word)
expert = draw_answers(even_skill(0.95, K), topics, seed=0)
expert_costs = error_costs(expert.unsqueeze(-1), topics, price=PRICE, ceiling=1 + PRICE)
columns = zip(messages, topics, expert_costs, strict=True)
rows = [{"input_ids": message, "labels": topic, "expert_costs": costs} for message, topic, costs in columns]


class DeferralTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = single_stage_deferral(outputs.logits, inputs["labels"], inputs["expert_costs"], ceiling=1 + PRICE).mean()
        return (loss, outputs) if return_outputs else loss


sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": None}
model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=K + 1, **sizes))  # the last score: ask
model.accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides it where it accumulates gradients
settings = {"learning_rate": 3e-3, "per_device_train_batch_size": 32, "num_train_epochs": 3, "save_strategy": "no"}
settings |= {"remove_unused_columns": False, "report_to": [], "use_cpu": True}  # the first keeps the expert's costs
arguments = TrainingArguments(tempfile.mkdtemp(), disable_tqdm=True, **settings)
trainer = DeferralTrainer(model, arguments, train_dataset=rows[:-1000])
trainer.train()

scores = torch.from_numpy(trainer.predict(rows[-1000:]).predictions)
targets, asking = topics[-1000:], expert_costs[-1000:]
actions = decide(scores)  # 0..3 a topic, 4: ask the expert
kept = actions < K
cost = pick(single_stage_costs(targets, asking, K), actions).mean()
never = (decide(scores[:, :K]) != targets).float().mean()
accuracy = (actions == targets)[kept].float().mean()
print(f"deferral cost {cost:.3f} (never asking {never:.3f}, always {asking.mean():.3f}),", end=" ")
print(f"coverage {kept.float().mean():.3f}, accuracy of kept rows {accuracy:.3f}")
