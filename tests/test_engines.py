"""DDP, FSDP2, distributed checkpoints, torch.compile, Accelerate and transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from engine_checks import CHECKS
from parallel_checks import tiny
from ranks import report, run_checks
from torch import distributed
from torch.utils.data import DataLoader

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_checks("engine_checks", 2, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", CHECKS)
def test_gloo(results, name) -> None:
    report(results, name)


@pytest.fixture(scope="module", params=[1, 2])
def nccl_results(request, tmp_path_factory):
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} CUDA devices")
    folder = tmp_path_factory.mktemp("nccl")
    return run_checks("engine_checks", request.param, folder, backend="nccl")


@pytest.mark.cuda
@pytest.mark.parametrize("name", CHECKS)
def test_nccl(nccl_results, name) -> None:
    report(nccl_results, name)


def test_a_compiled_training_step_is_the_eager_one() -> None:
    """The whole model in one graph, forward and backward, also as lengths change."""
    eager, model = tiny(), tiny()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (7, 9, 12):
        ids = torch.randint(32, (2, length))
        eager(ids, labels=ids).loss.backward()
        compiled(ids, labels=ids).loss.backward()
    for (name, right), mine in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_accelerate_trains_as_a_plain_loop(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    data = [torch.randint(32, (9,)) for _ in range(12)]

    def run(accelerator):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(data, batch_size=4)
        if accelerator is not None:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for ids in loader:
            loss = model(ids, labels=ids).loss
            if accelerator is None:
                loss.backward()
            else:
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = run(accelerator)
    exact = run(None)[0].state_dict()
    accelerator.save_state(str(tmp_path / "state"))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    accelerator.load_state(str(tmp_path / "state"))
    found = accelerator.unwrap_model(model).state_dict()
    for name, right in exact.items():
        torch.testing.assert_close(found[name], right, rtol=1e-9, atol=1e-12, msg=name)


def trainer_arguments(transformers, folder, **changes):
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, save_steps=2, report_to=[], use_cpu=True, seed=1, max_grad_norm=1.0,
        lr_scheduler_type="constant", dataloader_pin_memory=False, disable_tqdm=True, **changes,
    )  # fmt: skip


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    return pytest.importorskip("transformers", minversion="5.8")


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
def test_trainer_with_a_model_of_transformers(transformers, tmp_path) -> None:
    """Experts on ling_ops learn as eager ones, and what the Trainer saves loads again."""
    from transformers_models import build

    import ling_ops.integrations.transformers  # noqa: F401

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 60, (8, 9))]

    def train(implementation: str):
        torch.manual_seed(3)
        model = build("qwen3_moe", implementation)
        arguments = trainer_arguments(transformers, tmp_path / implementation)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        return model, logged(trainer)

    model, ours = train("ling_ops")
    assert len(ours) == 4 and all(torch.isfinite(torch.tensor(ours)))
    assert ours == pytest.approx(train("eager")[1], rel=1e-4)
    saved = tmp_path / "ling_ops" / "checkpoint-4"
    again = type(model).from_pretrained(saved, experts_implementation="ling_ops")
    ids = data[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


def test_trainer_with_a_ling_model(transformers, tmp_path) -> None:
    """LingForCausalLM by its own: the loss is the second of its outputs."""

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(inputs["input_ids"], labels=inputs["labels"])
            return (out.loss, out) if return_outputs else out.loss

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (8, 9))]
    model = tiny(use_expert_bias=True).float()
    arguments = trainer_arguments(transformers, tmp_path, gradient_accumulation_steps=2)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
