"""Checkpoints in the published format: exact round trips, complete errors, FP8, no host copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import save_file

from ling_ops.models import CheckpointError, LingConfig, LingForCausalLM

V2 = {
    "vocab_size": 96, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "intermediate_size": 80, "moe_intermediate_size": 24, "num_experts": 8,
    "num_experts_per_token": 3, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "score_function": "sigmoid", "use_expert_bias": True, "num_groups": 4, "topk_groups": 2,
    "routed_scaling_factor": 2.5, "init_std": 0.1, "family": "ling2",
}  # fmt: skip
V1 = {
    **V2, "score_function": "softmax", "use_expert_bias": False, "num_groups": 1,
    "topk_groups": 1, "routed_scaling_factor": 1.0, "use_qk_norm": False, "norm_head": True,
    "num_shared_experts": 2, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0,
    "family": "ling1",
}  # fmt: skip
OWN = {
    **V2, "first_k_dense_replace": 0, "layer_pattern": "1-2", "activation": "gelu",
    "mlp_bias": True, "router_bias": True, "capacity": "dynamic", "capacity_mode": "running",
    "family": "custom",
}  # fmt: skip
INDEX = "model.safetensors.index.json"
GATED_BIAS = {**V2, "mlp_bias": True}


def make(sizes: dict, dtype: torch.dtype = torch.float32) -> LingForCausalLM:
    model = LingForCausalLM(LingConfig(**sizes), dtype=dtype)
    for name, tensor in model.state_dict().items():
        if "norm" in name or "bias" in name:
            tensor.normal_()
    return model.eval()


def keys_in(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


def rewrite(folder: Path, change) -> None:
    """Apply ``change`` to the dict of all tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("sizes", [V2, V1, OWN, GATED_BIAS], ids=["v2", "v1", "own", "biased"])
@pytest.mark.parametrize("limit", [2**30, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path, device, sizes, limit, dtype):
    model = make(sizes, dtype).to(device)
    model.save_pretrained(tmp_path, max_shard_bytes=limit)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) > 5) == (limit == 30_000) == (tmp_path / INDEX).exists()
    again = LingForCausalLM.from_pretrained(tmp_path, device=device)
    assert not again.training and again.config == model.config
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, expected in states[0].items():
        found = states[1][name]
        assert found.dtype == expected.dtype and found.device == expected.device, name
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), name
    again.save_pretrained(tmp_path / "again", max_shard_bytes=limit)
    for name in files:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_keys_are_the_published_ones(tmp_path):
    make({**V2, "num_layers": 2, "num_experts": 2, "num_groups": 1, "topk_groups": 1,
          "num_experts_per_token": 1}).save_pretrained(tmp_path)  # fmt: skip
    attention = {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "attention.query_key_value.weight": (128, 64),
        "attention.dense.weight": (64, 64),
        "attention.query_layernorm.weight": (16,),
        "attention.key_layernorm.weight": (16,),
    }

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, int]]:
        return {
            f"mlp.{prefix}gate_proj.weight": (width, 64),
            f"mlp.{prefix}up_proj.weight": (width, 64),
            f"mlp.{prefix}down_proj.weight": (64, width),
        }

    dense = {**attention, **mlp("", 80)}
    moe = {
        **attention, "mlp.gate.weight": (2, 64), "mlp.gate.expert_bias": (2,),
        **mlp("experts.0.", 24), **mlp("experts.1.", 24), **mlp("shared_experts.", 24),
    }  # fmt: skip
    assert keys_in(tmp_path) == {
        "model.word_embeddings.weight": (96, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (96, 64),
        **{f"model.layers.0.{key}": shape for key, shape in dense.items()},
        **{f"model.layers.1.{key}": shape for key, shape in moe.items()},
    }


def test_stacked_rows_are_gate_then_up(tmp_path):
    model = make(V2)
    model.save_pretrained(tmp_path)
    stacked = model.model.layers[1].mlp.experts.gate_up_proj
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        prefix = "model.layers.1.mlp.experts.5"
        assert torch.equal(file.get_tensor(f"{prefix}.gate_proj.weight"), stacked[5, :24])
        assert torch.equal(file.get_tensor(f"{prefix}.up_proj.weight"), stacked[5, 24:])


def test_a_model_that_no_published_name_fits_gets_its_own(tmp_path):
    make(OWN).save_pretrained(tmp_path / "own")
    make({**V2, "z_loss_coefficient": 0.1}).save_pretrained(tmp_path / "plain")
    own, plain = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("own", "plain")
    )
    assert own["architectures"] == ["LingForCausalLM"] and own["model_type"] == "ling_ops"
    assert plain["architectures"] == ["BailingMoeV2ForCausalLM"]
    assert plain["ling_ops"] == {"z_loss_coefficient": 0.1, "init_std": 0.1}


def test_other_keys_of_the_config_are_carried_along(tmp_path):
    make(V2).save_pretrained(tmp_path / "a")
    edit_config(tmp_path / "a", eos_token_id=[3, 5], max_position_embeddings=77)
    LingForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    values = json.loads((tmp_path / "b" / "config.json").read_text())
    assert values["eos_token_id"] == [3, 5] and values["max_position_embeddings"] == 77


def test_all_faults_come_in_one_error(tmp_path):
    make(V2).save_pretrained(tmp_path)

    def spoil(tensors):
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.7.stray"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(65)

    rewrite(tmp_path, spoil)
    with pytest.raises(CheckpointError) as caught:
        LingForCausalLM.from_pretrained(tmp_path)
    text = str(caught.value)
    assert "2 missing: lm_head.weight, model.layers.1.mlp.experts.3.up_proj.weight" in text or (
        "2 missing: model.layers.1.mlp.experts.3.up_proj.weight, lm_head.weight" in text
    )
    assert "1 unexpected: model.layers.7.stray" in text
    assert "model.norm.weight is [65], need [64]" in text


def test_further_prediction_layers_are_left_aside(tmp_path):
    model = make(V2)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(4, 8)}))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.3\.eh_proj"):
        LingForCausalLM.from_pretrained(tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=1)
    again = LingForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and scale = max(amax, 1e-4) / 448 of each 128 x 128 block."""
    rows, columns = (-(-n // 128) for n in weight.shape)
    scale = torch.empty(rows, columns)
    out = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            scale[i, j] = weight[block].abs().max().clamp(min=1e-4) / 448
            out[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return out, scale


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_fp8_exports_are_dequantized(tmp_path, device, dtype):
    sizes = {**V2, "hidden_size": 200, "intermediate_size": 264, "moe_intermediate_size": 136}
    model = make(sizes, torch.bfloat16)
    model.save_pretrained(tmp_path)
    kept = ("embeddings", "lm_head", "norm", "mlp.gate.")
    expected = {}

    def export(tensors):
        for key in [k for k in tensors if not any(word in k for word in kept)]:
            tensors[key], scale = quantized(tensors[key].float())
            tensors[f"{key}_scale_inv"] = scale
            wide = torch.empty(tensors[key].shape)
            for i, row in enumerate(scale):
                for j, factor in enumerate(row):
                    block = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
                    wide[block] = tensors[key][block].float() * factor
            expected[key] = wide

    rewrite(tmp_path, export)
    edit_config(tmp_path, quantization_config={"quant_method": "fp8"})
    found = LingForCausalLM.from_pretrained(tmp_path, dtype=dtype, device=device)
    target = dtype or torch.bfloat16
    layer = found.model.layers[1]
    pairs = {
        "attention.query_key_value.weight": layer.attention.query_key_value.weight,
        "mlp.experts.2.up_proj.weight": layer.mlp.experts.gate_up_proj[2, 136:],
        "mlp.experts.7.down_proj.weight": layer.mlp.experts.down_proj[7],
        "mlp.shared_experts.gate_proj.weight": layer.mlp.shared_experts.gate_proj.weight,
    }
    for key, tensor in pairs.items():
        assert tensor.dtype == target, key
        assert torch.equal(tensor.cpu(), expected[f"model.layers.1.{key}"].to(target)), key
    original = model.model.layers[1].mlp.experts.down_proj[7].float()
    # e4m3 keeps 3 bits: half a unit in the last place is 2^-4 of the value
    error = (layer.mlp.experts.down_proj[7].float().cpu() - original).abs()
    assert bool((error <= original.abs() * (2**-4 + 2**-7) + original.abs().max() * 2**-9).all())
    rewrite(tmp_path, lambda t: t.pop("model.layers.1.attention.dense.weight_scale_inv"))
    with pytest.raises(CheckpointError, match=r"1 missing: \S*attention\.dense\.weight_scale_inv"):
        LingForCausalLM.from_pretrained(tmp_path, dtype=dtype)


def test_a_scale_beside_a_weight_that_is_not_fp8_is_unexpected(tmp_path):
    make(V2).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.weight_scale_inv"):
        LingForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int64", "bf16"])
def test_an_fp8_export_names_a_dtype_to_compute_in(tmp_path, name):
    make(V2, torch.bfloat16).save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "fp8"}, torch_dtype=name)

    def export(tensors):
        key = "model.layers.1.attention.dense.weight"
        tensors[key], tensors[f"{key}_scale_inv"] = quantized(tensors[key].float())

    rewrite(tmp_path, export)
    with pytest.raises(CheckpointError, match=f"torch_dtype: got '{name}', need one of"):
        LingForCausalLM.from_pretrained(tmp_path)


def test_other_quantizations_are_refused(tmp_path):
    make(V2).save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="gptq") as caught:
        LingForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("block", [5, [128], [128, 0], "128", [1.5, 2]])
def test_a_block_of_another_form_is_refused(tmp_path, block):
    make(V2).save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"weight_block_size": block})
    with pytest.raises(CheckpointError, match=r"weight_block_size: got .*, need two positive ints"):
        LingForCausalLM.from_pretrained(tmp_path)


def test_dtypes_that_stand_for_other_values_are_refused(tmp_path):
    make(V2).save_pretrained(tmp_path)
    names = {"lm_head.weight": torch.int8, "model.norm.weight": torch.float8_e4m3fn,
             "model.layers.1.mlp.experts.2.up_proj.weight": torch.float8_e5m2}  # fmt: skip

    def spoil(tensors):
        for key, dtype in names.items():
            tensors[key] = tensors[key].to(dtype)
        tensors["model.norm.weight_scale_inv"] = torch.ones(1)
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]

    rewrite(tmp_path, spoil)
    with pytest.raises(CheckpointError, match="3 of a dtype that cannot be read") as caught:
        LingForCausalLM.from_pretrained(tmp_path)
    text, known = str(caught.value), "float64, float32, bfloat16, float16"
    assert "1 missing: model.layers.1.mlp.experts.3.up_proj.weight" in text
    assert f"lm_head.weight is int8, need {known}, float8_e4m3fn" in text
    assert f"model.norm.weight is float8_e4m3fn, need {known}" in text
    assert f"experts.2.up_proj.weight is float8_e5m2, need {known}, float8_e4m3fn" in text


def test_arguments_of_another_type_are_named(tmp_path):
    model = make(V2)
    for dtype in ("bfloat16", torch.int32):
        with pytest.raises(TypeError, match=r"dtype: got .*, need None or one of torch\.float64"):
            LingForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for limit in ("1GB", 1e9, None):
        with pytest.raises(TypeError, match=r"max_shard_bytes: got .*, need an int"):
            model.save_pretrained(tmp_path, max_shard_bytes=limit)


def test_dtype_is_chosen_and_the_expert_bias_stays_fp32(tmp_path, device):
    model = make(V2)
    model.save_pretrained(tmp_path)
    again = LingForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device=device)
    for name, tensor in again.state_dict().items():
        wanted = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        assert tensor.dtype == wanted and tensor.device.type == device.type, name
    assert torch.equal(again.lm_head.weight.cpu(), model.lm_head.weight.bfloat16())
    assert all(parameter.requires_grad for parameter in again.parameters())


class HostCopies(TorchDispatchMode):
    """Notes every operator that makes a new tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = ("empty", "clone", "_to_copy", "mul", "cat", "new_", "zeros", "repeat")
        name = func.overloadpacket.__name__
        if isinstance(out, torch.Tensor) and out.device.type == "cpu" and out.numel() > 1:
            self.made += [name] if name.startswith(copies) else []
        return out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_elsewhere_makes_no_copy_on_the_host(tmp_path, dtype):
    """The meta device stands for any other: what would be copied on the host, is here too."""
    make(V2).save_pretrained(tmp_path, max_shard_bytes=30_000)
    with HostCopies() as here:
        LingForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert here.made
    with HostCopies() as elsewhere:
        LingForCausalLM.from_pretrained(tmp_path, dtype=dtype, device="meta")
    assert elsewhere.made == []


def test_a_folder_that_holds_a_checkpoint_is_not_overwritten(tmp_path):
    model = make(V2)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        make(V2).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_index_that_was_left_behind_is_removed(tmp_path):
    """A save that ended between the index and the config, repeated as one file."""
    model = make(V2)
    model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    (tmp_path / "config.json").unlink()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    LingForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_values_is_not_saved(tmp_path):
    model = LingForCausalLM(LingConfig(**V2), device="meta")
    with pytest.raises(ValueError, match=r"model: \S+ is on the meta device"):
        model.save_pretrained(tmp_path / "new")


def test_an_interrupted_save_is_no_checkpoint_and_can_be_repeated(tmp_path, monkeypatch):
    from ling_ops.models import safetensors_files

    model = make(V2)
    calls = []

    def fail_later(path, *args):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_files.os, "fsync", fail_later)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        LingForCausalLM.from_pretrained(tmp_path)
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    LingForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
        (lambda f: (f / "config.json").write_text("{}"), "architectures"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "never read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "not a safetensors"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'), r"\.\./x"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'), "b.safeten"),
        (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    ],
)
def test_damaged_folders_are_named(tmp_path, spoil, message):
    make(V2).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        LingForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        LingForCausalLM.from_pretrained(tmp_path / "absent")


def test_norm_head_divides_the_columns_of_the_head():
    model = make({**V1, "num_layers": 1}).double()
    plain = make({**V1, "num_layers": 1, "norm_head": False}).double()
    plain.load_state_dict(model.state_dict())
    weight = model.lm_head.weight.detach()
    plain.lm_head.weight.data = weight / (weight.norm(dim=0, keepdim=True) + 1e-7)
    ids = torch.randint(0, 96, (2, 9))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)
