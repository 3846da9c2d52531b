import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from llamero.checkpoint import gptq
from llamero.core.errors import LlameroError
from llamero.engine.optimizer import adamw
from llamero.engine.stage import StageConfig
from llamero.kernels.cross_entropy import linear_cross_entropy
from llamero.model import nf4
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import LoraLinear, attach, detach, merge, trainable, updates
from llamero.model.config import LlamaConfig
from llamero.model.dropout import Noise, Rates, token_keys
from llamero.model.linear import GroupLinear, Nf4Linear, PackedLinear, encode, linear, pack
from llamero.model.llama import Llama, initialize
from llamero.model.rope import Default

IDS = torch.arange(30).view(2, 15)
FORMS = ("nf4", "nf4-double", "rtn-4bit-32g", "rtn-3bit--1g")


def llama(*, tied=False, bias=False, dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        rope=Default(10000.0, 16),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
    )
    model = Llama(config)
    initialize(model, seed=0, std=0.2)
    model.to(dtype)
    return model


def adapted(model, *, seed=1, **keys):
    """An adapter whose both factors matter."""
    attach(model, AdapterConfig.model_validate({"lora": 4, **keys}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in updates(model).values():
        layer.lora_B.weight.data = torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.1
    return model


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def learn(model, steps=20, *, lr=2e-2):
    """Train on one sequence; return the losses and the optimizer."""
    stage = StageConfig.model_validate({"name": "tiny", "mixture": "m", "steps": steps, "lr": lr})
    optimizer, losses = adamw(model, stage), []
    ids, targets = IDS.flatten()[:-1], IDS.flatten().roll(-7)[:-1] % 48
    for _ in range(steps):
        hidden = model.packed_hidden(ids, [len(ids)])
        loss = linear_cross_entropy(hidden, model.lm_head.weight, targets, torch.full((len(ids),), 1 / len(ids)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


# -- the layer


@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    rank=st.integers(1, 4),
    scale=st.floats(-3, 3),
    bias=st.booleans(),
)
def test_an_update_is_added_to_what_the_layer_computes(inputs, outputs, rank, scale, bias):
    base = linear(inputs, outputs, bias=bias).double()
    layer = LoraLinear(base, rank=rank, scale=scale)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, a, b = torch.randn(3, inputs).double(), layer.lora_A.weight.tolist(), layer.lora_B.weight.tolist()
    expected = base(x).detach().clone()
    for token, o, r, i in itertools.product(range(3), range(outputs), range(rank), range(inputs)):
        expected[token, o] += scale * b[o][r] * a[r][i] * x[token, i]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), F.linear(x, base.weight + layer.update(), base.bias))


@torch.no_grad()
@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_new_adapter_changes_nothing(init):
    model = llama()
    before = model(IDS)
    attach(model, AdapterConfig(lora=4, init=init), seed=1)
    assert torch.equal(model(IDS), before)


def test_the_first_factor_begins_as_in_peft():
    """kaiming_uniform(√5) is uniform within 1/√inputs; `gaussian` has deviation 1/rank."""
    drawn: dict[str, torch.Tensor] = {}
    for init in ("default", "gaussian"):
        model = llama()
        attach(model, AdapterConfig(lora=16, init=init), seed=1)
        factors = [layer.lora_A.weight.flatten() for layer in updates(model).values() if layer.base.in_features == 32]
        drawn[init] = torch.cat(factors)
    assert drawn["default"].abs().max() <= 32**-0.5
    torch.testing.assert_close(drawn["default"].std(), torch.tensor(32**-0.5 / 3**0.5), rtol=0.03, atol=0)
    torch.testing.assert_close(drawn["gaussian"].std(), torch.tensor(1 / 16), rtol=0.03, atol=0)


def test_the_first_factor_depends_on_seed_and_name_alone():
    some, all_of_them, other = llama(), llama(), llama()
    attach(some, AdapterConfig(lora=4, targets=("v_proj",)), seed=1)
    attach(all_of_them, AdapterConfig(lora=4), seed=1)
    attach(other, AdapterConfig(lora=4), seed=2)
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(updates(some)[name].lora_A.weight, updates(all_of_them)[name].lora_A.weight)
    assert not torch.equal(updates(some)[name].lora_A.weight, updates(other)[name].lora_A.weight)
    twins = [layer.lora_A.weight for layer in updates(all_of_them).values() if layer.base.in_features == 32]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(twins, 2))


def test_the_scale_is_alpha_over_rank_or_its_root():
    for keys, scale in [({}, 2), ({"alpha": 8}, 0.5), ({"alpha": 8, "rslora": True}, 2)]:
        model = llama()
        attach(model, AdapterConfig.model_validate({"lora": 16, **keys}), seed=1)
        assert {layer.scale for layer in updates(model).values()} == {scale}


def noise(model, p):
    keys, lengths = token_keys([3, 4], [15, 15], seed=1, step=2), torch.full((30,), 15)
    return Noise(keys, lengths, Rates(adapter=p), model.config.num_layers)


def note(seen, name, _, args):
    """Remember what comes into a module."""
    seen[name] = args[0]


def test_dropout_falls_on_the_input_of_each_update_by_itself():
    model = llama()
    inputs: dict[str, torch.Tensor] = {}
    factors: dict[str, torch.Tensor] = {}
    attach(model, AdapterConfig(lora=4, dropout=0.25), seed=1)
    for name, layer in updates(model).items():
        torch.nn.init.normal_(layer.lora_B.weight)
        layer.register_forward_pre_hook(partial(note, inputs, name))
        layer.lora_A.register_forward_pre_hook(partial(note, factors, name))
    model.packed_hidden(IDS.flatten(), [15, 15], noise(model, 0.25))
    kept = {name: factors[name] != 0 for name in factors}
    assert len(kept) == 14
    for name, x in inputs.items():
        torch.testing.assert_close(factors[name], x * kept[name] / 0.75)
        assert 0.7 < kept[name].float().mean() < 0.8
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(kept.values(), 2) if a.shape == b.shape)
    model.packed_hidden(IDS.flatten(), [15, 15])  # no noise, as in validation
    assert all(torch.equal(factors[name], inputs[name]) for name in factors)


def test_recomputed_activations_drop_the_same():
    model, grads = llama(), []
    attach(model, AdapterConfig(lora=4, dropout=0.5), seed=1)
    for layer in updates(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    wrapped = copy.deepcopy(model)
    for number, block in enumerate(wrapped.model.layers):
        wrapped.model.layers[number] = checkpoint_wrapper(block)
    for one in (model, wrapped):
        one.packed_hidden(IDS.flatten(), [15, 15], noise(model, 0.5)).square().sum().backward()
        grads.append([p.grad for p in trainable(one)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# -- packed layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_codes_as_through_their_dense_twin(form, bias):
    plain = torch.nn.Linear(64, 32, bias=bias)
    packed = encode(plain, form)
    dense = packed.dense(torch.float32)
    xs = [torch.randn(3, 5, 64).requires_grad_() for _ in range(2)]
    xs[1].data = xs[0].data
    grad = torch.randn(3, 5, 32)
    for layer, x in zip((packed, dense), xs, strict=True):
        (layer(x) * grad).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    if bias:
        twins = packed.get_parameter("bias").grad, dense.bias.grad
        torch.testing.assert_close(*twins)


def test_a_packed_layer_keeps_no_weight_for_its_gradient():
    layer, kept = encode(torch.nn.Linear(64, 32), "nf4"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(3, 64).requires_grad_())
    assert sum(kept) < 64 * 32


def test_a_packed_layer_computes_in_the_precision_of_autocast():
    layer = encode(torch.nn.Linear(64, 32), "rtn-4bit-32g")
    x = torch.randn(3, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        torch.testing.assert_close(y, layer.dense(torch.float32)(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y.dtype, grad.dtype) == (torch.bfloat16, torch.float32)


def test_round_to_nearest_in_memory_is_what_a_gptq_file_would_hold():
    plain = linear(64, 32, bias=False)
    torch.nn.init.normal_(plain.weight)
    packed = encode(plain, "rtn-4bit-32g")
    assert isinstance(packed, GroupLinear)
    assert packed.layout == gptq.Format(4, 32, 1)
    groups = plain.weight.detach().unflatten(1, (2, 32))
    step = (2 * groups.abs().amax(2, keepdim=True) / 15).half().float()
    codes = (groups / step).round().clamp(-8, 7)
    torch.testing.assert_close(packed.dequantize(torch.float32), (codes * step).flatten(1), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["nf5", "rtn-5bit-32g", "rtn-4bit-0g", "rtn-4bit-48g", "nf4"])
def test_a_form_that_does_not_exist_or_fit_is_refused(form):
    with pytest.raises(LlameroError, match=form):
        encode(torch.nn.Linear(33, 31) if form == "nf4" else torch.nn.Linear(64, 32), form)


def brute_force_nf4(weight):
    """Every value against all sixteen, one by one."""
    flat, out = weight.flatten().tolist(), []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(abs(value) for value in block)
        for value in block:
            distances = [abs(one - value / (largest or 1)) for one in nf4.VALUES]
            out.append(nf4.VALUES[distances.index(min(distances))] * largest)
    return torch.tensor(out, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_value_of_its_block(dtype):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    decoded = nf4.decode(nf4.encode(weight, double=False), (6, 64), torch.float32)
    torch.testing.assert_close(decoded.double(), brute_force_nf4(weight), rtol=1e-6, atol=1e-7)


def test_values_of_nf4_survive_as_they_are():
    weight = torch.tensor(nf4.VALUES).repeat(3, 8) * torch.tensor([1.0, 0.25, 3.0])[:, None]
    assert torch.equal(nf4.decode(nf4.encode(weight, double=False), (3, 128), torch.float32), weight)


def test_double_quantization_costs_little_and_saves_a_third_of_a_bit():
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    size, error = {}, {}
    for double in (False, True):
        tensors = nf4.encode(weight, double=double)
        size[double] = 8 * sum(tensor.nbytes for tensor in tensors.values()) / weight.numel()
        assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in nf4.empty(256, 128, double=double).items()
        }
        error[double] = (nf4.decode(tensors, (128, 256), torch.float32) - weight).square().mean().sqrt()
    assert (size[False], round(size[True], 2)) == (4.5, 4.13)
    assert error[True] < 1.01 * error[False] < 0.1


def test_the_map_of_scales_is_the_published_one():
    """Seven decades between 0 and 1; bitsandbytes' own table is compared in the parity tests."""
    values = nf4.DYNAMIC_MAP
    assert len(values.unique()) == 256
    assert (values[0], values[127], values[255]) == (-values[254], 0, 1)
    assert torch.equal(values[:127], -values[128:255].flip(0))
    torch.testing.assert_close(values[128], torch.tensor(0.55e-6))


def test_a_plan_leaves_the_tables_of_numbers_as_they_are():
    """What is decoded without numbers must not stay for those who decode with them."""
    weight = torch.ones(2, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        nf4.decode(nf4.empty(64, 2, double=True), (2, 64), torch.float32)
    decoded = nf4.decode(nf4.encode(weight, double=True), (2, 64), torch.float32)
    torch.testing.assert_close(decoded, weight)


# -- training


@pytest.mark.parametrize("base", [None, *FORMS])
def test_training_an_adapter_learns_and_leaves_the_base_bit_by_bit(base):
    model = llama(bias=True)
    if base is not None:
        pack(model.model.layers, base)
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    before = bits(model)
    attach(model, AdapterConfig(lora=4, base=base), seed=1)
    losses, optimizer = learn(model)
    assert losses[-1] < 0.7 * losses[0]
    assert all(layer.lora_B.weight.any() for layer in updates(model).values())
    factors = {factor.weight for layer in updates(model).values() for factor in (layer.lora_A, layer.lora_B)}
    assert set(optimizer.state) == set(trainable(model)) == factors
    detach(model)
    after = bits(model)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())


def test_only_the_adapter_has_gradients():
    model = llama()
    attach(model, AdapterConfig(lora=4, targets=("q_proj", "down_proj")), seed=1)
    hidden = model.packed_hidden(IDS.flatten(), [30])
    linear_cross_entropy(hidden, model.lm_head.weight, IDS.flatten(), torch.ones(30)).backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = itertools.product("01", ("self_attn.q_proj", "mlp.down_proj"), "AB")
    assert graded == {f"model.layers.{n}.{layer}.lora_{factor}.weight" for n, layer, factor in expected}


def test_a_packed_base_learns_what_its_dense_twin_learns():
    packed, dense = llama(), llama()
    pack(packed.model.layers, "nf4")
    for name, layer in packed.named_modules():
        if isinstance(layer, Nf4Linear):
            dense.set_submodule(name, layer.dense(torch.float32))
    losses = []
    for model in (packed, dense):
        attach(model, AdapterConfig(lora=4), seed=1)
        losses.append(learn(model, 5)[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_the_adapter_is_float32_under_a_base_of_bfloat16():
    model = llama(dtype=torch.bfloat16)
    attach(model, AdapterConfig(lora=4, modules_to_save=("embed_tokens", "norm")), seed=1)
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    layer = updates(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


def bytes_of_training(model):
    """Parameters, codes, gradients and AdamW's moments after a step."""
    _, optimizer = learn(model, 1)
    held = [*model.parameters(), *model.buffers(), *trainable(model)]  # a gradient is as large as its parameter
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in [*held, *states])


def test_an_adapter_takes_a_fraction_of_the_memory_of_training_everything():
    full, lora, qlora = llama(), llama(), llama()
    pack(qlora.model.layers, "nf4-double")
    weights = sum(p.nbytes for p in full.parameters())
    for model in (lora, qlora):
        attach(model, AdapterConfig(lora=1), seed=1)
    trained = sum(p.nbytes for p in trainable(lora))
    linears = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    count = len(list(full.parameters()))
    assert bytes_of_training(full) == 4 * weights + 4 * count  # a count of steps beside each parameter's moments
    assert bytes_of_training(lora) == weights + 4 * trained + 4 * 28
    assert bytes_of_training(qlora) < weights - 4 * linears + 0.53 * linears + 4 * trained + 4 * 28 + 28 * 8


# -- merging


@torch.no_grad()
@pytest.mark.parametrize("keys", [{}, {"targets": ("v_proj",)}, {"targets": "all-linear", "rslora": True}])
def test_merging_is_exact(keys):
    model = adapted(llama(bias=True), **keys)
    expected = {
        name: layer.base.get_parameter("weight") + layer.scale * (layer.lora_B.weight @ layer.lora_A.weight)
        for name, layer in updates(model).items()
    }
    logits = model(IDS)
    names = set(llama(bias=True).state_dict())
    assert set(merge(model).values()) == {0.0}
    assert all(torch.equal(model.get_parameter(f"{name}.weight"), weight) for name, weight in expected.items())
    torch.testing.assert_close(model(IDS), logits, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names


@torch.no_grad()
def test_merging_into_bfloat16_rounds_once_and_says_what_that_costs():
    model = adapted(llama(dtype=torch.bfloat16))
    layer = copy.deepcopy(updates(model)["model.layers.0.mlp.up_proj"])
    exact = layer.base.get_parameter("weight").float() + layer.update()
    lost = merge(model)
    merged = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(merged, exact.bfloat16())
    share = (merged.float() - exact).norm() / layer.update().norm()
    assert lost["model.layers.0.mlp.up_proj"] == pytest.approx(float(share))
    assert 0 < max(lost.values()) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)])
@pytest.mark.parametrize("form", FORMS)
def test_merging_into_codes_is_refused_and_into_their_weights_exact(form, targets):
    model = llama()
    pack(model.model.layers, form)
    adapted(model, targets=targets)
    logits = model(IDS)
    with pytest.raises(LlameroError, match="q_proj") as caught:
        merge(model)
    assert "dtype=torch.bfloat16" in str(caught.value.fix)
    merge(model, dtype=torch.float32)
    torch.testing.assert_close(model(IDS), logits, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_merged_model_can_be_adapted_again():
    model = adapted(llama())
    with pytest.raises(LlameroError, match="has an adapter already"):
        adapted(model)
    merge(model)
    assert all(p.requires_grad for p in model.parameters())
    adapted(model)


# -- modules that are trained whole


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_trained_with_the_adapter(tied):
    model = llama(tied=tied)
    attach(model, AdapterConfig(lora=4), seed=1, grown=True)
    before = bits(model)
    losses, _ = learn(model)
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} < changed
    assert not any("norm" in name or ".base." in name for name in changed)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(LlameroError, match="its old values are gone"):
        detach(model)


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head",)])
def test_tied_modules_are_trained_as_one(saved):
    model = llama(tied=True)
    attach(model, AdapterConfig(lora=4, modules_to_save=saved), seed=1)
    assert model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight is model.model.embed_tokens.weight
    merge(model, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- bad input


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        AdapterConfig(lora=0)


@pytest.mark.parametrize("base", ["nf8", "rtn-4bit-0g", "gptq-4bit-128g-actorder_True", "rtn-4bit-128g-x"])
def test_a_base_that_cannot_be_packed_without_data_is_refused(base):
    with pytest.raises(ValidationError, match="base"):
        AdapterConfig(lora=1, base=base)


@pytest.mark.parametrize(
    ("keys", "grown", "says"),
    [
        ({"lora": 33}, False, "rank 33 is larger than `model.layers.0.self_attn.q_proj` (32 inputs, 32 outputs)"),
        ({"targets": ("q_porj",)}, False, "did you mean `q_proj`"),
        ({"targets": ("all_linear",)}, False, "did you mean `all-linear`"),
        ({"targets": ("lm_head",)}, False, "name it in `modules_to_save`"),
        ({"modules_to_save": ("embed_token",)}, False, "did you mean `embed_tokens`"),
        ({"modules_to_save": ("q_proj",)}, False, "has an update and is trained whole"),
        ({"modules_to_save": ("embed_tokens",)}, True, "leaves rows of new tokens out"),
        ({"modules_to_save": ()}, True, "leaves rows of new tokens out"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(keys, grown, says):
    model = llama()
    with pytest.raises(LlameroError) as caught:
        attach(model, AdapterConfig.model_validate({"lora": 4, **keys}), seed=1, grown=grown)
    assert says in str(caught.value)
    assert not updates(model)
    assert all(p.requires_grad for p in model.parameters())
