"""Hugging Face's Trainer, with the optimiser that it takes by default."""

import pytest
import torch

import pytorch_ext

STEPS = 3


class Sentences(torch.utils.data.Dataset):
    """Of different lengths, so that their batches have padding."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(5, 61, (n,), generator=generator) for n in (11, 3, 7, 1, 9, 11, 2, 5)]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": i % 2}


def collate(sentences):
    ids = [s["input_ids"] for s in sentences]
    masks = [torch.ones_like(i) for i in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(masks, batch_first=True),
        "labels": torch.tensor([s["labels"] for s in sentences]),
    }


@pytest.fixture
def train(transformers, tmp_path):
    """Trains a model, which is evaluated after every step, and returns these losses."""
    pytest.importorskip("accelerate", reason="the Trainer asks for it")

    def train(model, **options):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            adam_epsilon=1e-3,
            weight_decay=0.1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **options,
        )
        assert arguments.optim == "adamw_torch_fused"
        data = Sentences()
        trainer = transformers.Trainer(model, arguments, collate, data, data)
        trainer.train()
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    return train


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_training_and_evaluation_in_turn(make_pair, make_batch, assert_same, train, options):
    """Evaluation lays weights out, and a fused step then changes them without saying so."""
    original, fast = make_pair("hf.BertForSequenceClassification")
    losses = [train(model, **options) for model in (original, fast)]
    assert len(set(losses[0])) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)
    assert "without padding" in pytorch_ext.explain(fast).padding[1]
    assert_same(original.eval(), fast.eval(), make_batch(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(make_model, make_batch, assert_same, train, when):
    peft = pytest.importorskip("peft", reason="adapters of peft")
    models = []
    for fused in (False, True):
        model = make_model("hf.BertForSequenceClassification")
        if fused and when == "before":
            pytorch_ext.optimize(model)
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, lora_dropout=0.0, target_modules=["query", "dense"], task_type="SEQ_CLS"
        )
        model = peft.get_peft_model(model, config).double()
        models.append(pytorch_ext.optimize(model) if fused else model)
    losses = [train(model) for model in models]
    assert len(set(losses[0])) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)
    original, fast = (model.eval() for model in models)
    assert_same(original, fast, make_batch(), rtol=1e-6, atol=1e-7)
    assert_same(original.merge_and_unload(), fast.merge_and_unload(), make_batch(), rtol=1e-6, atol=1e-7)


def test_what_is_saved_is_loaded_as_the_original(transformers, make_pair, train, tmp_path):
    _, fast = make_pair("hf.BertForSequenceClassification", dtype=torch.float32)
    train(fast)
    fast.save_pretrained(tmp_path / "saved")
    loaded = type(fast).from_pretrained(tmp_path / "saved")
    assert type(loaded.bert.encoder) is transformers.models.bert.modeling_bert.BertEncoder
    assert loaded.config._attn_implementation == "sdpa"
    for (name, expected), got in zip(fast.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=name)
